"""What is measured: a denoiser of a real size with random weights, a resolution, a number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)

from hybridiff_xdit.denoisers import SD3_MEDIUM, SD35_LARGE, SDXL, build

SDXL_TINY = {
    **SDXL,
    "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
}
SD3_TINY = {**SD3_MEDIUM, "num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128}


@dataclass(frozen=True)
class Scenario:
    """One model at one size.

    Attributes:
        family: ``unet`` or ``mmdit``.
        settings: of the denoiser.
        side: of the square picture, pixels; latents are an eighth.
        guidance_scale: w.
    """

    family: str
    settings: dict[str, Any]
    side: int
    guidance_scale: float

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        """A pipeline with this denoiser, the same random weights on every rank, and no text encoders or VAE."""
        torch.manual_seed(0)
        with device:
            denoiser = build(self.settings)
        none = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
        if self.family == "mmdit":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            pipe = StableDiffusion3Pipeline(transformer=denoiser.to(dtype), scheduler=scheduler, vae=None, **none)
        else:
            scheduler = DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
            )
            none = {name: part for name, part in none.items() if not name.endswith("_3")}
            pipe = StableDiffusionXLPipeline(
                unet=denoiser.to(dtype), scheduler=scheduler, vae=None, add_watermarker=False, **none
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the pipeline's call: latents out, so that the denoising loop alone is timed."""
        generator = torch.Generator().manual_seed(1)
        tokens, width, pooled = (333, 4096, 2048) if self.family == "mmdit" else (77, 2048, 1280)

        def embeds(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        return dict(
            prompt_embeds=embeds(1, tokens, width),
            negative_prompt_embeds=embeds(1, tokens, width),
            pooled_prompt_embeds=embeds(1, pooled),
            negative_pooled_prompt_embeds=embeds(1, pooled),
            guidance_scale=self.guidance_scale,
            height=self.side,
            width=self.side,
            output_type="latent",
        )


SCENARIOS = {
    "sdxl-1024": Scenario("unet", SDXL, 1024, 5.0),
    "sdxl-2048": Scenario("unet", SDXL, 2048, 5.0),
    "sdxl-2560": Scenario("unet", SDXL, 2560, 5.0),
    "sd3-medium-1024": Scenario("mmdit", SD3_MEDIUM, 1024, 7.0),
    "sd3-medium-2048": Scenario("mmdit", SD3_MEDIUM, 2048, 7.0),
    "sd3.5-large-1024": Scenario("mmdit", SD35_LARGE, 1024, 3.5),
    "sdxl-tiny": Scenario("unet", SDXL_TINY, 128, 5.0),
    "sd3-tiny": Scenario("mmdit", SD3_TINY, 128, 7.0),
}
