"""Transformers that are a list of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .anatomy import Activation, Anatomy, Boundary, Inputs, SequenceParts, Unit
from .cuts import Region


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
