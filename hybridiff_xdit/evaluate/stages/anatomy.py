"""A denoiser read as units: what is counted of them, where they are cut, and how a run of them is evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ...trees import map_tensors, modules_of, tensors_of
from ..calls import Call, Structure, is_compiled, kind_of
from .cuts import Partition, Region, Segment, Shape, best_nest, segments_of

Boundary = tuple[torch.Tensor, ...]
Inputs = dict[str, Any]
Clock = Callable[[Callable[[Callable[[], None]], None]], tuple[float, ...] | None]  # `graphs.seconds_between`


class Activation(NamedTuple):
    """What is left after a segment: the boundary or the prediction, and in a U-Net what its stage goes on with.

    Attributes:
        boundary: what the next segment reads; after the last one the tensors of the prediction.
        conditioning: of the step.
        skips: the last one last.
    """

    boundary: Boundary
    conditioning: dict[str, Any]
    skips: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What is found of a denoiser that is called with arguments of some kind.

    Attributes:
        flops: of each unit. Where the forward cannot be run on fake tensors: the numbers of its weights.
        shapes: of the boundary after each unit; after the last one, of the prediction.
        structure: of what the denoiser returns.
        again: units before each one that a stage which begins there evaluates too.
        is_fixed: whether all this follows from the kind of the arguments. Else a mask's values may decide on shapes.
    """

    flops: Sequence[int]
    shapes: Sequence[tuple[Shape, ...]]
    structure: Structure
    again: Sequence[frozenset[int]]
    is_fixed: bool = True


class _Found(NamedTuple):
    """What was found of a denoiser so far, by the kind of its arguments and the shards of its tokens."""

    counts: dict[Any, Any]
    partitions: dict[Any, Partition]
    seconds: dict[Any, tuple[float, ...] | None]


#: It outlives apply and remove.
_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


class Anatomy(ABC):
    """A denoiser read as units."""

    #: Whose published constants are its (`schedule.paper`).
    family: str
    #: Whether `differs` has to be asked before steps are split.
    needs_trial: ClassVar[bool]

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser
        self.shards = 1  # of the image tokens; a unit then works on one (`tokens`)
        self._found = _FOUND.setdefault(denoiser, _Found({}, {}, {}))

    @abstractmethod
    def _count(self, call: Call) -> Counted: ...

    @abstractmethod
    def _regions(self, counted: Any) -> Iterator[Region]:
        """What the stages below a cut may be: each such region, without the whole."""

    @abstractmethod
    def names(self, call: Call) -> Sequence[str]:
        """Of the units, the qualified names of their modules."""

    @abstractmethod
    def evaluate(
        self, segment: Segment, call: Call, before: Activation | None, boundary: Boundary | None
    ) -> Activation:
        """The activation after a segment.

        Args:
            call: a branch's.
            before: what this rank's segment before left, on the same step; None if this is its first.
            boundary: what the segment reads; None for the first of the network.
        """

    @abstractmethod
    def watch(self, call: Call, starts: Sequence[int]) -> tuple[Any, list[Boundary]]:
        """What a whole forward returns, and the boundary that it leaves before each of these units."""

    @abstractmethod
    def walk(self, call: Call, mark: Callable[[], None]) -> None:
        """Evaluate a branch; ``mark`` is called before the first unit and after each."""

    def check_inputs(self, call: Call) -> None:  # noqa: B027
        """Refuse what the units cannot evaluate, before a run begins.

        Raises:
            ValueError: an input is given that they do not understand.
        """

    def counted(self, call: Call) -> Any:
        """What is found of a branch's call. Cached by the kind of its arguments."""
        kind = self._kind(call)
        if kind not in self._found.counts:
            self._found.counts[kind] = self._count(call)
        return self._found.counts[kind]

    def recounted(self, call: Call) -> Any:
        """The same when a run begins, found anew where it depends on the values that this run has."""
        if not self.counted(call).is_fixed:
            self._found.counts[self._kind(call)] = self._count(call)
        return self.counted(call)

    def partition(self, call: Call, stages: int = 2, seconds: tuple[float, ...] | None = None) -> Partition:
        """The best partition for a branch's call: the smallest largest share, then the smallest boundaries.

        Args:
            stages: how many.
            seconds: cost of each unit, as measured; by default it is its FLOPs. Partitions within `ALIKE` of the best
                are then alike, and of those the FLOPs choose: noise seldom does.

        Raises:
            ValueError: there are too few units for so many stages.
        """
        key = self._kind(call), stages, seconds
        if key not in self._found.partitions:
            counted = self.counted(call)
            nest = self.nest(counted, stages, counted.flops, seconds)
            shares = [sum(counted.flops[slice(*region)]) for region in nest]
            shares = [outer - inner for inner, outer in zip([0, *shares], shares, strict=False)]
            self._found.partitions[key] = Partition(segments_of(nest), tuple(shares))
        return self._found.partitions[key]

    def nest(
        self, counted: Any, stages: int, flops: Sequence[int], seconds: Sequence[float] | None
    ) -> tuple[Region, ...]:
        """The regions of the first stage, the first two, ... all of them, by these costs of the units."""
        regions = list(self._regions(counted))
        name = type(self.denoiser).__name__
        return best_nest(name, regions, stages, flops, seconds, counted.shapes, counted.again)

    def seconds(self, call: Call, clock: Clock) -> tuple[float, ...] | None:
        """What each unit takes by a clock; None where it cannot tell. Cached by the kind of the arguments."""
        kind = self._kind(call)
        if kind not in self._found.seconds:
            self._found.seconds[kind] = clock(partial(self.walk, call))
        return self._found.seconds[kind]

    def differs(self, call: Call, segments: Sequence[Segment]) -> bool:
        """Whether the segments give other bits than a call's whole forward, anywhere. On a GPU the host waits.

        What blocks hand one another by a state of their own would be there too, but for a call in between that leaves
        another, and since the last segment is evaluated first.
        """
        output, boundaries = self.watch(call, [segment.start for segment in segments[1:]])
        halved = map_tensors(lambda t: t / 2 if t.is_floating_point() else t, call.inputs)
        self.watch(replace(call, inputs=halved), [])
        ends = zip(
            segments, [None, *boundaries], [*boundaries, Structure(output, call.is_listed).tensors(output)], strict=True
        )
        return any(
            not _is_same(one, two)
            for segment, before, after in [*ends][::-1]
            for one, two in zip(after, self.evaluate(segment, call, None, before).boundary, strict=True)
        )

    def _kind(self, call: Call) -> Any:
        leaves, spec = pytree.tree_flatten(call.inputs)
        return self.shards, spec, tuple(map(kind_of, leaves))


def eagerly(call: Call) -> AbstractContextManager[Any]:
    """Meanwhile a denoiser compiled as a whole is evaluated as it is: the compiled one would not ask us."""
    return torch.compiler.set_stance("force_eager") if is_compiled(call.denoiser) else nullcontext()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


class Tally:
    """FLOPs of a run on fake tensors, in which a module like one that was evaluated before gives what that one gave.

    Such a run takes no memory and no GPU. The modules' own forward hooks see it too. Attention is counted in its plain
    form, because the fused kernels that PyTorch chooses by device are not all counted: this must not depend on the
    device.
    """

    def __init__(self) -> None:
        self._counter = FlopCounterMode(display=False)
        self._skipped = 0
        self._known: dict[Any, tuple[int, Any]] = {}

    @property
    def flops(self) -> int:
        """So far, those that were not counted again included."""
        return self._counter.get_total_flops() + self._skipped

    @contextmanager
    def faking(self, denoiser: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        """Meanwhile evaluations are such runs; the inputs for them."""
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        eager = torch.compiler.set_stance("force_eager")  # compiled blocks are counted as they are
        with torch.no_grad(), eager, fakes, self._counter, self._once(denoiser), sdpa_kernel(SDPBackend.MATH):
            yield map_tensors(fakes.from_tensor, inputs)

    @contextmanager
    def _once(self, denoiser: nn.Module) -> Iterator[None]:
        """Meanwhile the modules in the denoiser's lists (blocks, resnets, attentions) are evaluated once of a kind."""
        lists = (part for part in modules_of(denoiser) if isinstance(part, nn.ModuleList))
        members = {id(member): member for found in lists for member in found}.values()
        before = [(vars(member), vars(member).get("forward")) for member in members]
        kinds = [_kind_of(member) for member in members]
        for member, kind in zip(members, kinds, strict=True):
            vars(member)["forward"] = partial(self._look_up, kind, member.forward)
        try:
            yield
        finally:
            for attributes, forward in before:
                if forward is None:
                    del attributes["forward"]
                else:
                    attributes["forward"] = forward

    def _look_up(self, alike: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors_of((args, kwargs))):
            return forward(*args, **kwargs)  # another thread's evaluation
        kind = alike, repr(map_tensors(lambda t: (t.shape, t.dtype, t.stride()), (args, kwargs)))
        if kind in self._known:
            count, output = self._known[kind]
            self._skipped += count
            return output
        before = self.flops
        output = forward(*args, **kwargs)
        self._known[kind] = self.flops - before, output
        return output


def _kind_of(module: nn.Module) -> Any:
    """Equal for modules that do the same with other weights: their classes, constants and the shapes of the weights.

    Of what else a module holds, such as an attention processor, the class.
    """
    plain = bool | int | float | str
    return tuple(
        (
            type(part),
            tuple((name, value if isinstance(value, plain) else type(value)) for name, value in vars(part).items()),
            tuple(weight.shape for weight in part._parameters.values() if weight is not None),
        )
        for part in modules_of(module)
    )
