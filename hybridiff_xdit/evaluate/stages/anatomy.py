"""A denoiser read as units, and what the families of denoisers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...trees import map_tensors, modules_of, tensors_of
from ..calls import Call, Structure, part
from .cuts import Partition, Region, Shape, best_nest, segments_of

Boundary = tuple[torch.Tensor, ...]
Inputs = dict[str, Any]
Clock = Callable[[Callable[[Callable[[], None]], None]], tuple[float, ...] | None]  # `graphs.seconds_between`


class Activation(NamedTuple):
    """What flows through the units: the boundary so far, the step's conditioning, and the skips, last one last."""

    boundary: Boundary
    conditioning: dict[str, Any]
    skips: tuple[torch.Tensor, ...] = ()


class Unit(NamedTuple):
    """One piece of the denoiser.

    Attributes:
        name: qualified name of `module` in the denoiser.
        module: the piece's module; its output gives the boundary after the unit.
        run: evaluates the module on an activation and returns its raw output.
        boundary: the boundary after the unit, from the module's raw output.
        pushes: the result is a skip for a later unit.
        pops: the last skip is an input, and no longer needed.
        splits_after: a stage may end here.
    """

    name: str
    module: nn.Module
    run: Callable[[Activation], Any]
    boundary: Callable[[Any], Boundary]
    pushes: bool = False
    pops: bool = False
    splits_after: bool = True

    def __call__(self, activation: Activation) -> Activation:
        return self.after(activation, self.boundary(self.run(activation)))

    def after(self, activation: Activation, boundary: Boundary) -> Activation:
        """The activation after the unit, whose evaluation has left this boundary."""
        skips = activation.skips[:-1] if self.pops else activation.skips
        return activation._replace(boundary=boundary, skips=(*skips, boundary[0]) if self.pushes else skips)


class SequenceParts(NamedTuple):
    """Where a denoiser's image tokens begin and end, and the attentions in between.

    Attributes:
        embed: its output is all image tokens, [B, N, C].
        project: its output, of a shard, becomes the prediction of all, [B, N, C].
        attentions: the attention modules.
    """

    embed: nn.Module
    project: nn.Module
    attentions: list[Attention]


class _Found(NamedTuple):
    """What was found of a denoiser so far, by the shapes and dtypes of its inputs and the shards of its tokens."""

    partitions: dict[Any, Partition]
    counts: dict[Any, tuple[list[int], tuple[tuple[Shape, ...], ...], Shape]]
    seconds: dict[Any, tuple[float, ...] | None]
    structures: dict[Any, Structure]


#: It outlives apply and remove.
_FOUND: WeakKeyDictionary[nn.Module, _Found] = WeakKeyDictionary()


class Anatomy(ABC):
    """A denoiser read as units. Subclasses know one family's structure."""

    family: ClassVar[str]
    #: Inputs of the denoiser's forward that the units understand, and the one that holds the LoRA scale.
    understood: ClassVar[frozenset[str]]
    attention_kwargs: ClassVar[str]
    #: Attributes that a denoiser of the family has, and the classes of its blocks.
    parts: ClassVar[tuple[str, ...]]
    block_classes: ClassVar[frozenset[str]]

    def __init__(self, denoiser: nn.Module) -> None:
        if unknown := {type(block).__name__ for block in self._blocks(denoiser)} - self.block_classes:
            raise ValueError(
                f"hybrid-cond does not understand a {type(denoiser).__name__} with {', '.join(sorted(unknown))}: "
                f"it splits those made of {', '.join(sorted(self.block_classes))}. Use xDiT's --parallel cfg."
            )
        self.denoiser = denoiser
        self.units = tuple(self._units())
        self.shards = 1  # of the image tokens; a unit then works on one (`tokens`)
        self._found = _FOUND.setdefault(denoiser, _Found({}, {}, {}, {}))

    @staticmethod
    @abstractmethod
    def _blocks(denoiser: Any) -> Iterable[nn.Module]: ...

    @abstractmethod
    def _units(self) -> Iterator[Unit]: ...

    @abstractmethod
    def start(self, inputs: Inputs) -> Activation:
        """The activation before the first unit, from one branch's forward arguments (batch B)."""

    @abstractmethod
    def prediction(self, activation: Activation) -> torch.Tensor:
        """The denoiser's output from the activation after the last unit, [B, C, H, W]."""

    @abstractmethod
    def _regions(self) -> Iterator[Region]:
        """What the stages below a cut may be: each such region, without the whole."""

    def sequence_parts(self) -> SequenceParts:
        """What sequence parallelism splits.

        Raises:
            ValueError: the denoiser works on no sequence.
        """
        raise ValueError(
            f"hybrid-cond: a {type(self.denoiser).__name__} has no sequence to split: drop --ulysses_degree and "
            "--ring_degree."
        )

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse what the units cannot evaluate, before a run begins.

        Raises:
            ValueError: an input such as a ControlNet residual is given.
        """
        for name, value in inputs.items():
            if value is not None and name not in self.understood:
                raise ValueError(
                    f"hybrid-cond cannot split a {type(self.denoiser).__name__} that is called with {name}=: "
                    "use --hybrid_kinds FS or --hybrid_policy cfg, or the pipeline without that feature."
                )

    @contextmanager
    def lora_scale(self, inputs: Inputs) -> Iterator[Inputs]:
        """The inputs without their LoRA scale, which is applied meanwhile (as the denoiser's forward does)."""
        kwargs = dict(inputs.get(self.attention_kwargs) or {})
        scale = kwargs.pop("scale", 1.0)
        if USE_PEFT_BACKEND:
            scale_lora_layers(self.denoiser, scale)
        try:
            yield {**inputs, self.attention_kwargs: kwargs or None}
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self.denoiser, scale)

    def partition(self, inputs: Inputs, stages: int = 2, seconds: tuple[float, ...] | None = None) -> Partition:
        """The best partition for one branch's inputs: the smallest largest share, then the smallest boundaries.

        Cached by the inputs' shapes and dtypes, the shards, and the other arguments.

        Args:
            stages: how many.
            seconds: cost of each unit, as measured; by default it is its FLOPs. Partitions within `ALIKE` of the best
                are then alike, and of those the FLOPs choose: noise seldom does.

        Raises:
            ValueError: there are too few units for so many stages.
        """
        kind = self._kind(inputs)
        key = kind, stages, seconds
        if key not in self._found.partitions:
            if kind not in self._found.counts:
                self._found.counts[kind] = self._count(inputs)
            flops, shapes, prediction = self._found.counts[kind]
            nest = self._nest(stages, flops, seconds, shapes)
            shares = [sum(flops[slice(*region)]) for region in nest]
            shares = [outer - inner for inner, outer in zip([0, *shares], shares, strict=False)]
            self._found.partitions[key] = Partition(segments_of(nest), tuple(shares), shapes, prediction)
        return self._found.partitions[key]

    def seconds(self, inputs: Inputs, clock: Clock) -> tuple[float, ...] | None:
        """What each unit takes by a clock; None where it cannot tell. Cached by the inputs' shapes and dtypes."""
        kind = self._kind(inputs)
        if kind not in self._found.seconds:
            self._found.seconds[kind] = clock(partial(self.walk, inputs))
        return self._found.seconds[kind]

    def structure(self, call: Call) -> Structure:
        """What the denoiser returns of one branch of a batch of both.

        Found by a run on fake tensors, so that no rank evaluates the whole, and cached by the call's kind.
        """
        if call.kind not in self._found.structures:
            fakes = FakeTensorMode(allow_non_fake_inputs=True)
            eager, once = torch.compiler.set_stance("force_eager"), _Tally().once(self.denoiser)
            with torch.no_grad(), eager, fakes, once:
                output = call.evaluate(**map_tensors(fakes.from_tensor, part(call, 0, 2).inputs))
            self._found.structures[call.kind] = Structure(output, call.is_listed)
        return self._found.structures[call.kind]

    def _kind(self, inputs: Inputs) -> Any:
        return self.shards, tuple((t.shape, t.dtype) for t in tensors_of(inputs))

    def walk(self, inputs: Inputs, mark: Callable[[], None]) -> None:
        """Evaluate one branch, unit by unit; ``mark`` is called before the first and after each."""
        with self.lora_scale(inputs) as inputs:
            activation = self.start(inputs)
            mark()
            for unit in self.units:
                activation = unit(activation)
                mark()

    def _nest(
        self,
        stages: int,
        flops: Sequence[int],
        seconds: Sequence[float] | None,
        shapes: Sequence[tuple[Shape, ...]],
    ) -> tuple[Region, ...]:
        """The regions of the first stage, the first two, ... all of them.

        Args:
            flops: of each unit.
            seconds: of each unit, if they are measured.
            shapes: of the boundary after each unit.
        """
        ends = {0, *(i for i, unit in enumerate(self.units, start=1) if unit.splits_after)}
        regions = [region for region in self._regions() if ends.issuperset(region)]
        return best_nest(type(self.denoiser).__name__, regions, stages, flops, seconds, shapes)

    def _count(self, inputs: Inputs) -> tuple[list[int], tuple[tuple[Shape, ...], ...], Shape]:
        """FLOPs of each unit, the shapes of the boundary after it, and the prediction's.

        By a run on fake tensors (no memory, no GPU), in which modules that are alike are evaluated once.

        The modules' own forward hooks see that run too. Attention is counted in its plain form, because the fused
        kernels that PyTorch chooses by device are not all counted: this must not depend on the device.
        """
        flops, shapes = [], []
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        tally = _Tally()
        plain = torch.compiler.set_stance("force_eager")  # compiled blocks are counted as they are
        with (
            torch.no_grad(),
            plain,
            fakes,
            tally.counter,
            tally.once(self.denoiser),
            sdpa_kernel(SDPBackend.MATH),
            self.lora_scale(inputs) as inputs,
        ):
            activation = self.start(map_tensors(fakes.from_tensor, inputs))
            for unit in self.units:
                before = tally.flops
                activation = unit(activation)
                flops.append(tally.flops - before)
                shapes.append(tuple((t.shape, t.dtype) for t in activation.boundary))
            prediction = self.prediction(activation)
        return flops, tuple(shapes), (prediction.shape, prediction.dtype)


class _Tally:
    """FLOPs of a run on fake tensors, in which a module like one that was evaluated before gives what that one gave."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self._skipped = 0
        self._known: dict[Any, tuple[int, Any]] = {}

    @property
    def flops(self) -> int:
        """So far, those that were not counted again included."""
        return self.counter.get_total_flops() + self._skipped

    @contextmanager
    def once(self, denoiser: nn.Module) -> Iterator[None]:
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
