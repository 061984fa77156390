"""What is measured: a denoiser of a real size with random weights, a resolution, a number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from hybridiff_xdit.planner.denoisers import SD3_MEDIUM, SD35_LARGE, SDXL, build
from hybridiff_xdit.seam.hooks import denoiser_of

# Text encoders and VAE of SDXL and SD3: the settings that are not the class's defaults.
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)
T5_XXL = dict(d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    force_upcast=False,  # fp16: SDXL with its mended VAE
)
#: Any tokenizers do: the text encoders' weights are random.
TOKENIZERS = Path(__file__).parent / "models" / "emoji-sd3"

SDXL_TINY = {
    **SDXL,
    "block_out_channels": (32, 32, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
}
SD3_TINY = {**SD3_MEDIUM, "num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128}


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in this dtype: made in another and converted, they leave holes in the GPU's memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Scenario:
    """One model at one size.

    Attributes:
        family: ``unet`` or ``mmdit``.
        settings: of the denoiser.
        side: of the square picture, pixels; latents are an eighth.
        guidance_scale: w.
        is_tiny: whether text encoders and VAE are small too: as wide as the denoiser asks for, but of one layer, and
            with embeddings for the words of `TOKENIZERS` alone.
    """

    family: str
    settings: dict[str, Any]
    side: int
    guidance_scale: float
    is_tiny: bool = False

    def pipeline(
        self, device: torch.device, dtype: torch.dtype, *, whole: bool = False, checkpoint: Path | None = None
    ) -> Any:
        """A pipeline with this denoiser, the same random weights on every rank.

        Args:
            device: where it lies.
            dtype: of its weights.
            whole: with text encoders and VAE, random too.
            checkpoint: a folder in diffusers format, whose weights and scheduler are taken instead.
        """
        torch.manual_seed(0)
        texts = 3 if self.family == "mmdit" else 2
        suffixes = ["", "_2", "_3"][:texts]
        names = [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in suffixes]
        parts: dict[str, Any] = dict.fromkeys([*names, "vae"])
        if checkpoint is not None:
            absent = {} if whole else parts
            pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=dtype, local_files_only=True, **absent)
            pipe.to(device)
        else:
            with device, _made_in(dtype):
                denoiser = build(self.settings).to(dtype)  # its buffers too
                if whole:
                    parts = {**dict(zip(names, self._text(), strict=True)), "vae": self._vae()}
            pipe = self._assembled(denoiser, parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def beside(self, pipe: Any) -> Any:
        """Another pipeline with a copy of the denoiser and the scheduler, and the same text encoders and VAE."""
        name = "transformer" if self.family == "mmdit" else "unet"
        copies = {part: deepcopy(getattr(pipe, part)) for part in (name, "scheduler")}
        another = type(pipe).from_pipe(pipe, **copies, torch_dtype=copies[name].dtype)
        another.set_progress_bar_config(disable=True)
        return another

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call: a prompt, or embeddings and latents out if there is no VAE."""
        size = dict(guidance_scale=self.guidance_scale, height=self.side, width=self.side)
        if pipe.vae is not None:
            return dict(size, prompt="google style emoji of grinning face")
        generator = torch.Generator().manual_seed(1)
        weights = next(denoiser_of(pipe).parameters())
        tokens, width, pooled = (333, 4096, 2048) if self.family == "mmdit" else (77, 2048, 1280)

        def embeds(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(weights)

        return dict(
            size,
            prompt_embeds=embeds(1, tokens, width),
            negative_prompt_embeds=embeds(1, tokens, width),
            pooled_prompt_embeds=embeds(1, pooled),
            negative_pooled_prompt_embeds=embeds(1, pooled),
            output_type="latent",
        )

    def _assembled(self, denoiser: Any, parts: dict[str, Any]) -> Any:
        if self.family == "mmdit":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            return StableDiffusion3Pipeline(transformer=denoiser, scheduler=scheduler, **parts)
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        )
        return StableDiffusionXLPipeline(unet=denoiser, scheduler=scheduler, add_watermarker=False, **parts)

    def _text(self) -> list[Any]:
        """Text encoders, then tokenizers, each in the pipeline's order."""
        with_projection = CLIPTextModelWithProjection
        first = with_projection if self.family == "mmdit" else CLIPTextModel
        clip: dict[str, Any] = {}
        t5: dict[str, Any] = {}
        if self.is_tiny:
            clip = {"num_hidden_layers": 1, "vocab_size": 2517}
            t5 = {"num_layers": 1, "d_ff": 64, "num_heads": 1, "vocab_size": 40}
        encoders: list[Any] = [
            first(CLIPTextConfig(**{**CLIP_L, **clip})),
            with_projection(CLIPTextConfig(**{**CLIP_G, **clip})),
        ]
        tokenizers: list[Any] = [
            CLIPTokenizer.from_pretrained(TOKENIZERS / name, model_max_length=77)
            for name in ("tokenizer", "tokenizer_2")
        ]
        if self.family == "mmdit":
            encoders.append(T5EncoderModel(T5Config(**{**T5_XXL, **t5})))
            tokenizers.append(T5TokenizerFast.from_pretrained(TOKENIZERS / "tokenizer_3"))
        return [*(encoder.eval() for encoder in encoders), *tokenizers]

    def _vae(self) -> AutoencoderKL:
        channels = self.settings["in_channels"]
        own = dict(scaling_factor=1.5305, shift_factor=0.0609) if channels == 16 else dict(scaling_factor=0.13025)
        small = dict(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4) if self.is_tiny else {}
        return AutoencoderKL(latent_channels=channels, **{**VAE, **own, **small}).eval()


SCENARIOS = {
    "sdxl-1024": Scenario("unet", SDXL, 1024, 5.0),
    "sdxl-2048": Scenario("unet", SDXL, 2048, 5.0),
    "sdxl-2560": Scenario("unet", SDXL, 2560, 5.0),
    "sd3-medium-1024": Scenario("mmdit", SD3_MEDIUM, 1024, 7.0),
    "sd3-medium-2048": Scenario("mmdit", SD3_MEDIUM, 2048, 7.0),
    "sd3.5-large-1024": Scenario("mmdit", SD35_LARGE, 1024, 3.5),
    "sdxl-tiny": Scenario("unet", SDXL_TINY, 128, 5.0, is_tiny=True),
    "sd3-tiny": Scenario("mmdit", SD3_TINY, 128, 7.0, is_tiny=True),
}
