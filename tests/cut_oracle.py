"""The oracle for any denoiser made of blocks, in a plain pipeline's own loop: its own forward, cut by hooks.

A stage ends with a block. A forward hook on that block notes what it returns, which is the boundary, and returns an
older one in its place where the next stage reads that. Predictions are kept flat, [B, N], whatever a denoiser returns.
"""

import inspect
from contextlib import contextmanager
from unittest import mock

import torch
from oracle import Oracle, Staged, closed_form
from plain_loop import like, tensors
from torch.utils import _pytree as pytree


def through(denoiser, cuts, given, old):
    """The prediction, and what each stage but the last made.

    Args:
        cuts: names of the blocks that end stages.
        given: the forward's arguments, by stage.
        old: what each stage reads; None: what the one before it makes now. With different arguments all are given.
    """
    made, branches = [None] * len(cuts), []
    for branch in given:
        if any(branch is other for other in branches):
            continue
        branches.append(branch)
        hooks = []
        for i, name in enumerate(cuts):

            def hook(module, args, output, i=i, branch=branch):
                leaves, spec = pytree.tree_flatten(output)
                if given[i] is branch:
                    made[i] = tuple(leaf for leaf in leaves if leaf is not None)
                if old[i + 1] is None:
                    return None
                fresh = iter(old[i + 1])
                return pytree.tree_unflatten([leaf if leaf is None else next(fresh) for leaf in leaves], spec)

            hooks.append(denoiser.get_submodule(name).register_forward_hook(hook))
        try:
            output = denoiser.plain(**pytree.tree_map(lambda leaf: leaf, branch))
        finally:
            for handle in hooks:
                handle.remove()
        if branch is given[-1]:
            pred = flat(output)
    return pred, made


def flat(output):
    """What a denoiser returned for a stream, [B, N]."""
    return torch.cat([tensor.flatten(1) for tensor in tensors(output)], dim=1)


class _Cut:
    """`Oracle` or `Staged` with such forwards. Boundaries of the steps before ``first`` are not known."""

    def __init__(self, denoiser, first, *args):
        super().__init__(denoiser, *args)
        self.first = first
        self.forward = lambda return_dict, **given: (flat(denoiser.plain(**given)),)
        self.through, self.two_parts = through, two_parts

    def learn(self, known, i, boundary):
        if i >= self.first:
            super().learn(known, i, boundary)


def two_parts(denoiser, cuts, stage0, stage1, boundary):
    pred, (fresh,) = through(denoiser, cuts, [stage0, stage1], [None, boundary])
    return pred, fresh


class Two(_Cut, Oracle):
    pass


class More(_Cut, Staged):
    pass


@contextmanager
def inside(denoiser, scheduler, *, plan, rule, cuts, cond, w=0.0, is_batched=False):
    """Let a plain pipeline's own loop call the oracle in place of a denoiser.

    Args:
        cuts: names of the blocks that end the stages but the last.
        cond: number of that stream in the pipeline's order.
        w: guidance scale, for ``deferred``.
        is_batched: whether a step is one batch of both streams, not two calls.
    """
    original = denoiser.forward
    signature, state = inspect.signature(original), {"calls": 0, "first": [], "answers": None}
    kind = Two if len(cuts) == 1 else More
    # Two calls are split from the second step on, when it is known what the first call tells; a batch of another order
    # than [uncond, cond] likewise.
    first = int(not is_batched or cond == 0)
    oracle = kind(denoiser, first, plan, rule, cuts, None, None, lambda *streams: [1.0, w - 1])

    def streams(*given):
        if rule == "deferred" and oracle.times is None:
            oracle.times, oracle.gains = closed_form(scheduler, scheduler.timesteps[0])
        found = oracle(*(given[i] for i in (1 - cond, cond)))
        return [found[1], found[0]] if cond == 0 else found

    def answer(output, columns):
        """The same nest with other predictions, flat by stream."""
        sizes = [tensor[0].numel() for tensor in tensors(output)]
        parts = [stream.split(sizes, dim=1) for stream in columns]
        shapes = [tensor.shape[1:] for tensor in tensors(output)]
        return like(output, [[part[k].unflatten(1, shape) for part in parts] for k, shape in enumerate(shapes)])

    def forward(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        if is_batched:
            state.setdefault("like", original(**given))
            return answer(state["like"], streams(half(given, 0), half(given, 1)))
        index, state["calls"] = state["calls"] % 2, state["calls"] + 1
        if state["calls"] <= 2:  # the first step
            state["first"].append(given)
            state["like"] = output = original(**given)
            if index == 0:
                return output
            state["answers"] = streams(*state["first"])
        elif index == 0:
            earlier, other = state["first"]
            later = {
                name: given[name] if name in earlier and same(earlier[name], value) else value
                for name, value in other.items()
            }
            state["answers"] = streams(given, later)
        return answer(state["like"], [state["answers"][index]])

    denoiser.plain = original
    with mock.patch.object(denoiser, "forward", forward):
        try:
            yield oracle
        finally:
            del denoiser.plain


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other


def half(given, index):
    """One of the two equal parts of a batch."""
    latents = next(iter(given.values()))

    def cut(value):
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        is_batch = value.ndim if isinstance(value, torch.Tensor) else type(value) is type(latents) is list
        if is_batch and len(value) == len(latents):
            size = len(value) // 2
            return value[index * size : (index + 1) * size]
        return type(value)(map(cut, value)) if isinstance(value, list | tuple) else value

    return {name: cut(value) for name, value in given.items()}
