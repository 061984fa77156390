"""Pipelines of large guided models, with random weights in bf16: embeddings go in, and latents come out.

There are no text encoders, and no VAE but where a pipeline asks it for its statistics.
"""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from scenarios import SCENARIOS, _made_in

from hybridiff_xdit.seam.hooks import denoiser_of

#: What those that xDiT has a denoiser of its own for are called there.
NAMES_IN_XDIT = {
    "qwen-image": "Qwen-Image",
    "wan-14b": "Wan2.1-T2V",
    "hunyuan-video15": "Hunyuanvideo-1.5",
    "ltx2": "LTX-2",
}

QWEN_TINY: dict[str, Any] = dict(num_layers=4, num_attention_heads=4, attention_head_dim=16, axes_dims_rope=(8, 4, 4))
QWEN_TINY |= dict(joint_attention_dim=32, in_channels=16, out_channels=4)
QWEN_SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
WAN_TINY = dict(num_layers=4, num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32)
Z_TINY: dict[str, Any] = dict(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32)
Z_TINY |= dict(axes_dims=[8, 4, 4], axes_lens=[512, 32, 32])
HUNYUAN_TINY = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1)
HUNYUAN_TINY |= dict(text_embed_dim=32, text_embed_2_dim=8, image_embed_dim=8, rope_axes_dim=(8, 4, 4), target_size=64)
LTX2_TINY = dict(num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, num_layers=2)
LTX2_TINY |= dict(audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16)
WAN_FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

#: xDiT's own denoisers, which split their tokens themselves: module and class.
XDITS = {
    "QwenImageTransformer2DModel": ("transformer_qwen", "xFuserQwenImageTransformerWrapper"),
    "WanTransformer3DModel": ("transformer_wan", "xFuserWanTransformer3DWrapper"),
    "HunyuanVideo15Transformer3DModel": ("transformer_hunyuan_video15", "xFuserHunyuanVideo15Transformer3DWrapper"),
    "LTX2VideoTransformer3DModel": ("transformer_ltx2", "xFuserLTX2VideoTransformer3DWrapper"),
}


def kind(name: str, is_xdit: bool) -> Any:
    """A denoiser's class of diffusers, or what xDiT makes of it."""
    if not is_xdit:
        return getattr(diffusers, name)
    module, own = XDITS[name]
    return getattr(importlib.import_module(f"xfuser.model_executor.models.transformers.{module}"), own)


#: What a pipeline is made without.
ABSENT: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))

Made = tuple[Any, dict[str, Any]]


def qwen_image(is_tiny: bool, is_xdit: bool) -> Made:
    denoiser = kind("QwenImageTransformer2DModel", is_xdit)(**QWEN_TINY if is_tiny else {})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**QWEN_SHIFT)
    pipe = diffusers.QwenImagePipeline(transformer=denoiser, scheduler=scheduler, **ABSENT)
    return pipe, picture(is_tiny) | dict(true_cfg_scale=4.0) | embeds(denoiser.config.joint_attention_dim, 200, 20)


def wan(is_tiny: bool, is_xdit: bool) -> Made:
    denoiser = kind("WanTransformer3DModel", is_xdit)(**WAN_TINY if is_tiny else {})
    scheduler = diffusers.UniPCMultistepScheduler(**WAN_FLOW)
    pipe = diffusers.WanPipeline(transformer=denoiser, scheduler=scheduler, **ABSENT)
    texts = embeds(denoiser.config.text_dim, 512, 512)
    return pipe, video(is_tiny, 480, 832, 81) | dict(guidance_scale=5.0) | texts


def z_image(is_tiny: bool, is_xdit: bool) -> Made:
    denoiser = diffusers.ZImageTransformer2DModel(**Z_TINY if is_tiny else {})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(transformer=denoiser, scheduler=scheduler, **ABSENT)
    texts = {name: [text[0]] for name, text in embeds(denoiser.config.cap_feat_dim, 200, 20).items()}
    return pipe, picture(is_tiny) | dict(guidance_scale=5.0) | texts


def hunyuan_video15(is_tiny: bool, is_xdit: bool) -> Made:
    """Its VAE, which is not used, is small."""
    denoiser = kind("HunyuanVideo15Transformer3DModel", is_xdit)(**HUNYUAN_TINY if is_tiny else {})
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=denoiser.config.out_channels, block_out_channels=(8,) * 5, layers_per_block=1
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    parts = {**ABSENT, "vae": vae, "text_encoder_2": None, "tokenizer_2": None, "guider": guider}
    pipe = diffusers.HunyuanVideo15Pipeline(transformer=denoiser, scheduler=scheduler, **parts)
    arguments: dict[str, Any] = video(is_tiny, 480, 832, 121)
    for suffix, width, tokens in (("", "text_embed_dim", 1000), ("_2", "text_embed_2_dim", 256)):
        texts = embeds(denoiser.config[width], tokens, tokens)
        arguments |= {name + suffix: text for name, text in texts.items()}
        arguments |= {f"{name}_mask{suffix}": torch.ones(1, tokens, dtype=torch.long) for name in texts}
    return pipe, arguments


def ltx2(is_tiny: bool, is_xdit: bool) -> Made:
    """LTX-2 with all its guidance, so four streams a step; its VAEs, which are not used, are small."""
    settings: dict[str, Any] = LTX2_TINY if is_tiny else {}
    denoiser = kind("LTX2VideoTransformer3DModel", is_xdit)(
        **settings, perturbed_attn=True, use_prompt_embeddings=False
    )
    own = denoiser.config
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=1,
        per_modality_projections=True,
        video_hidden_dim=own.cross_attention_dim,
        audio_hidden_dim=own.audio_cross_attention_dim,
        video_connector_num_attention_heads=own.num_attention_heads,
        video_connector_attention_head_dim=own.attention_head_dim,
        audio_connector_num_attention_heads=own.audio_num_attention_heads,
        audio_connector_attention_head_dim=own.audio_attention_head_dim,
        proj_bias=True,
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=own.in_channels,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95)
    parts = dict(vae=vae, audio_vae=audio_vae, connectors=connectors, text_encoder=None, tokenizer=None, vocoder=None)
    pipe = diffusers.LTX2Pipeline(transformer=denoiser, scheduler=scheduler, **parts)
    pipe.to(torch.bfloat16)
    arguments = video(is_tiny, 512, 768, 121) | dict(spatio_temporal_guidance_blocks=[0 if is_tiny else 28])
    given = embeds(32, 1024, 1024)
    masks = {f"{name.removesuffix('embeds')}attention_mask": torch.ones(1, 1024, dtype=torch.long) for name in given}
    return pipe, arguments | given | masks


MAKERS = {
    "qwen-image": qwen_image,
    "wan-14b": wan,
    "z-image": z_image,
    "hunyuan-video15": hunyuan_video15,
    "ltx2": ltx2,
}
#: The tiny one of those that are among `SCENARIOS`.
TINY = {"sd3-medium": "sd3-tiny", "sdxl": "sdxl-tiny", "sd3.5-large": "sd3-tiny"}
MODELS = (*MAKERS, *TINY)


def picture(is_tiny: bool) -> dict[str, Any]:
    return dict.fromkeys(("height", "width"), 128 if is_tiny else 1024)


def video(is_tiny: bool, height: int, width: int, frames: int) -> dict[str, Any]:
    return dict(height=64, width=64, num_frames=9) if is_tiny else dict(height=height, width=width, num_frames=frames)


def embeds(width: int, cond: int, uncond: int) -> dict[str, torch.Tensor]:
    """Random embeddings of so many tokens, on the current device."""
    names = ("prompt_embeds", "negative_prompt_embeds")
    tokens = zip(names, (cond, uncond), strict=True)
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(1)
    return {
        name: torch.randn(1, n, width, generator=generator, device="cpu").to(device, torch.bfloat16)
        for name, n in tokens
    }


def make(model: str, device: torch.device, is_tiny: bool, is_xdit: bool = False) -> tuple[Any, dict[str, Any]]:
    """A model's pipeline, with the same random weights on every rank, and the arguments of its call.

    The classes' defaults are the published configurations.
    """
    torch.manual_seed(0)
    if model in TINY:
        scenario = SCENARIOS[TINY[model] if is_tiny else f"{model}-1024"]
        pipe: Any = scenario.pipeline(device, torch.bfloat16)
        arguments: dict[str, Any] = scenario.arguments(pipe)
    else:
        with device, _made_in(torch.bfloat16):
            pipe, arguments = MAKERS[model](is_tiny, is_xdit)
    fill(denoiser_of(pipe).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, dict(arguments, output_type="latent", return_dict=False)


@torch.no_grad()
def fill(denoiser: Any) -> None:
    """Draw the weights where they lie. What `from_pretrained` keeps in fp32 becomes fp32."""
    torch.manual_seed(0)
    for module in denoiser.modules():
        for name, weight in module.named_parameters(recurse=False):
            is_scale = name == "weight" and "Norm" in type(module).__name__
            weight.fill_(1) if is_scale else weight.normal_(0, 0.02)
    kept = denoiser._keep_in_fp32_modules or ()
    for name, weight in denoiser.named_parameters():
        if any(part in kept for part in name.split(".")):
            weight.data = weight.data.float()
