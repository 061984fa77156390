"""Denoisers by their configuration alone: random weights, or none on the meta device; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Settings = dict[str, Any]

#: Configurations of the published checkpoints, as in their ``config.json``.
SDXL: Settings = dict(
    _class_name="UNet2DConditionModel",
    sample_size=128,
    in_channels=4,
    out_channels=4,
    layers_per_block=2,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=6 * 256 + 1280,
    use_linear_projection=True,
)
SD3_MEDIUM: Settings = dict(
    _class_name="SD3Transformer2DModel",
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    caption_projection_dim=1536,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)
SD35_MEDIUM: Settings = {
    **SD3_MEDIUM,
    "dual_attention_layers": tuple(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
SD35_LARGE: Settings = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}

#: Text tokens that the pipelines hand a U-Net (CLIP's), and an MMDiT (CLIP's and 256 of T5's).
_CLIP_TOKENS, _T5_TOKENS = 77, 256


def build(settings: Settings) -> nn.Module:
    """A denoiser with random weights, on the current device; on ``torch.device("meta")`` with none."""
    import diffusers  # here, because who only reads flags needs its settings but not the classes

    denoiser: nn.Module = getattr(diffusers, settings["_class_name"]).from_config(settings)
    return denoiser.eval()


def branch_inputs(settings: Settings, height: int, width: int, batch: int = 1, **options: Any) -> dict[str, Any]:
    """Arguments of a denoiser's forward for one branch, zeros.

    Args:
        settings: of the denoiser.
        height: of the latents; so too ``width``.
        batch: pictures.
        options: dtype and device of the tensors.
    """

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(batch, *shape, **options)

    latents = zeros(settings["in_channels"], height, width)
    if settings["_class_name"] == "SD3Transformer2DModel":
        return {
            "hidden_states": latents,
            "timestep": zeros(),
            "encoder_hidden_states": zeros(_CLIP_TOKENS + _T5_TOKENS, settings["joint_attention_dim"]),
            "pooled_projections": zeros(settings["pooled_projection_dim"]),
            "return_dict": False,
        }
    inputs = {
        "sample": latents,
        "timestep": zeros(),
        "encoder_hidden_states": zeros(_CLIP_TOKENS, settings["cross_attention_dim"]),
        "return_dict": False,
    }
    if settings.get("addition_embed_type") == "text_time":  # SDXL: 6 sizes and crops, and the pooled prompt
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return inputs
