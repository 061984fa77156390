"""U-Nets, whose stages are nested."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .anatomy import Activation, Anatomy, Boundary, Inputs, Unit
from .cuts import Region


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


def _alone(output: torch.Tensor) -> Boundary:
    return (output,)


def _pairs(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """The block's resnets, each with the attention that follows it."""
    return itertools.zip_longest(block.resnets, getattr(block, "attentions", ()))
