"""How a pipeline asks for the predictions of a step, learnt from its calls and foretold from then on.

What a call of a denoiser asks for is never taken from a pipeline's attributes. The calls of a step are noted, and from
the second step on the first of them tells the others: each of their arguments equals one of the first call's (or a part
of one), or is the same as on the step before. So all ranks can begin with the first call.

What is foretold is compared with what then comes. Comparing tensors on a GPU would make the host wait, so that what
cannot be told from the objects themselves is compared there, and read with the measurements of the step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..evaluate.calls import Call, Inputs, Structure, is_equal, is_same_memory, kind_of
from ..evaluate.streams import Asked
from ..trees import PLAIN


class _Same(NamedTuple):
    """A leaf that equals the first call's leaf of this number, or one of ``of`` parts of it."""

    leaf: int
    part: int = 0
    of: int = 1


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
    if isinstance(first, torch.Tensor) and isinstance(leaf, torch.Tensor) and leaf.ndim and first.ndim == leaf.ndim:
        count = len(first) // max(1, len(leaf))
        if count > 1 and len(first) == count * len(leaf):
            for index, piece in enumerate(first.chunk(count)):
                if is_equal(piece, leaf):
                    return _Same(number, index, count)
    return _Own(leaf)


def _take(leaves: list[Any], rule: _Same) -> Any:
    leaf = leaves[rule.leaf]
    return leaf if rule.of == 1 else leaf.chunk(rule.of)[rule.part]


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

    kind: Hashable
    owners: tuple[int, ...] | None
    structures: list[Structure]
    template: Template | None
    may_deal: bool

    @property
    def count(self) -> int:
        """Streams that it asks for."""
        return len(self.structures)


class Pattern:
    """The calls of a step, as the last one was made.

    Args:
        slots: in order of the calls.
        is_foretold: whether the first call tells the others, so that all streams are evaluated at once.
        is_estimable: whether the streams are of the run's latents, so that estimates can stand for them.
    """

    def __init__(self, slots: list[Slot], is_foretold: bool, is_estimable: bool) -> None:
        self.slots, self.is_foretold, self.is_estimable = slots, is_foretold, is_estimable
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

    def foretell(self, first: Call) -> list[Asked]:
        """The calls of a step, from the first of them."""
        return self.ask([slot.template.foretell(first) if slot.template else first for slot in self.slots])

    def ask(self, calls: Sequence[Call]) -> list[Asked]:
        """The calls of a step, each as it is dealt out."""
        return [Asked(call, slot.count, slot.owners) for call, slot in zip(calls, self.slots, strict=True)]

    def bare(self) -> Pattern:
        """The same without what belongs to a run, which would be kept alive."""
        slots = [replace(slot, template=None) for slot in self.slots]
        return Pattern(slots, self.is_foretold, self.is_estimable)

    def load(self, ranks: int) -> int:
        """Streams that the busiest of the ranks evaluates on a FULL step."""
        loads = [
            sum(slot.owners.count(rank) if slot.owners else slot.count for slot in self.slots) for rank in range(ranks)
        ]
        return max(loads)
