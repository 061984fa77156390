"""Tiny pipelines of random weights that call the denoiser once for each branch, one after the other.

Three patterns: calls named by ``cache_context``, calls without a name, and the loop of a guider.
"""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from of_diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ConfigMixin,
    Cosmos2TextToImagePipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    ModelMixin,
    ModularPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanCoreDenoiseStep,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    ZImageCoreDenoiseStep,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

TEXT = 24
POOLED = 8
#: Tokens of the prompt and of the negative prompt.
LENGTHS = (9, 6)
AXES = (4, 6, 6)
#: PyTorch draws matrices that shrink their input: the text would have little effect.
GAIN = 2


def _model(kind: Callable, seed: int = 0, **config: object) -> torch.nn.Module:
    """A model of random weights, also where its class starts with zeros: those would hide the text."""
    torch.manual_seed(seed)
    model = kind(**config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.2)
            elif weight.ndim > 1:
                weight *= GAIN
    return model


def _pipe(kind: Callable[..., DiffusionPipeline], **parts: object) -> DiffusionPipeline:
    """A pipeline of these parts and no others."""
    required = {name for name, p in inspect.signature(kind).parameters.items() if p.default is p.empty}
    pipe = kind(**{**dict.fromkeys(required), **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _both(name: str, positive: torch.Tensor, negative: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: positive, f"negative_{name}": negative}


def _normal(*shape: int, seed: int) -> torch.Tensor:
    """Embeddings large enough to matter to random weights."""
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _texts(name: str = "prompt_embeds", lengths: tuple[int, int] = LENGTHS, width: int = TEXT) -> dict[str, Any]:
    """Embeddings of the prompt and of the negative prompt."""
    return _both(name, *(_normal(1, length, width, seed=i) for i, length in enumerate(lengths)))


def _pooled(name: str = "pooled_prompt_embeds") -> dict[str, Any]:
    return _both(name, *(_normal(1, POOLED, seed=2 + i) for i in range(2)))


def _padded(name: str, mask: str, width: int = TEXT, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    """Embeddings of one length, of which the masks leave the two lengths."""
    longest = max(LENGTHS)
    masks = (torch.arange(longest)[None] < length for length in LENGTHS)
    return {**_texts(name, (longest, longest), width), **_both(mask, *(m.to(dtype) for m in masks))}


def _run(size: int, frames: int | None = None) -> dict[str, Any]:
    settings = dict(height=size, width=size, num_inference_steps=8, output_type="latent")
    return settings if frames is None else {**settings, "num_frames": frames}


def picture() -> Image.Image:
    return Image.frombytes("RGB", (32, 32), bytes(i * 37 % 256 for i in range(32 * 32 * 3)))


# --- calls named by cache_context


def _qwen_transformer() -> torch.nn.Module:
    return _model(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=AXES,
    )


def qwen() -> DiffusionPipeline:
    return _pipe(QwenImagePipeline, transformer=_qwen_transformer(), scheduler=_euler())


class _Shrinking(ModelMixin, ConfigMixin):
    """The encoder of a VAE. QwenImageEdit scales every picture to a million pixels: here they are 16 x 16 latents."""

    temperal_downsample = [False] * 6

    @register_to_config
    def __init__(self, z_dim: int = 4, latents_mean: tuple = (0.0,) * 4, latents_std: tuple = (1.0,) * 4) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, z_dim, 64, 64)

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.convolution(video[:, :, 0])[:, :, None])

    def decode(self, latents: torch.Tensor) -> None:
        raise NotImplementedError


def qwen_edit() -> DiffusionPipeline:
    vae = _model(_Shrinking)
    return _pipe(QwenImageEditPipeline, transformer=_qwen_transformer(), scheduler=_euler(), vae=vae)


def _qwen_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {
        **_run(64),
        **_texts(),
        **_both("prompt_embeds_mask", *(torch.ones(1, n).long() for n in LENGTHS)),
        "true_cfg_scale": 4.0,
    }


def _qwen_edit_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_qwen_call(pipe), "image": picture(), "height": 512, "width": 512}


WAN = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=TEXT)
WAN |= dict(freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)


def _wan_transformer(seed: int = 0, **changes: object) -> torch.nn.Module:
    return _model(WanTransformer3DModel, seed, **{**WAN, **changes})


def wan(scheduler: Callable) -> DiffusionPipeline:
    return _pipe(WanPipeline, transformer=_wan_transformer(), scheduler=scheduler())


def wan22() -> DiffusionPipeline:
    return _pipe(
        WanPipeline,
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer(seed=1),
        scheduler=_unipc(),
        boundary_ratio=0.8,
    )


def wan_ti2v() -> DiffusionPipeline:
    """Wan 2.2 TI2V: a timestep for each token."""
    return _pipe(WanPipeline, transformer=_wan_transformer(), scheduler=_unipc(), expand_timesteps=True)


def wan_vace() -> DiffusionPipeline:
    """A video or its parts guide some layers: its latents, twice, and 64 channels of its mask."""
    transformer = _model(
        WanVACETransformer3DModel, **WAN, vace_layers=[0], vace_in_channels=2 * WAN["in_channels"] + 64
    )
    return _pipe(WanVACEPipeline, transformer=transformer, scheduler=_unipc(), vae=_wan_vae())


def _wan_vae() -> torch.nn.Module:
    small = dict(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1)
    return _model(AutoencoderKLWan, **small, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def wan_i2v() -> DiffusionPipeline:
    eyes = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=16,
    )
    return _pipe(
        WanImageToVideoPipeline,
        transformer=_wan_transformer(in_channels=12, image_dim=16, added_kv_proj_dim=32),
        scheduler=_unipc(),
        vae=_wan_vae(),
        image_encoder=_model(CLIPVisionModel, config=eyes),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )


def wan22_i2v() -> DiffusionPipeline:
    """Two networks, and no encoder for the picture."""
    first, second = (_wan_transformer(seed, in_channels=12) for seed in (0, 1))
    parts = dict(transformer=first, transformer_2=second, scheduler=_unipc(), vae=_wan_vae())
    return _pipe(WanImageToVideoPipeline, **parts, boundary_ratio=0.8)


def _wan_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_run(32, frames=9), **_texts(lengths=(8, 8)), "guidance_scale": 5.0}


def _wan22_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_wan_call(pipe), "guidance_scale_2": 3.0}


def _wan_i2v_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    # The attention takes the last 512 tokens for the text.
    return {**_wan_call(pipe), **_texts(lengths=(512, 512)), "image": picture()}


def _wan22_i2v_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_wan22_call(pipe), "image": picture()}


def hunyuan_video() -> DiffusionPipeline:
    transformer = _model(
        HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=AXES,
    )
    return _pipe(HunyuanVideoPipeline, transformer=transformer, scheduler=_euler())


def _hunyuan_video_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    texts = {**_padded("prompt_embeds", "prompt_attention_mask"), **_pooled()}
    return {**_run(32, frames=9), **texts, "true_cfg_scale": 4.0}


#: Of Cosmos3's tokenizer. Its network reads the words themselves.
WORDS = ("<unknown>", "<end>", "<|vision_start|>", *"abcdefghi")


def cosmos3() -> DiffusionPipeline:
    transformer = _model(
        Cosmos3OmniTransformer,
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        latent_patch_size=1,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        patch_latent_dim=4,
        rope_axes_dim=[4, 2, 2],
        vocab_size=len(WORDS),
    )
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    parts = dict(text_tokenizer=tokenizer, vae=_wan_vae(), enable_safety_checker=False)
    return _pipe(Cosmos3OmniPipeline, transformer=transformer, scheduler=_unipc(), **parts)


def _cosmos3_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    templates = dict.fromkeys(("use_system_prompt", "add_resolution_template", "add_duration_template"), False)
    texts = dict(prompt="a b c d e", negative_prompt="f g")
    return {**_run(64, frames=5), **texts, **templates, "guidance_scale": 6.0}


def cogview4() -> DiffusionPipeline:
    transformer = _model(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return _pipe(CogView4Pipeline, transformer=transformer, scheduler=_euler())


def _cogview4_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_run(64), **_texts(lengths=(32, 16)), "guidance_scale": 5.0}


def flux() -> DiffusionPipeline:
    transformer = _model(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=AXES,
    )
    return _pipe(FluxPipeline, transformer=transformer, scheduler=_euler())


def _flux_call(pipe: DiffusionPipeline, **more: object) -> dict[str, Any]:
    texts = {**_texts(lengths=(8, 8)), **_pooled()}
    return {**_run(64), **texts, **more}


def flux2_klein() -> DiffusionPipeline:
    transformer = _model(
        Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4,) * 4,
    )
    vae = _model(
        AutoencoderKLFlux2,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    return _pipe(Flux2KleinPipeline, transformer=transformer, scheduler=_euler(), vae=vae, is_distilled=False)


def _flux2_klein_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_run(64), **_texts(), "guidance_scale": 4.0}


# --- calls without a name


def lumina2() -> DiffusionPipeline:
    transformer = _model(
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=AXES,
        axes_lens=(64, 16, 16),
        cap_feat_dim=TEXT,
    )
    return _pipe(Lumina2Pipeline, transformer=transformer, scheduler=_euler())


def _lumina2_call(pipe: DiffusionPipeline, **more: object) -> dict[str, Any]:
    return {
        **_run(64),
        **_padded("prompt_embeds", "prompt_attention_mask", dtype=torch.bool),
        "guidance_scale": 4.0,
        **more,
    }


def krea2() -> DiffusionPipeline:
    transformer = _model(
        Krea2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=AXES,
    )
    return _pipe(Krea2Pipeline, transformer=transformer, scheduler=_euler(), is_distilled=False, patch_size=2)


def _krea2_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    texts = _padded("prompt_embeds", "prompt_embeds_mask", width=2 * TEXT, dtype=torch.bool)
    layers = {key: value.unflatten(-1, (2, TEXT)) if value.ndim == 3 else value for key, value in texts.items()}
    return {**_run(64), **layers, "guidance_scale": 3.0}


def kandinsky5() -> DiffusionPipeline:
    transformer = _model(
        Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT,
        in_text_dim2=POOLED,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=AXES,
        visual_cond=True,
    )
    return _pipe(Kandinsky5T2VPipeline, transformer=transformer, scheduler=_euler())


def _kandinsky5_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    texts = {**_texts("prompt_embeds_qwen"), **_pooled("prompt_embeds_clip")}
    ends = _both("prompt_cu_seqlens", *(torch.tensor([0, length]) for length in LENGTHS))
    return {**_run(32, frames=9), **texts, **ends, "guidance_scale": 5.0}


class _Trusting:
    """The safety checker that Cosmos insists on; it is asked about prompts and pictures only, not about latents."""

    def to(self, device: torch.device) -> "_Trusting":
        return self


def cosmos2() -> DiffusionPipeline:
    transformer = _model(
        CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # it needs torchvision
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return _pipe(Cosmos2TextToImagePipeline, transformer=transformer, scheduler=scheduler, safety_checker=_Trusting())


def _cosmos2_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {**_run(64), **_texts(lengths=(8, 8)), "guidance_scale": 7.0}


# --- the loop of a guider


def hunyuan_video15(**guider: float) -> DiffusionPipeline:
    transformer = _model(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=AXES,
        target_size=64,
        task_type="t2v",
    )
    vae = _model(AutoencoderKLHunyuanVideo15, latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    pipe = _pipe(
        HunyuanVideo15Pipeline,
        transformer=transformer,
        scheduler=_euler(),
        vae=vae,
        guider=ClassifierFreeGuidance(guidance_scale=6.0, **guider),
    )
    pipe.vision_num_semantic_tokens = 3  # instead of 729 masked tokens for a picture that is not there
    return pipe


def _two_texts(size: int, frames: int | None = None) -> dict[str, Any]:
    first = _padded("prompt_embeds", "prompt_embeds_mask")
    second = _padded("prompt_embeds_2", "prompt_embeds_mask_2", width=8)
    return {**_run(size, frames), **first, **second}


def _hunyuan_video15_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return _two_texts(64, frames=9)


def _ideogram4_text(
    self: DiffusionPipeline, prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
) -> Any:
    """Embeddings of the text instead of its encoder's."""
    count = LENGTHS[0]
    embeds = torch.zeros(1, max_sequence_length + grid_h * grid_w, TEXT)
    embeds[:, max_sequence_length - count : max_sequence_length] = _normal(1, count, TEXT, seed=0)
    return embeds.to(device), *self._prepare_ids([count], grid_h, grid_w, max_sequence_length, device)


Ideogram4Pipeline.encode_prompt = _ideogram4_text


def ideogram4() -> DiffusionPipeline:
    """Uncond has a network of its own, and predicts nothing in the text's places."""
    settings = dict(in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32)
    settings |= dict(adaln_dim=16, llm_features_dim=TEXT, mrope_section=(4, 2, 2))
    cond, uncond = (_model(Ideogram4Transformer2DModel, seed, **settings) for seed in (0, 1))
    return _pipe(Ideogram4Pipeline, transformer=cond, unconditional_transformer=uncond, scheduler=_euler())


def _ideogram4_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """w falls at the end, as it does there by default."""
    return {**_run(64), "prompt": "", "max_sequence_length": 12, "guidance_schedule": [7.0] * 6 + [3.0] * 2}


def hunyuan_image() -> DiffusionPipeline:
    transformer = _model(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=8,
        rope_axes_dim=(8, 8),
    )
    # A text in the second embeddings makes it take the second guider.
    return _pipe(
        HunyuanImagePipeline,
        transformer=transformer,
        scheduler=_euler(),
        guider=AdaptiveProjectedMixGuidance(guidance_scale=2.0),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5),
    )


def _hunyuan_image_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    return _two_texts(128)


def _modular(blocks: Callable, **parts: object) -> ModularPipeline:
    pipe = blocks().init_pipeline()
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def modular_wan() -> ModularPipeline:
    transformer = _wan_transformer(in_channels=16, out_channels=16)  # as many as it takes without a VAE
    return _modular(WanCoreDenoiseStep, transformer=transformer, scheduler=_unipc())


def _modular_wan_call(pipe: ModularPipeline) -> dict[str, Any]:
    return {**_run(32, frames=9), **_texts(lengths=(8, 8))}


def modular_z_image() -> ModularPipeline:
    transformer = _model(
        ZImageTransformer2DModel,
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=list(AXES),
        axes_lens=[128, 16, 16],
    )
    guider = ClassifierFreeGuidance(guidance_scale=4.0)  # its own is off
    return _modular(ZImageCoreDenoiseStep, transformer=transformer, scheduler=_euler(), guider=guider)


def _modular_z_image_call(pipe: ModularPipeline) -> dict[str, Any]:
    return {**_run(64), **{key: [text[0]] for key, text in _texts().items()}}


class Case(NamedTuple):
    build: Callable[[], DiffusionPipeline]
    #: The arguments of a short guided call.
    kwargs: Callable[[DiffusionPipeline], dict[str, Any]]


CASES: dict[str, Case] = {
    "qwen": Case(qwen, _qwen_call),
    "qwen-edit": Case(qwen_edit, _qwen_edit_call),
    "wan21-unipc": Case(partial(wan, _unipc), _wan_call),
    "wan21-euler": Case(partial(wan, _euler), _wan_call),
    "wan22": Case(wan22, _wan22_call),
    "wan21-i2v": Case(wan_i2v, _wan_i2v_call),
    "wan22-i2v": Case(wan22_i2v, _wan22_i2v_call),
    "wan22-ti2v": Case(wan_ti2v, _wan_call),
    "wan21-vace": Case(wan_vace, _wan_call),
    "hunyuan-video": Case(hunyuan_video, _hunyuan_video_call),
    "cosmos3": Case(cosmos3, _cosmos3_call),
    "cogview4": Case(cogview4, _cogview4_call),
    "flux-true-cfg": Case(flux, partial(_flux_call, true_cfg_scale=4.0)),
    "flux": Case(flux, _flux_call),
    "flux2-klein": Case(flux2_klein, _flux2_klein_call),
    "lumina2": Case(lumina2, _lumina2_call),
    "lumina2-truncated": Case(lumina2, partial(_lumina2_call, cfg_trunc_ratio=0.7)),
    "krea2": Case(krea2, _krea2_call),
    "kandinsky5": Case(kandinsky5, _kandinsky5_call),
    "cosmos2": Case(cosmos2, _cosmos2_call),
    "hunyuan-video15": Case(hunyuan_video15, _hunyuan_video15_call),
    "hunyuan-video15-window": Case(partial(hunyuan_video15, start=0.3, stop=0.9), _hunyuan_video15_call),
    "hunyuan-image": Case(hunyuan_image, _hunyuan_image_call),
    "ideogram4": Case(ideogram4, _ideogram4_call),
    "modular-wan": Case(modular_wan, _modular_wan_call),
    "modular-z-image": Case(modular_z_image, _modular_z_image_call),
}


def _placed(value: Any, pipe: DiffusionPipeline) -> Any:
    if isinstance(value, list):
        return [_placed(item, pipe) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(pipe._execution_device, pipe.transformer.dtype if value.is_floating_point() else value.dtype)


def call(pipe: DiffusionPipeline, name: str, *, seed: int = 0, **changes: object) -> torch.Tensor:
    """Latents of a short run of the pipeline of the case ``name``."""
    given = {**CASES[name].kwargs(pipe), "generator": torch.Generator().manual_seed(seed), **changes}
    given = {key: _placed(value, pipe) for key, value in given.items()}
    if isinstance(pipe, ModularPipeline):
        del given["output_type"]
        return pipe(output="latents", **given)
    return pipe(return_dict=False, **given)[0]
