"""Tiny random pipelines that call their denoiser once a step, with all branches in one batch, and what comes beside."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import tiny
import torch
from of_diffusers import (
    AnimateDiffPipeline,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    KolorsPipeline,
    LTX2Pipeline,
    LTX2TextConnectors,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPAGPipeline,
    T2IAdapter,
    TextToVideoSDPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch.utils._pytree import tree_map_only

TEXTLESS = dict(text_encoder=None, tokenizer=None)
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
#: Width of the prompt embeddings, and of an IP-Adapter's picture embeddings.
TEXT, PICTURE = 24, 12
#: Layers that perturbed-attention guidance changes in a U-Net.
PAG = ["down", "mid"]


class Case(NamedTuple):
    build: Callable[[], DiffusionPipeline]
    #: of the pipeline, and the number of prompts unless it is 1
    kwargs: Callable[..., dict]


def call(pipe: DiffusionPipeline, name: str, *, count: int = 1, seed: int = 0, **changes: object):
    """Latents of a short run on ``count`` prompts; of more than one kind (video and audio): a tuple."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(pipe._execution_device, pipe.dtype if tensor.is_floating_point() else None)

    given = tree_map_only(torch.Tensor, place, {**CASES[name].kwargs(pipe, count), **changes})
    output = pipe(generator=torch.Generator().manual_seed(seed), **given)
    latents = tuple(value for value in output.to_tuple() if isinstance(value, torch.Tensor))
    return latents if len(latents) > 1 else latents[0]


def _case(make: Callable[[], DiffusionPipeline], given: Callable[[int], dict]) -> Case:
    def kwargs(pipe: DiffusionPipeline, count: int = 1) -> dict:
        return dict(num_inference_steps=8, output_type="latent", **given(count))

    return Case(partial(_ready, make), kwargs)


def _ready(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    torch.manual_seed(0)
    pipe = make()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            _fill(component.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _fill(module: torch.nn.Module) -> None:
    """Noise for what starts at zero (a ControlNet's outputs, padding tokens): it would hide all behind it."""
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=0.2)


@torch.no_grad()
def _open(transformer: torch.nn.Module) -> torch.nn.Module:
    """With larger gates: those of random weights let almost nothing of the text through."""
    for name, module in transformer.named_modules():
        if name.endswith(".linear"):
            module.weight.mul_(24)
    return transformer


def kolors() -> KolorsPipeline:
    unet = tiny.unet(
        use_linear_projection=True,
        encoder_hid_dim=TEXT + 4,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 20,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    return KolorsPipeline(unet=unet, scheduler=scheduler, vae=tiny.vae(4), **TEXTLESS)


def cogvideox(scheduler: type = CogVideoXDDIMScheduler) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=tiny.TOKENS,
        # as in the 2B and 5B checkpoints, which have these schedulers
        use_rotary_positional_embeddings=scheduler is CogVideoXDPMScheduler,
    )
    settings = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return CogVideoXPipeline(transformer=_open(transformer), scheduler=scheduler(**settings), vae=None, **TEXTLESS)


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        transformer=transformer, scheduler=DPMSolverMultistepScheduler(**BETAS), vae=tiny.vae(4), **TEXTLESS
    )


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=8,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **TEXTLESS)


def auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(transformer=_open(transformer), scheduler=scheduler, vae=tiny.vae(4), **TEXTLESS)


def ltx() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
    )
    return LTXPipeline(transformer=transformer, scheduler=_dynamic(), vae=None, **TEXTLESS)


def _dynamic() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )


def ltx2() -> LTX2Pipeline:
    """As in LTX-2.3: gates, a modulation of the text by the noise level, and rotations of halves."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=3,
        vae_scale_factors=(8, 8, 8),
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        perturbed_attn=True,
        use_prompt_embeddings=False,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=TEXT // 2,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        per_modality_projections=True,
        video_hidden_dim=32,
        audio_hidden_dim=16,
        proj_bias=True,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        patch_size=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1), num_res_blocks=1, resolution=16, latent_channels=2, mel_bins=16
    )
    return LTX2Pipeline(
        transformer=transformer,
        connectors=connectors,
        scheduler=_dynamic(),
        vae=vae,
        audio_vae=audio_vae,
        vocoder=None,
        **TEXTLESS,
    )


def stable_audio() -> StableAudioPipeline:
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=8,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=2 * TEXT,
        cross_attention_input_dim=TEXT,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=8,
        sampling_rate=16,
    )
    return StableAudioPipeline(
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(),  # CosineDPMSolver needs torchsde
        projection_model=StableAudioProjectionModel(TEXT, TEXT, min_value=0, max_value=4),
        vae=vae,
        **TEXTLESS,
    )


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.2)  # before diffusers 0.39 they are whatever was in memory
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(transformer=transformer, scheduler=scheduler, vae=tiny.vae(16), **TEXTLESS)


def sag() -> StableDiffusionSAGPipeline:
    sd15 = tiny.sd15()
    unet = tiny.unet(**{**sd15.unet.config, "attention_head_dim": 4})
    return StableDiffusionSAGPipeline.from_pipe(sd15, unet=unet)


def text_to_video() -> TextToVideoSDPipeline:
    """Its scheduler gets the frames as further samples."""
    blocks = dict(down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"))
    blocks |= dict(up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), attention_head_dim=4)
    return _of_sd15(TextToVideoSDPipeline, UNet3DConditionModel(**_VIDEO_UNET, **blocks))


def animatediff() -> AnimateDiffPipeline:
    """Its texts are repeated for each frame."""
    blocks = dict(down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2)
    blocks |= dict(up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2)
    return _of_sd15(AnimateDiffPipeline, UNetMotionModel(**_VIDEO_UNET, **blocks), motion_adapter=None)


_VIDEO_UNET = dict(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
_VIDEO_UNET |= dict(in_channels=4, out_channels=4, cross_attention_dim=TEXT)


def _of_sd15(kind: type, unet: torch.nn.Module, **more: object) -> DiffusionPipeline:
    sd15 = tiny.sd15()
    return kind(vae=sd15.vae, scheduler=sd15.scheduler, unet=unet, **TEXTLESS, **more)


def instruct_pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    sd15 = tiny.sd15()
    unet = tiny.unet(**{**sd15.unet.config, "in_channels": 8})
    return StableDiffusionInstructPix2PixPipeline.from_pipe(sd15, unet=unet)


def controlnet() -> StableDiffusionXLControlNetPipeline:
    sdxl = tiny.sdxl()
    beside = ControlNetModel.from_unet(sdxl.unet, conditioning_embedding_out_channels=(4, 8))
    return StableDiffusionXLControlNetPipeline.from_pipe(sdxl, controlnet=beside)


def t2i_adapter() -> StableDiffusionAdapterPipeline:
    adapter = T2IAdapter(channels=[8, 16, 32], num_res_blocks=1, downscale_factor=2)
    return StableDiffusionAdapterPipeline.from_pipe(tiny.sd15(), adapter=adapter)


def ip_adapter(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    pipe = make()
    attentions = [
        pipe.unet.get_submodule(name.removesuffix(".processor"))
        for name in pipe.unet.attn_processors
        if name.endswith("attn2.processor")
    ]
    state = {
        "image_proj": {
            "proj.weight": torch.randn(4 * TEXT, PICTURE),
            "proj.bias": torch.randn(4 * TEXT),
            "norm.weight": torch.ones(TEXT),
            "norm.bias": torch.zeros(TEXT),
        },
        "ip_adapter": {
            f"{2 * i + 1}.to_{kind}_ip.weight": 0.5 * torch.randn(attention.to_k.weight.shape)
            for i, attention in enumerate(attentions)
            for kind in "kv"
        },
    }
    pipe.unet._load_ip_adapter_weights(state)
    return pipe


def _normal(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _picture(count: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, 32, 32, generator=torch.Generator().manual_seed(4))


def _prompt(count: int, dim: int = TEXT, pooled: bool = False, masked: bool = False) -> dict[str, torch.Tensor]:
    """Embeddings large enough to matter to random weights; masked: the negative prompt is the shorter one."""
    given = {}
    for seed, negative, length in ((1, "", tiny.TOKENS), (2, "negative_", tiny.TOKENS - 3)):
        given[f"{negative}prompt_embeds"] = 4 * _normal(count, tiny.TOKENS, dim, seed=seed)
        if pooled:
            given[f"{negative}pooled_prompt_embeds"] = 4 * _normal(count, 20, seed=seed)
        if masked:
            given[f"{negative}prompt_attention_mask"] = (torch.arange(tiny.TOKENS) < length).long().repeat(count, 1)
    return given


def _still(**more: object) -> dict:
    return dict(height=32, width=32, guidance_scale=5.0, **more)


def _sd15(count: int, **more: object) -> dict:
    return _still(**_prompt(count), **more)


def _pooled(count: int, **more: object) -> dict:
    """For SDXL and SD3."""
    return _still(**_prompt(count, pooled=True), **more)


def _masked(count: int, **more: object) -> dict:
    return _still(**_prompt(count, masked=True), **more)


def _unbinned(count: int) -> dict:
    """For PixArt and Sana: the size as given, and none of their default negative prompt."""
    return _masked(count, use_resolution_binning=False, negative_prompt=None)


def _video(size: int = 64, **more: object) -> dict:
    return dict(height=size, width=size, num_frames=9, **more)


def _z_image(count: int, **more: object) -> dict:
    # longer than the 32 tokens that the model pads to, and shorter
    texts = {
        key: [4 * _normal(length + i, TEXT, seed=length + i) for i in range(count)]
        for key, length in (("prompt_embeds", 40), ("negative_prompt_embeds", 5))
    }
    return _still(**texts, **more)


def _ltx2(count: int) -> dict:
    return _video(
        guidance_scale=3.0,
        audio_guidance_scale=7.0,
        stg_scale=1.0,
        modality_scale=3.0,
        spatio_temporal_guidance_blocks=[1],
        **_prompt(count, masked=True),
    )


def _image_embeds(count: int) -> dict:
    """[negative, positive]: an unguided call takes the second half alone."""
    return dict(ip_adapter_image_embeds=[2 * _normal(2 * count, 1, PICTURE)])


CASES: dict[str, Case] = {
    "kolors": _case(kolors, lambda n: _still(**_prompt(n, TEXT + 4, pooled=True))),
    "cogvideox": _case(cogvideox, lambda n: _video(guidance_scale=6.0, **_prompt(n))),
    "cogvideox dpm": _case(
        partial(cogvideox, CogVideoXDPMScheduler), lambda n: _video(guidance_scale=6.0, **_prompt(n))
    ),
    "pixart": _case(pixart, _unbinned),
    "sana": _case(sana, _unbinned),
    "auraflow": _case(auraflow, _masked),
    # without a VAE: latents 32 times smaller
    "ltx": _case(ltx, lambda n: _video(128, guidance_scale=3.0, **_prompt(n, masked=True))),
    "stable audio": _case(stable_audio, lambda n: dict(guidance_scale=5.0, **_prompt(n))),
    "z-image": _case(z_image, _z_image),
    "z-image truncated": _case(z_image, lambda n: _z_image(n, cfg_truncation=0.4)),
    "sd15 pag": _case(lambda: StableDiffusionPAGPipeline.from_pipe(tiny.sd15(), pag_applied_layers=PAG), _sd15),
    "sdxl pag": _case(lambda: StableDiffusionXLPAGPipeline.from_pipe(tiny.sdxl(), pag_applied_layers=PAG), _pooled),
    "sd3 pag": _case(lambda: StableDiffusion3PAGPipeline.from_pipe(tiny.sd3()), _pooled),
    "instruct pix2pix": _case(
        instruct_pix2pix,
        lambda n: dict(image=_picture(n), guidance_scale=5.0, image_guidance_scale=1.5, **_prompt(n)),
    ),
    # Its attention keeps maps, of which the input of the step's second call is made.
    "sd15 sag": _case(sag, lambda n: _sd15(n, sag_scale=0.75)),
    "text to video": _case(text_to_video, lambda n: _still(num_frames=3, **_prompt(n))),
    "animatediff": _case(animatediff, lambda n: _still(num_frames=3, **_prompt(n))),
    "ltx2": _case(ltx2, _ltx2),
    "sd3 skip layers": _case(
        tiny.sd3,
        lambda n: _pooled(n, skip_guidance_layers=[1], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=0.6),
    ),
    "sdxl controlnet": _case(controlnet, lambda n: _pooled(n, image=_picture(n))),
    "sd15 t2i-adapter": _case(t2i_adapter, lambda n: _sd15(n, image=_picture(n))),
    "sd15 ip-adapter": _case(partial(ip_adapter, tiny.sd15), lambda n: _sd15(n, **_image_embeds(n))),
    "sdxl ip-adapter": _case(partial(ip_adapter, tiny.sdxl), lambda n: _pooled(n, **_image_embeds(n))),
    "sdxl base": _case(tiny.sdxl, lambda n: _pooled(n, denoising_end=0.5)),
    # `image` stands for what the base hands over
    "sdxl refiner": _case(
        lambda: StableDiffusionXLImg2ImgPipeline.from_pipe(tiny.sdxl()),
        lambda n: dict(image=_normal(n, 4, 16, 16), denoising_start=0.5, guidance_scale=5.0, **_prompt(n, pooled=True)),
    ),
    "sd3 img2img": _case(
        lambda: StableDiffusion3Img2ImgPipeline.from_pipe(tiny.sd3()),
        lambda n: _pooled(n, image=_picture(n), strength=0.75),
    ),
    "sd3 inpaint": _case(
        lambda: StableDiffusion3InpaintPipeline.from_pipe(tiny.sd3()),
        lambda n: _pooled(n, image=_picture(n), mask_image=(_picture(n, 1) > 0.5).float(), strength=0.75),
    ),
}
