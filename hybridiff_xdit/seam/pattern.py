"""How a pipeline asks for the predictions of a step, learnt from its calls and foretold from then on.

What a call of a denoiser asks for is never taken from a pipeline's attributes. The calls of a step are noted, and from
the second step on the first of them tells the others: each of their arguments equals one of the first call's (or a part
of one), or is the same as on the step before. So all ranks can begin with the first call.

What is foretold is compared with what then comes. Comparing tensors on a GPU would make the host wait, so that what
cannot be told from the objects themselves is compared there, and read with the measurements of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..evaluate.calls import Call, Inputs, Structure, is_equal, is_same_memory, kind_of
from ..evaluate.streams import Asked
from ..trees import PLAIN


class _Same(NamedTuple):
    """A leaf that equals the first call's leaf of this number, or ``length`` of it from ``start`` along a dimension."""

    leaf: int
    dim: int = 0
    start: int = 0
    length: int | None = None


class _Own(NamedTuple):
    """A leaf of the call's own, which is the same on every step."""

    value: Any


class Template:
    """How the arguments of a later call of a step follow from the first call's.

    Args:
        first: the first call of a step.
        later: a later one of the same step. Values are compared: on a GPU the host waits.
    """

    def __init__(self, first: Call, later: Call) -> None:
        self._call = replace(later, inputs={})
        self.is_foretold = True
        names, leaves = _named_leaves(first.inputs)
        own_names, own_leaves = _named_leaves(later.inputs)
        self._spec = pytree.tree_structure(later.inputs)
        numbers = {name: number for number, name in enumerate(names)}
        self._rules: list[_Same | _Own] = []
        for name, leaf in zip(own_names, own_leaves, strict=True):
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                self.is_foretold = False  # an object that a call may change, such as a cache of keys and values
            number = numbers.get(name)
            self._rules.append(_Own(leaf) if number is None else _rule(leaves[number], leaf, number))

    def foretell(self, first: Call) -> Call:
        """The call, from the first one of its step."""
        leaves, _ = first.flat
        found = [rule.value if isinstance(rule, _Own) else _take(leaves, rule) for rule in self._rules]
        call = replace(self._call, inputs=pytree.tree_unflatten(found, self._spec))
        vars(call)["flat"] = found, self._spec  # it will be compared with what then comes
        return call


def _rule(first: Any, leaf: Any, number: int) -> _Same | _Own:
    if is_equal(first, leaf):
        return _Same(number)
    if isinstance(first, torch.Tensor) and isinstance(leaf, torch.Tensor):
        for place in _places(first.shape, leaf.shape):
            if is_equal(first.narrow(*place), leaf):
                return _Same(number, *place)
    return _Own(leaf)


def _places(whole: torch.Size, part: torch.Size) -> list[tuple[int, int, int]]:
    """Where such a part is looked for, (dimension, start, length): a part of a batch, or the first or last tokens."""
    differing = [dim for dim, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b]
    if len(whole) != len(part) or len(differing) != 1:
        return []
    (dim,) = differing
    size, length = whole[dim], part[dim]
    if not 0 < length < size or (dim == 0 and size % length):
        return []
    return [(dim, start, length) for start in (range(0, size, length) if dim == 0 else (0, size - length))]


def _take(leaves: list[Any], rule: _Same) -> Any:
    leaf = leaves[rule.leaf]
    # In one piece, as the pipeline's own: what evaluates it may depend on how it lies in memory.
    return leaf if rule.length is None else leaf.narrow(rule.dim, rule.start, rule.length).contiguous()


def compare(foretold: Call, actual: Call, pending: list[torch.Tensor], waits: bool) -> bool:
    """Whether a call is the one that was foretold.

    Args:
        pending: where tensors of the same shape are to be compared on a GPU, whether they differ is added here (0-d
            bool), and they are taken for equal.
        waits: the host waits for such comparisons instead.
    """
    if foretold.denoiser is not actual.denoiser or foretold.context != actual.context:
        return False
    (expected, spec), (found, actual_spec) = foretold.flat, actual.flat
    if spec != actual_spec:
        return False
    late = []
    for one, other in zip(expected, found, strict=True):
        if one is other:
            continue
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.is_cuda and not waits:
            if kind_of(one) != kind_of(other):
                return False
            if not is_same_memory(one, other):
                late.append((one != other).any())
        elif not is_equal(one, other):
            return False
    pending += late
    return True


def _named_leaves(inputs: Inputs) -> tuple[list[str], list[Any]]:
    paths, _ = pytree.tree_flatten_with_path(inputs)
    return [pytree.keystr(path) for path, _ in paths], [leaf for _, leaf in paths]


@dataclass(frozen=True)
class Slot:
    """One call of a step, as it was learnt.

    Attributes:
        kind: of the call (`Call.kind`).
        owners: rank of each stream that it asks for; None where every rank evaluates it whole.
        structures: of what each stream's evaluation returns.
        template: how its arguments follow from the first call's; None for the first.
        may_deal: whether its streams may be evaluated apart.
    """

    kind: Any
    owners: tuple[int, ...] | None
    structures: list[Structure]
    template: Template | None
    may_deal: bool

    @property
    def count(self) -> int:
        """Streams that it asks for."""
        return len(self.structures)


def _size(shapes: Sequence[tuple[torch.Size, torch.dtype]]) -> int:
    return sum(shape.numel() for shape, _ in shapes)


class Pattern:
    """The calls of a step, as the last one was made.

    Args:
        slots: in order of the calls.
        is_foretold: whether the first call tells the others, so that all streams are evaluated at once.
        is_of_latents: whether the streams are of the run's latents.
    """

    def __init__(self, slots: list[Slot], is_foretold: bool, is_of_latents: bool) -> None:
        self.slots, self.is_foretold, self.is_of_latents = slots, is_foretold, is_of_latents
        self.is_verified = False  # whether a step has been as foretold
        self.has_exchanged = False  # whether the ranks have exchanged such a step

    @property
    def structures_by_call(self) -> list[list[Structure]]:
        """Of the streams, by call and part."""
        return [slot.structures for slot in self.slots]

    @property
    def structures(self) -> list[Structure]:
        """Of all streams."""
        return list(chain(*self.structures_by_call))

    @property
    def count(self) -> int:
        """Streams of a step."""
        return len(self.structures)

    @property
    def is_alike(self) -> bool:
        """Whether the streams are of one size."""
        first, *others = (structure.shapes for structure in self.structures)
        return all(other == first for other in others)

    @cached_property
    def estimated(self) -> list[Structure] | None:
        """Of all streams, what estimates are made of, which are made of how streams differ; None where that cannot be.

        Of streams with more tokens than others it is the last ones. (Ideogram 4's cond has places for the text, in
        front, and its uncond has none.) What the pipeline hands its scheduler tells whether that is so.
        """
        least = min((structure.shapes for structure in self.structures), key=_size)
        found = [structure.ending(least) for structure in self.structures]
        alike = [structure for structure in found if structure is not None]
        return alike if len(alike) == len(found) else None

    @cached_property
    def is_estimable(self) -> bool:
        """Whether estimates can stand for the streams."""
        return self.is_foretold and self.is_of_latents and self.estimated is not None

    def foretell(self, first: Call) -> list[Asked]:
        """The calls of a step, from the first of them."""
        return self.ask([slot.template.foretell(first) if slot.template else first for slot in self.slots])

    def ask(self, calls: Sequence[Call]) -> list[Asked]:
        """The calls of a step, each as it is dealt out."""
        return [Asked(call, slot.count, slot.owners) for call, slot in zip(calls, self.slots, strict=True)]

    def bare(self) -> Pattern:
        """The same without what belongs to a run, which would be kept alive."""
        slots = [replace(slot, template=None) for slot in self.slots]
        return Pattern(slots, self.is_foretold, self.is_of_latents)

    def load(self, ranks: int) -> int:
        """Streams that the busiest of the ranks evaluates on a FULL step."""
        loads = [
            sum(slot.owners.count(rank) if slot.owners else slot.count for slot in self.slots) for rank in range(ranks)
        ]
        return max(loads)
