"""Stages as data, found from the structure of the denoiser and balanced by cost: counted FLOPs or measured time.

A denoiser is read as a list of *units* (a patch embedding, a resnet, an attention, a transformer block ...) that are
run in order on an activation. A *stage* is what one rank evaluates of the network; it has one *segment* (a run of
units) or, in a U-Net, two. Two shapes, here with three stages:

    MMDiT   stage 0  [front]                     U-Net   stage 0                [inner]
                         \\ 1                                               0 /         \\ 1
            stage 1       [middle]                       stage 1         [down]            [up]
                                 \\ 1                                 0 /                      \\ 1
            stage 2               [back] -> pred         stage 2  [down]                        [up] -> pred

The number on an edge is the **age in steps of the boundary** that crosses there, on a PIPELINED step:

* MMDiT: each stage of step i reads the boundary (image and text tokens) that the stage before made on step i-1: age 1.
* U-Net: the stages are nested. A down part of step i reads the features that the next outer stage made on step i: age
  0. An up part of step i reads what the next inner stage made on step i-1: age 1. A stage's skips are its own, of step
  i. Sending the features costs nothing on the critical path: it skews the stages (each begins a step when the next
  outer one has made its down part), and by as much later is its result needed. It makes the boundary a step fresher
  than waiting for them a step would, and spares the inner stages a second evaluation of the outer down parts (two
  stages, counted for SDXL at 1024 px: 10% of a forward's FLOPs, against 1.3 MB in fp16).
* On the first PIPELINED step after a FULL one, the age-1 boundaries are those that the cond branch made there.
* SKIPPED steps make no boundary: it is as many steps older as they are. Where the guidance rule extrapolates, a stage
  reads the straight line through its last two boundaries, at its own time.

With more than two stages, a branch has several ranks, and on a FULL step each of them evaluates two neighbouring stages
(2r and 2r + 1) of its branch: between those two nothing is old, and between ranks the ages are as above, counted in
FULL steps.

The nesting of a U-Net is cut where an inner region reads inner skips only, so that one tensor crosses each way.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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
        boundary = self.boundary(self.run(activation))
        skips = activation.skips[:-1] if self.pops else activation.skips
        return activation._replace(boundary=boundary, skips=(*skips, boundary[0]) if self.pushes else skips)


class Segment(NamedTuple):
    """Units ``start`` up to ``stop`` of ``stage``, reading a boundary that is ``age`` steps old (0 for the first)."""

    start: int
    stop: int
    stage: int
    age: int


class Region(NamedTuple):
    """Units ``start`` up to ``stop``, which need of the units before them their boundary only."""

    start: int
    stop: int


Shape = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Partition:
    """The segments of a PIPELINED step in forward order, and the FLOPs of each stage's share.

    The last segment is of the last stage, and ends in the prediction.
    """

    segments: tuple[Segment, ...]
    flops: tuple[int, ...]
    shapes: tuple[tuple[Shape, ...], ...]  # of the boundary after each unit
    prediction: Shape

    @property
    def cut(self) -> int:
        """Index of the unit whose boundary the last segment reads, one step old."""
        return self.segments[-1].start - 1


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


#: Slower shares of a partition, as measured, that are no reason to choose it.
ALIKE = 0.02


class _Found(NamedTuple):
    """What was found of a denoiser so far, by the shapes and dtypes of its inputs and the shards of its tokens."""

    partitions: dict[Any, Partition]
    counts: dict[Any, tuple[list[int], tuple[tuple[Shape, ...], ...], Shape]]
    seconds: dict[Any, tuple[float, ...] | None]


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
        self.shards = 1  # of the image tokens; a unit then works on one (`sequence`)
        self._found = _FOUND.setdefault(denoiser, _Found({}, {}, {}))

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
            self._found.partitions[key] = Partition(_segments(nest), tuple(shares), shapes, prediction)
        return self._found.partitions[key]

    def seconds(self, inputs: Inputs, clock: Clock) -> tuple[float, ...] | None:
        """What each unit takes by a clock; None where it cannot tell. Cached by the inputs' shapes and dtypes."""
        kind = self._kind(inputs)
        if kind not in self._found.seconds:
            self._found.seconds[kind] = clock(partial(self.walk, inputs))
        return self._found.seconds[kind]

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
        costs: list[Sequence[float]] = [flops] if seconds is None else [seconds, flops]
        before = [[0, *itertools.accumulate(cost)] for cost in costs]
        limits = [math.inf] * len(costs)  # of a stage, for each kind of cost
        ends = {0, *(i for i, unit in enumerate(self.units, start=1) if unit.splits_after)}
        regions = [region for region in self._regions() if ends.issuperset(region)]
        whole = Region(0, len(self.units))

        def size(region: Region) -> int:
            return sum(shape.numel() for end in region if end for shape, _ in shapes[end - 1])

        def best(aim: Callable[[_Nest], float]) -> _Nest:
            """The nest of the least ``aim`` whose stages cost no more than the limits each."""

            @cache
            def within(outer: Region, stages: int) -> _Nest | None:
                whole_costs = [sums[outer.stop] - sums[outer.start] for sums in before]
                if stages == 1:
                    return _Nest(tuple(whole_costs), 0, (outer,)) if _fits(whole_costs, limits) else None
                found = []
                for region in regions:
                    if not _is_inside(region, outer):
                        continue
                    shares = [
                        cost - sums[region.stop] + sums[region.start]
                        for cost, sums in zip(whole_costs, before, strict=True)
                    ]
                    if _fits(shares, limits) and (nest := within(region, stages - 1)):
                        largest = tuple(map(max, nest.largest, shares))
                        found.append(_Nest(largest, nest.size + size(region), (*nest.regions, outer)))
                return min(found, key=aim, default=None)

            nest = within(whole, stages)
            if nest is None:
                raise ValueError(
                    f"stages={stages} (--hybrid_stages): this {type(self.denoiser).__name__} is too shallow to be cut "
                    f"into {stages} stages: lower it."
                )
            return nest

        for i, cost in enumerate(costs):
            largest = best(lambda nest, i=i: nest.largest[i]).largest[i]  # type: ignore[misc]
            limits[i] = largest * (1 + ALIKE) if cost is seconds else largest
        return best(lambda nest: nest.size).regions

    def _count(self, inputs: Inputs) -> tuple[list[int], tuple[tuple[Shape, ...], ...], Shape]:
        """FLOPs of each unit, the shapes of the boundary after it, and the prediction's.

        By a run on fake tensors (no memory, no GPU).

        The modules' own forward hooks see those too. Attention is counted in its plain form, because the fused kernels
        that PyTorch chooses by device are not all counted: this must not depend on the device.
        """
        flops, shapes = [], []
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        counter = FlopCounterMode(display=False)
        plain = torch.compiler.set_stance("force_eager")  # compiled blocks are counted as they are
        with torch.no_grad(), plain, fakes, counter, sdpa_kernel(SDPBackend.MATH), self.lora_scale(inputs) as inputs:
            activation = self.start(map_tensors(fakes.from_tensor, inputs))
            for unit in self.units:
                before = counter.get_total_flops()
                activation = unit(activation)
                flops.append(counter.get_total_flops() - before)
                shapes.append(tuple((t.shape, t.dtype) for t in activation.boundary))
            prediction = self.prediction(activation)
        return flops, tuple(shapes), (prediction.shape, prediction.dtype)


class MMDiT(Anatomy):
    """SD3-type multimodal diffusion transformer (diffusers `SD3Transformer2DModel`)."""

    family = "mmdit"
    understood = frozenset({"hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
                            "joint_attention_kwargs", "return_dict"})  # fmt: skip
    attention_kwargs = "joint_attention_kwargs"
    parts = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks", "norm_out", "proj_out")
    block_classes = frozenset({"JointTransformerBlock"})

    @staticmethod
    def _blocks(denoiser: Any) -> Iterable[nn.Module]:
        return denoiser.transformer_blocks

    def check_inputs(self, inputs: Inputs) -> None:
        super().check_inputs(inputs)
        if "ip_adapter_image_embeds" in (inputs.get("joint_attention_kwargs") or {}):
            raise ValueError("hybrid-cond cannot split an SD3 IP-Adapter: use --hybrid_kinds FS, or unload it.")

    def sequence_parts(self) -> SequenceParts:
        model: Any = self.denoiser
        blocks = [(block.attn, getattr(block, "attn2", None)) for block in model.transformer_blocks]
        return SequenceParts(model.pos_embed, model.proj_out, [attn for pair in blocks for attn in pair if attn])

    def _units(self) -> Iterator[Unit]:
        model: Any = self.denoiser

        def embed(x: Activation) -> Boundary:
            latent, text = x.boundary
            return model.pos_embed(latent).contiguous(), model.context_embedder(text)

        # The embedding makes two tensors from two modules: no stage ends there.
        yield Unit("pos_embed", model.pos_embed, embed, tuple, splits_after=False)
        for i, block in enumerate(model.transformer_blocks):

            def run(x: Activation, block: nn.Module = block) -> Any:
                image, text = x.boundary  # [B, N, C], [B, S, C]
                return block(hidden_states=image, encoder_hidden_states=text, **x.conditioning["block"])

            # A block returns (text, image); the last one has no text left.
            yield Unit(f"transformer_blocks.{i}", block, run, lambda out: tuple(t for t in out[::-1] if t is not None))

        def out(x: Activation) -> torch.Tensor:
            return model.proj_out(model.norm_out(x.boundary[0], x.conditioning["block"]["temb"]))

        yield Unit("proj_out", model.proj_out, out, lambda out: (out,))

    def start(self, inputs: Inputs) -> Activation:
        model: Any = self.denoiser
        latent = inputs["hidden_states"]
        return Activation(
            boundary=(latent, inputs["encoder_hidden_states"]),
            conditioning={
                "size": latent.shape[-2:],
                "block": {
                    "temb": model.time_text_embed(inputs["timestep"], inputs["pooled_projections"]),
                    "joint_attention_kwargs": inputs.get("joint_attention_kwargs"),
                },
            },
        )

    def prediction(self, activation: Activation) -> torch.Tensor:
        (tokens,) = activation.boundary  # [B, h * w, p * p * C]
        model: Any = self.denoiser
        p = model.config.patch_size
        h, w = (side // p for side in activation.conditioning["size"])
        pred = tokens.reshape(tokens.shape[0], h, w, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", pred).reshape(tokens.shape[0], -1, h * p, w * p)

    def _regions(self) -> Iterator[Region]:
        for stop in range(1, len(self.units)):
            yield Region(0, stop)


class UNet(Anatomy):
    """Stable Diffusion's U-Net (diffusers `UNet2DConditionModel` of SDXL and SD 1.5/2.1)."""

    family = "unet"
    understood = frozenset({"sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond",
                            "cross_attention_kwargs", "added_cond_kwargs", "return_dict"})  # fmt: skip
    attention_kwargs = "cross_attention_kwargs"
    parts = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out", "get_time_embed", "get_aug_embed")
    block_classes = frozenset({"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn",
                               "UpBlock2D", "CrossAttnUpBlock2D"})  # fmt: skip

    @staticmethod
    def _blocks(denoiser: Any) -> Iterable[nn.Module]:
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]

    def check_inputs(self, inputs: Inputs) -> None:
        super().check_inputs(inputs)
        if "gligen" in (inputs.get("cross_attention_kwargs") or {}):
            raise ValueError("hybrid-cond cannot split GLIGEN: use --hybrid_kinds FS, or the plain pipeline.")
        model: Any = self.denoiser
        if any(getattr(block, "s1", None) for block in model.up_blocks):
            raise ValueError("hybrid-cond cannot split FreeU: use --hybrid_kinds FS, or pipe.disable_freeu().")

    def _units(self) -> Iterator[Unit]:
        model: Any = self.denoiser

        def simple(name: str, module: nn.Module, *, splits_after: bool = True, **flags: bool) -> Unit:
            return Unit(name, module, lambda x: module(x.boundary[0]), _alone, splits_after=splits_after, **flags)

        def resnet(name: str, module: nn.Module, pops: bool = False, **flags: bool) -> Unit:
            def run(x: Activation) -> Any:
                (hidden,) = x.boundary
                if pops:
                    hidden = torch.cat([hidden, x.skips[-1]], dim=1)
                return module(hidden, x.conditioning["temb"])

            return Unit(name, module, run, _alone, pops=pops, **flags)

        def attention(name: str, module: nn.Module, **flags: bool) -> Unit:
            def run(x: Activation) -> Any:
                return module(x.boundary[0], return_dict=False, **x.conditioning["attention"])

            return Unit(name, module, run, tuple, **flags)

        yield simple("conv_in", model.conv_in, pushes=True)
        for i, block in enumerate(model.down_blocks):
            name = f"down_blocks.{i}"
            for j, (res, attn) in enumerate(_pairs(block)):
                yield resnet(f"{name}.resnets.{j}", res, pushes=attn is None)
                if attn is not None:
                    yield attention(f"{name}.attentions.{j}", attn, pushes=True)
            for j, down in enumerate(block.downsamplers or ()):
                yield simple(f"{name}.downsamplers.{j}", down, pushes=True)

        def mid(x: Activation) -> Any:
            return model.mid_block(x.boundary[0], x.conditioning["temb"], **x.conditioning["attention"])

        yield Unit("mid_block", model.mid_block, mid, _alone)
        for i, block in enumerate(model.up_blocks):
            name = f"up_blocks.{i}"
            for j, (res, attn) in enumerate(_pairs(block)):
                yield resnet(f"{name}.resnets.{j}", res, pops=True)
                if attn is not None:
                    yield attention(f"{name}.attentions.{j}", attn)
            for j, up in enumerate(block.upsamplers or ()):

                def run(x: Activation, up: nn.Module = up) -> Any:
                    # For sides that are no multiple of the downsampling, the next skip gives the size.
                    size = x.skips[-1].shape[2:] if x.conditioning["odd_size"] else None
                    return up(x.boundary[0], size)

                # The size is the outer part's to know, and before upsampling the boundary is four times smaller.
                yield Unit(f"{name}.upsamplers.{j}", up, run, _alone, splits_after=False)

        def out(x: Activation) -> Any:
            (hidden,) = x.boundary
            if model.conv_norm_out:
                hidden = model.conv_act(model.conv_norm_out(hidden))
            return model.conv_out(hidden)

        yield Unit("conv_out", model.conv_out, out, _alone)

    def start(self, inputs: Inputs) -> Activation:
        model: Any = self.denoiser
        sample, text, added = inputs["sample"], inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs")
        odd_size = any(side % 2**model.num_upsamplers for side in sample.shape[-2:])
        if model.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb = model.time_embedding(model.get_time_embed(sample, inputs["timestep"]), inputs.get("timestep_cond"))
        class_emb = model.get_class_embed(sample, inputs.get("class_labels"))
        if class_emb is not None:
            temb = torch.cat([temb, class_emb], dim=-1) if model.config.class_embeddings_concat else temb + class_emb
        aug_emb = model.get_aug_embed(temb, text, added)
        temb = temb if aug_emb is None else temb + aug_emb
        if model.time_embed_act is not None:
            temb = model.time_embed_act(temb)
        attention = {
            "encoder_hidden_states": model.process_encoder_hidden_states(text, added),
            "cross_attention_kwargs": inputs.get("cross_attention_kwargs"),
        }
        return Activation((sample,), {"temb": temb, "attention": attention, "odd_size": odd_size})

    def prediction(self, activation: Activation) -> torch.Tensor:
        return activation.boundary[0]

    def _regions(self) -> Iterator[Region]:
        # Skips on the stack after each unit. A region may read only what it pushed itself: the stack is as high after
        # it as before it, and never lower in between.
        height = list(itertools.accumulate(unit.pushes - unit.pops for unit in self.units))
        for start in range(1, len(self.units)):
            base = height[start - 1]
            for stop in range(start + 1, len(self.units)):
                if height[stop - 1] < base:
                    break
                if height[stop - 1] == base:
                    yield Region(start, stop)


def read(denoiser: nn.Module) -> Anatomy:
    """Read a denoiser's structure.

    Raises:
        ValueError: the structure is neither an SD3-type MMDiT's nor a Stable Diffusion U-Net's.
    """
    for anatomy in (MMDiT, UNet):
        if all(hasattr(denoiser, part) for part in anatomy.parts):
            return anatomy(denoiser)
    raise ValueError(
        f"hybrid-cond does not understand the structure of {type(denoiser).__name__}: it splits SD3-type MMDiTs "
        f"({', '.join(MMDiT.parts)}) and Stable Diffusion U-Nets ({', '.join(UNet.parts)}). Use xDiT's --parallel cfg."
    )


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, in the order of ``nn.Module.modules``; one that has two places twice.

    PyTorch's takes the host some milliseconds for a large denoiser, between two steps.
    """
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            yield part
            waiting += reversed(part._modules.values())


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same nest with ``function`` applied to each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (map_tensors(function, item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class _Nest(NamedTuple):
    """Regions one inside the other: the largest cost of a stage (of each kind), the boundaries' size, the regions."""

    largest: tuple[float, ...]
    size: int
    regions: tuple[Region, ...]


def _fits(costs: Sequence[float], limits: Sequence[float]) -> bool:
    return all(cost <= limit for cost, limit in zip(costs, limits, strict=True))


def _is_inside(inner: Region, outer: Region) -> bool:
    """Whether ``outer`` has units after ``inner``, and before it, but where both are a beginning of the network."""
    return inner.stop < outer.stop and (outer.start < inner.start or inner.start == 0)


def _segments(nest: Sequence[Region]) -> tuple[Segment, ...]:
    """What each region of a nest has beyond the one inside it, in forward order."""
    inner = nest[0]
    segments = [Segment(*inner, stage=0, age=0)]
    for stage, outer in enumerate(nest[1:], start=1):
        if outer.start < inner.start:
            segments.insert(0, Segment(outer.start, inner.start, stage, age=0))
        segments.append(Segment(inner.stop, outer.stop, stage, age=1))
        inner = outer
    return tuple(segments)


def _alone(output: torch.Tensor) -> Boundary:
    return (output,)


def _pairs(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The block's resnets, each with the attention that follows it."""
    return itertools.zip_longest(block.resnets, getattr(block, "attentions", ()))
