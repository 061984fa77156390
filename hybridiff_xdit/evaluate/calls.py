"""One call of a denoiser, the parts of a batch, and the structure of what is returned.

A *stream* is one evaluation of a denoiser within a step. A call asks for one, or, as a batch whose parts share the
latents, for several: [uncond, cond] or [cond, uncond].
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from ..trees import PLAIN

Inputs = dict[str, Any]

#: Parts that are looked for in a batch. Four or six are taken for two, until the scheduler's sample tells how many.
_COUNTS = (2, 3, 5)


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Attributes:
        denoiser: the module.
        evaluate: the module's call as it would be without us; takes the inputs by name.
        inputs: the arguments by name.
        context: name that the pipeline gave the call by ``cache_context``, if it did.
    """

    denoiser: torch.nn.Module
    evaluate: Callable[..., Any]
    inputs: Inputs
    context: str | None = None

    @cached_property
    def flat(self) -> tuple[list[Any], Any]:
        """The leaves of the inputs, and their structure: as they were when this was first asked."""
        return pytree.tree_flatten(self.inputs)

    @cached_property
    def kind(self) -> Any:
        """What two calls have in common that ask for the same streams of a step."""
        leaves, spec = self.flat
        return _number_of(self.denoiser), self.context, spec, tuple(map(kind_of, leaves))

    @property
    def latents(self) -> Any:
        """The first argument: a tensor [B, ...], or a list of B tensors. (Cosmos3's first ones are the text.)"""
        return self.inputs.get("vision_tokens", next(iter(self.inputs.values())))

    @property
    def batch(self) -> int:
        """B."""
        return len(self.latents)

    @property
    def is_listed(self) -> bool:
        """Whether samples are entries of lists (Z-Image)."""
        return isinstance(self.latents, list)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments."""
        return [leaf for leaf in self.flat[0] if isinstance(leaf, torch.Tensor)]


#: Numbers of denoisers. (Another one may have the ``id`` of one that is gone, and not on every rank.)
_NUMBERS: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()
_FRESH = itertools.count()


def _number_of(denoiser: torch.nn.Module) -> int:
    if denoiser not in _NUMBERS:
        _NUMBERS[denoiser] = next(_FRESH)
    return _NUMBERS[denoiser]


def read_call(denoiser: torch.nn.Module, evaluate: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Call:
    """The call of a denoiser with these arguments.

    Raises:
        TypeError: they do not fit its forward.
    """
    beneath: Any = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    cls: Any = type(beneath)
    bound = _signature(_forward_of(cls)).bind(None, *args, **kwargs)
    inputs: Inputs = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        inputs |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    inputs.pop(next(iter(bound.signature.parameters)))
    call = Call(denoiser, evaluate, inputs, context)
    assert call.kind
    return call


def is_compiled(denoiser: torch.nn.Module) -> bool:
    """Whether ``torch.compile`` has been given the whole denoiser."""
    return hasattr(denoiser, "_orig_mod") or denoiser._compiled_call_impl is not None


@lru_cache(maxsize=64)
def _forward_of(cls: Any) -> Any:
    """Its forward; where that only hands its arguments on, the one that it overrides."""
    forwards = [vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)]
    return next((forward for forward in forwards if _names_arguments(_signature(forward))), forwards[0])


def _names_arguments(signature: inspect.Signature) -> bool:
    kinds = [parameter.kind for parameter in signature.parameters.values()][1:]
    return not {*kinds} <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


@lru_cache(maxsize=64)
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def count_parts(call: Call) -> int:
    """How many equal parts of a batch share their latents: so many streams may be one batch; 1 if none do.

    Reads the values: on a GPU the host waits.
    """
    return next((count for count in _COUNTS if has_parts(call, count)), 1)


def has_parts(call: Call, count: int) -> bool:
    """Whether so many equal parts of a batch share their latents. Reads the values, as `count_parts`."""
    size, rest = divmod(call.batch, count)
    return not rest and size > 0 and all(_is_same_samples(call.latents, i * size, size) for i in range(1, count))


def _is_same_samples(latents: Any, start: int, size: int) -> bool:
    """Whether the samples from ``start`` on are the first ones again."""
    first, other = latents[:size], latents[start : start + size]
    return all(map(is_equal, first, other)) if isinstance(latents, list) else is_equal(first, other)


def part(call: Call, index: int, count: int) -> Call:
    """The ``index``-th of the ``count`` equal parts of a batch, as a call of its own.

    Tensors that have the batch's length are cut. So are texts of each frame, and where samples are entries of lists,
    lists of that length. All else is for every sample.
    """
    if count == 1:
        return call
    batch = call.batch

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.chunk(count)[index] if value.ndim and len(value) == batch else value
        if call.is_listed and isinstance(value, list) and len(value) == batch:
            size = batch // count
            return value[index * size : (index + 1) * size]
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(map(cut, value))
        return {key: cut(item) for key, item in value.items()} if isinstance(value, dict) else value

    inputs = {name: cut(value) for name, value in call.inputs.items()}
    texts = call.inputs.get("encoder_hidden_states")  # [B, S, C], or [B F, S, C]: AnimateDiff
    if isinstance(texts, torch.Tensor) and texts.ndim == 3 and len(texts) > batch and len(texts) % batch == 0:
        inputs["encoder_hidden_states"] = texts.chunk(count)[index]
    return replace(call, inputs=inputs)


def join(parts: Sequence[Any], is_listed: bool) -> Any:
    """What a batch's call would have returned, from what its parts' calls did."""
    columns, specs = zip(*(_flatten(output, is_listed) for output in parts), strict=True)
    leaves: list[Any] = []
    for column in zip(*columns, strict=True):
        if isinstance(column[0], torch.Tensor):
            leaves.append(torch.cat(column))
        else:
            leaves.append([sample for samples in column for sample in samples] if _is_list(column[0]) else column[0])
    return pytree.tree_unflatten(leaves, specs[0])


def split(output: Any, count: int, is_listed: bool) -> list[Any]:
    """What the parts' calls would have returned, from what a batch's call did."""
    if count == 1:
        return [output]
    leaves, spec = _flatten(output, is_listed)
    columns = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            columns.append(list(leaf.chunk(count)))
        elif _is_list(leaf):
            size = len(leaf) // count
            columns.append([leaf[i * size : (i + 1) * size] for i in range(count)])
        else:
            columns.append([leaf] * count)
    return [pytree.tree_unflatten(list(column), spec) for column in zip(*columns, strict=True)]


def _flatten(output: Any, is_listed: bool) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(output, is_leaf=_is_list if is_listed else None)


def _is_list(value: Any) -> bool:
    return type(value) is list


def is_equal(one: Any, other: Any) -> bool:
    """Whether two leaves are equal in value. On a GPU the host waits."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return kind_of(one) == kind_of(other) and (is_same_memory(one, other) or torch.equal(one, other))
    return type(one) is type(other) and isinstance(one, PLAIN) and one == other


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape and dtype are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def kind_of(leaf: Any) -> Any:
    """Shape, dtype and device of a tensor; the type of a number or an object; another plain value itself."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, PLAIN) and not isinstance(leaf, float | int) else type(leaf)


class Structure:
    """A nest that a denoiser returned, without its tensors.

    Args:
        output: a tensor, tuple, list, dict or output class, or a nest of these.
        is_listed: whether lists have an entry a sample. Such a list of tensors of one shape counts as one tensor.
    """

    def __init__(self, output: Any, is_listed: bool) -> None:
        self.is_listed = is_listed
        leaves, self._spec = _flatten(output, is_listed)
        self._rest = [None if _is_prediction(leaf) else leaf for leaf in leaves]
        self._predicted = [_is_prediction(leaf) for leaf in leaves]
        self._lists = [_is_list(leaf) for leaf in leaves]
        self.shapes = [(t.shape, t.dtype) for t in self._whole(output)]
        self.before = [0] * len(self.shapes)  # tokens in front of those that count, by tensor

    def ending(self, shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> Structure | None:
        """The same where of each tensor [B, N, ...] the last tokens count, so many that it has one of these shapes.

        None where that cannot be.
        """
        if len(shapes) != len(self.shapes):
            return None
        ending = copy(self)
        ending.shapes, ending.before = list(shapes), []
        for (whole, dtype), (part, expected) in zip(self.shapes, shapes, strict=True):
            is_longer = len(whole) == len(part) > 1 and whole[1] >= part[1]
            if not is_longer or dtype != expected or (whole[0], *whole[2:]) != (part[0], *part[2:]):
                return None
            ending.before.append(whole[1] - part[1])
        return ending

    def tensors(self, output: Any) -> list[torch.Tensor]:
        """The predictions in such a nest, [B, ...]."""
        found = self._whole(output)
        return [t[:, count:] if count else t for t, count in zip(found, self.before, strict=True)]

    def _whole(self, output: Any) -> list[torch.Tensor]:
        if type(output) is tuple and len(output) == 1 and isinstance(output[0], torch.Tensor):
            return list(filter(_is_prediction, output))  # as most denoisers return it: nothing to flatten
        leaves, _ = _flatten(output, self.is_listed)
        return [torch.stack(leaf) if _is_list(leaf) else leaf for leaf in leaves if _is_prediction(leaf)]

    def fill(self, tensors: Iterable[torch.Tensor]) -> Any:
        """The nest with these predictions in it, and zeros for tokens that do not count."""
        given = (
            torch.cat([tensor.new_zeros(len(tensor), count, *tensor.shape[2:]), tensor], dim=1) if count else tensor
            for tensor, count in zip(tensors, self.before, strict=True)
        )
        leaves = []
        for rest, is_predicted, is_list in zip(self._rest, self._predicted, self._lists, strict=True):
            tensor = next(given) if is_predicted else None
            leaves.append(rest if tensor is None else list(tensor) if is_list else tensor)
        return pytree.tree_unflatten(leaves, self._spec)


def _is_prediction(leaf: Any) -> bool:
    if _is_list(leaf):
        return bool(leaf) and all(map(_is_prediction, leaf)) and len({t.shape for t in leaf}) == 1
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim > 0
