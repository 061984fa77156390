"""Denoisers that are lists of blocks, cut by interception: no model's name and no model's code.

A unit is one call of a member of the denoiser's top-level module lists, numbered in the order of the forward. A stage
is evaluated by the denoiser's own forward, in which the blocks of the other stages are not evaluated but answered with
tensors of the right shape that are all nan, and the arguments at the stage's first block are replaced by the boundary.
So embeddings, controls, masks and the last projection stay the model's own code, and each rank makes them for itself.

What the boundary is, is found by a run in which each tensor remembers of which blocks' outputs it was made. An argument
of block k that was made of what blocks before it returned is part of the boundary there. What later blocks read of
blocks before k by another way (the hints of a VACE, the long skips of a HunyuanDiT) has to be evaluated again. If a
way were overlooked, nan would come out at the end. Before any step is split, `Anatomy.differs` looks for that, and for
what blocks hand one another by a state of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...trees import tensors_of
from ..calls import Call, Structure
from .anatomy import Activation, Anatomy, Boundary, Counted, Tally, eagerly
from .cuts import Region, Segment, Shape

Makers = frozenset[int]
Original = Callable[..., Any]
#: Answers the call of a block: its number, what evaluates it, and its arguments.
Answer = Callable[[int, Original, Any, Any], Any]


class _Read(NamedTuple):
    """An argument of a block that was made of what others returned: its place, its shape, and by which it was made."""

    place: int
    shape: Shape
    makers: Makers


@dataclass(frozen=True, kw_only=True)
class Traced(Counted):
    """What else is found of blocks.

    Attributes:
        names: of the blocks, in the order of their calls.
        boundaries: by block, what a stage that begins there is handed.
        outputs: by block, the leaves of what it returned, (shape, dtype) for tensors, and their structure.
    """

    names: list[str]
    boundaries: list[list[_Read]]
    outputs: list[tuple[list[Any], Any]]


class Blocks(Anatomy):
    """A denoiser whose top-level module lists are its blocks."""

    needs_trial = True

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        lists = [(name, child) for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
        found = {block: f"{name}.{number}" for name, child in lists for number, block in child.named_children()}
        self.modules = {name: block for block, name in found.items()}
        is_sd3 = any(cls.__name__ == "SD3Transformer2DModel" for cls in type(denoiser).__mro__)
        self.family = "mmdit" if is_sd3 else "blocks"

    def names(self, call: Call) -> Sequence[str]:
        return self.counted(call).names

    def evaluate(
        self, segment: Segment, call: Call, before: Activation | None, boundary: Boundary | None
    ) -> Activation:
        traced: Traced = self.counted(call)
        start, stop, *_ = segment
        evaluated = {*range(start, stop), *traced.again[start]}
        device = call.tensors[0].device
        left: list[Boundary] = []

        def answer(number: int, original: Original, args: Any, kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            if number == stop:
                left.append(tuple(leaves[read.place] for read in traced.boundaries[stop]))
            if number not in evaluated:
                return _nothing(*traced.outputs[number], device)
            if number == start and boundary is not None:
                for read, tensor in zip(traced.boundaries[start], boundary, strict=True):
                    leaves[read.place] = tensor
                args, kwargs = pytree.tree_unflatten(leaves, spec)
            return original(*args, **kwargs)

        output = self._forward(call, traced.names, answer)
        if stop == len(traced.names):
            left = [tuple(Structure(output, call.is_listed).tensors(output))]
        return Activation(left[0], {})

    def watch(self, call: Call, starts: Sequence[int]) -> tuple[Any, list[Boundary]]:
        traced: Traced = self.counted(call)
        left: dict[int, Boundary] = {}

        def answer(number: int, original: Original, args: Any, kwargs: Any) -> Any:
            if number in starts:
                leaves = pytree.tree_leaves((args, kwargs))
                left[number] = tuple(leaves[read.place] for read in traced.boundaries[number])
            return original(*args, **kwargs)

        output = self._forward(call, traced.names, answer)
        return output, [left[start] for start in starts]

    def walk(self, call: Call, mark: Callable[[], None]) -> None:
        def answer(number: int, original: Original, args: Any, kwargs: Any) -> Any:
            if number:
                mark()
            return original(*args, **kwargs)

        mark()
        self._forward(call, self.names(call), answer)
        mark()

    def _regions(self, counted: Traced) -> Iterator[Region]:
        for stop in range(1, len(counted.names)):
            if counted.boundaries[stop]:
                yield Region(0, stop)

    def _forward(self, call: Call, names: Sequence[str], answer: Answer) -> Any:
        """What the denoiser's forward returns, with its blocks' calls answered.

        Raises:
            RuntimeError: it calls other blocks than it did.
        """
        left = list(enumerate(names))[::-1]

        def check(name: str, original: Original, args: Any, kwargs: Any) -> Any:
            number, expected = left.pop() if left else (0, None)
            if name != expected:
                raise _other_blocks(self.denoiser)
            return answer(number, original, args, kwargs)

        output = self._call(call, check)
        if left:
            raise _other_blocks(self.denoiser)
        return output

    def _call(self, call: Call, answer: Callable[[str, Original, Any, Any], Any]) -> Any:
        with self._intercepted(answer), eagerly(call):
            # Forwards may change their arguments' containers (SD3 with an IP-Adapter does).
            return call.evaluate(**pytree.tree_map(lambda leaf: leaf, call.inputs))

    @contextmanager
    def _intercepted(self, answer: Callable[[str, Original, Any, Any], Any]) -> Iterator[None]:
        """Meanwhile the blocks' calls in this thread are answered, but for those within another block's."""
        thread, is_within = get_ident(), False

        def call(name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_within
            if is_within or get_ident() != thread:
                return original(*args, **kwargs)
            is_within = True
            try:
                return answer(name, original, args, kwargs)
            finally:
                is_within = False

        before = {name: vars(block).get("_compiled_call_impl") for name, block in self.modules.items()}
        for name, block in self.modules.items():
            # What a module's call asks first, compiled or not.
            vars(block)["_compiled_call_impl"] = partial(call, name, before[name] or block._call_impl)
        try:
            yield
        finally:
            for name, block in self.modules.items():
                if before[name] is None:
                    del vars(block)["_compiled_call_impl"]
                else:
                    vars(block)["_compiled_call_impl"] = before[name]

    # What is found by a run.

    def _count(self, call: Call) -> Traced:
        tally = Tally()
        try:
            with tally.faking(self.denoiser, call.inputs) as inputs:
                return self._trace(replace(call, inputs=inputs), tally)
        except Exception:
            # The forward reads values on the host, or does what fake tensors do not: the weights stand for the FLOPs.
            with torch.no_grad():
                return self._trace(call, None)

    def _trace(self, call: Call, tally: Tally | None) -> Traced:
        names: list[str] = []
        reads: list[list[_Read]] = []
        outputs: list[tuple[list[Any], Any]] = []
        counts: list[int] = []

        def answer(name: str, original: Original, args: Any, kwargs: Any) -> Any:
            number, leaves = len(names), pytree.tree_leaves((args, kwargs))
            names.append(name)
            reads.append(made.reads(leaves))
            counts.append(tally.flops if tally else sum(weight.numel() for weight in self.modules[name].parameters()))
            found, spec = pytree.tree_flatten(original(*args, **kwargs))
            outputs.append(([(t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in found], spec))
            given = {id(leaf) for leaf in leaves}
            return pytree.tree_unflatten([leaf if id(leaf) in given else made.by(number, leaf) for leaf in found], spec)

        with (made := _Made()):
            output = self._call(call, answer)
            structure = Structure(output, call.is_listed)
            last = made.reads(structure.tensors(output))
        if tally:
            counts = [
                after - before for before, after in zip([0, *counts[1:]], [*counts[1:], tally.flops], strict=True)
            ]
        again = [_again(start, [*reads, last]) for start in range(len(names))]
        boundaries = [[read for read in found if read.makers - kept] for found, kept in zip(reads, again, strict=True)]
        shapes = [*(tuple(read.shape for read in found) for found in boundaries[1:]), tuple(structure.shapes)]
        return Traced(
            flops=counts,
            shapes=shapes,
            structure=structure,
            again=again,
            names=names,
            boundaries=boundaries,
            outputs=outputs,
            is_fixed=tally is not None,
        )


def _again(start: int, reads: Sequence[list[_Read]]) -> frozenset[int]:
    """The blocks before one of whose outputs something behind it is made, and those that these need."""
    due = {maker for found in reads[start + 1 :] for read in found for maker in read.makers if maker < start}
    needed: set[int] = set()
    while due:
        block = due.pop()
        needed.add(block)
        due |= {maker for read in reads[block] for maker in read.makers} - needed
    return frozenset(needed)


def _nothing(leaves: list[Any], spec: Any, device: torch.device) -> Any:
    """What a block returns that is not evaluated."""

    def fill(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)

    filled = [fill(*leaf) if type(leaf) is tuple and isinstance(leaf[0], torch.Size) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, spec)


def _other_blocks(denoiser: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"hybrid-cond: the {type(denoiser).__name__} calls other blocks than when its layers were split, so that no "
        "step can be PIPELINED: use --hybrid_kinds FS."
    )


class _Made(TorchDispatchMode):
    """Meanwhile it is noted of which blocks' outputs tensors are made, by their memory: they are written to as well."""

    def __init__(self) -> None:
        super().__init__()
        # By address, which the reference keeps from being used again.
        self._makers: dict[int, tuple[StorageWeakRef, Makers]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        makers = frozenset().union(*map(self.of, tensors_of((args, kwargs))))
        for tensor in tensors_of(output) if makers else ():
            self._note(tensor, self.of(tensor) | makers)
        return output

    def of(self, tensor: torch.Tensor) -> Makers:
        """The blocks of whose outputs a tensor is made."""
        return self._makers.get(tensor.untyped_storage()._cdata, (None, frozenset()))[1]

    def by(self, block: int, leaf: Any) -> Any:
        """A leaf that a block returned, in memory of its own: blocks that are alike may have returned the same."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensor = leaf.clone(memory_format=torch.preserve_format)
        self._note(tensor, frozenset([block]))
        return tensor

    def reads(self, leaves: Sequence[Any]) -> list[_Read]:
        """Those of a block's arguments that are made of blocks' outputs."""
        return [
            _Read(place, (leaf.shape, leaf.dtype), makers)
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and (makers := self.of(leaf))
        ]

    def _note(self, tensor: torch.Tensor, makers: Makers) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        self._makers[storage.cdata] = storage, makers
