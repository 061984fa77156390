"""Pipelines with tiny random denoisers and no text encoders: they are called with prompt embeddings."""

import inspect
from functools import cache, partial

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

TOKENS = 7


def vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1 if channels == 16 else None,
    ).eval()


def mmdit(**changes: object) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    settings = dict(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=16,
        pos_embed_max_size=24,
    )
    return SD3Transformer2DModel(**{**settings, **changes}).eval()


def sd3(**changes: object) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=mmdit(**changes),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def unet(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = dict(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=24,
    )
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=unet(
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
        ),
        scheduler=_scheduler(),
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet(
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        ),
        scheduler=_scheduler(),
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES = {"sd3": sd3, "sdxl": sdxl, "sd15": sd15}
VARIANTS = {
    "deep sd3": partial(sd3, num_layers=8),  # enough for eight stages
    "sd35": partial(sd3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
}


def pipeline(name: str, device: str = "cpu") -> DiffusionPipeline:
    """The pipeline ``name``, one for the whole process: whoever changes it changes it back."""
    return _pipeline(name, device)


@cache
def _pipeline(name: str, device: str) -> DiffusionPipeline:
    pipe = {**PIPELINES, **VARIANTS}[name]().to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(name: str, count: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Prompt and negative prompt embeddings for the pipeline ``name``, large enough to matter to random weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"": (count, TOKENS, 24), "pooled_": (count, 20)}
    kinds = ("",) if name == "sd15" else ("", "pooled_")
    return {
        f"{negative}{kind}prompt_embeds": 4 * torch.randn(shape[kind], generator=generator)
        for negative in ("", "negative_")
        for kind in kinds
    }


def noise(name: str, count: int = 1, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    """Initial noise for the pipeline ``name``, [count, C, *size]; it is what `call` starts from."""
    channels = 16 if "sd3" in name else 4
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def call(pipe, name: str, *, count: int = 1, seed: int = 0, **kwargs):
    """Latents of a short run, [B, C, H, W]."""
    settings = dict(num_inference_steps=10, guidance_scale=5.0, height=32, width=32, output_type="latent")
    embeds = {key: tensor.to(pipe.dtype) for key, tensor in prompt(name, count).items()}
    settings.update(embeds, generator=torch.Generator().manual_seed(seed))
    accepted = inspect.signature(type(pipe).__call__).parameters
    given = {key: value for key, value in {**settings, **kwargs}.items() if key in accepted}
    device = pipe._execution_device  # of an offloaded pipeline, another than where its weights are
    return pipe(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}).images
