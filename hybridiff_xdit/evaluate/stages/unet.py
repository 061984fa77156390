"""U-Nets, whose stages are nested."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import nn

from ..calls import Call, Structure
from .anatomy import Activation, Anatomy, Boundary, Counted, Inputs, Tally, eagerly
from .cuts import Region, Segment, Shape


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


class UNet(Anatomy):
    """Stable Diffusion's U-Net (diffusers `UNet2DConditionModel` of SDXL and SD 1.5/2.1)."""

    family = "unet"
    #: Inputs of the denoiser's forward that the units understand.
    understood = frozenset({"sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond",
                            "cross_attention_kwargs", "added_cond_kwargs", "return_dict"})  # fmt: skip
    #: Attributes that a denoiser of the family has, and the classes of its blocks.
    parts = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out", "get_time_embed", "get_aug_embed")
    block_classes = frozenset({"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn",
                               "UpBlock2D", "CrossAttnUpBlock2D"})  # fmt: skip
    needs_trial = False  # a unit's code is ours, and tested bit by bit

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        model: Any = denoiser
        blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
        if unknown := {type(block).__name__ for block in blocks} - self.block_classes:
            raise ValueError(
                f"hybrid-cond does not understand a {type(denoiser).__name__} with {', '.join(sorted(unknown))}: "
                f"it splits those made of {', '.join(sorted(self.block_classes))}. Use xDiT's --parallel cfg."
            )
        self.units = tuple(self._units())

    def check_inputs(self, call: Call) -> None:
        for name, value in call.inputs.items():
            if value is not None and name not in self.understood:
                raise ValueError(
                    f"hybrid-cond cannot split a {type(self.denoiser).__name__} that is called with {name}=: "
                    "use --hybrid_kinds FS or --hybrid_policy cfg, or the pipeline without that feature."
                )
        if "gligen" in (call.inputs.get("cross_attention_kwargs") or {}):
            raise ValueError("hybrid-cond cannot split GLIGEN: use --hybrid_kinds FS, or the plain pipeline.")
        model: Any = self.denoiser
        if any(getattr(block, "s1", None) for block in model.up_blocks):
            raise ValueError("hybrid-cond cannot split FreeU: use --hybrid_kinds FS, or pipe.disable_freeu().")

    def names(self, call: Call) -> Sequence[str]:
        return [unit.name for unit in self.units]

    def evaluate(
        self, segment: Segment, call: Call, before: Activation | None, boundary: Boundary | None
    ) -> Activation:
        with self._lora_scale(call.inputs) as inputs:
            activation = before or self._start(inputs)
            if boundary is not None:
                activation = activation._replace(boundary=boundary)
            for unit in self.units[segment.start : segment.stop]:
                activation = unit(activation)
        return activation

    def watch(self, call: Call, starts: Sequence[int]) -> tuple[Any, list[Boundary]]:
        left: dict[int, Boundary] = {}
        with ExitStack() as stack, eagerly(call):
            for start in starts:
                unit = self.units[start - 1]

                def keep(module: nn.Module, args: Any, output: Any, start: int = start, unit: Unit = unit) -> None:
                    left[start] = unit.boundary(output)

                stack.callback(unit.module.register_forward_hook(keep).remove)
            output = call.evaluate(**call.inputs)
        if len(left) < len(starts):
            raise RuntimeError(
                "hybrid-cond: the denoiser's forward did not call the block that ends a stage as a module, so that no "
                "step can be PIPELINED: use --hybrid_kinds FS."
            )
        return output, [left[start] for start in starts]

    def walk(self, call: Call, mark: Callable[[], None]) -> None:
        with self._lora_scale(call.inputs) as inputs:
            activation = self._start(inputs)
            mark()
            for unit in self.units:
                activation = unit(activation)
                mark()

    def _count(self, call: Call) -> Counted:
        tally = Tally()
        flops: list[int] = []
        shapes: list[tuple[Shape, ...]] = []
        with tally.faking(self.denoiser, call.inputs) as inputs:
            structure = Structure(call.evaluate(**inputs), call.is_listed)
            with self._lora_scale(inputs) as inputs:
                activation = self._start(inputs)
                for unit in self.units:
                    before = tally.flops
                    activation = unit(activation)
                    flops.append(tally.flops - before)
                    shapes.append(tuple((t.shape, t.dtype) for t in activation.boundary))
        return Counted(flops=flops, shapes=shapes, structure=structure, again=[frozenset()] * len(flops))

    @contextmanager
    def _lora_scale(self, inputs: Inputs) -> Iterator[Inputs]:
        """The inputs without their LoRA scale, which is applied meanwhile (as the denoiser's forward does)."""
        kwargs = dict(inputs.get("cross_attention_kwargs") or {})
        scale = kwargs.pop("scale", 1.0)
        if USE_PEFT_BACKEND:
            scale_lora_layers(self.denoiser, scale)
        try:
            yield {**inputs, "cross_attention_kwargs": kwargs or None}
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self.denoiser, scale)

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

    def _start(self, inputs: Inputs) -> Activation:
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

    def _regions(self, counted: Counted) -> Iterator[Region]:
        # Skips on the stack after each unit. A region may read only what it pushed itself: the stack is as high after
        # it as before it, and never lower in between.
        height = list(itertools.accumulate(unit.pushes - unit.pops for unit in self.units))
        ends = [i for i, unit in enumerate(self.units, start=1) if unit.splits_after]
        for start in ends[:-1]:
            base = height[start - 1]
            for stop in range(start + 1, len(self.units)):
                if height[stop - 1] < base:
                    break
                if height[stop - 1] == base and stop in ends:
                    yield Region(start, stop)


def _alone(output: torch.Tensor) -> Boundary:
    return (output,)


def _pairs(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The block's resnets, each with the attention that follows it."""
    return itertools.zip_longest(block.resnets, getattr(block, "attentions", ()))
