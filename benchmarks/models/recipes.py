"""The six small models: what each is made of, how its text is encoded, and how a training example is made.

A recipe builds an untrained pipeline of diffusers' own classes; `train.py` trains its parts in place.
"""

from __future__ import annotations

import json
import math
import string
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from sample import denoiser
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

SIZE = 64  # of a picture
TOKENS = 32  # of a text
TEXT_WIDTH = 128  # of a text encoder
VOCABULARY = 2560  # at most


class Example(NamedTuple):
    """What a denoiser is given, and what its answer should be.

    Attributes:
        noisy: latents with noise, [B, ...].
        time: the scheduler's time step of each, [B].
        target: what should be predicted, like `noisy`.
        weight: of each squared error, [B].
    """

    noisy: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor


class Recipe(ABC):
    """One model.

    Attributes:
        data: "emoji", "scenes" or "clips".
        batch: examples of a training step.
        lr: highest learning rate.
        empty: the text that stands for none.
        compiled: classes of the denoiser's blocks that are compiled.
        vae_seconds: how long the VAE is trained.
        vae_batch: examples of one of its steps.
    """

    data = "emoji"
    batch = 512
    lr = 1e-3
    empty = ""
    compiled: tuple[str, ...] = ()
    vae_seconds = 60.0
    vae_batch = 192

    @abstractmethod
    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        """The untrained pipeline, its tokenizer learned on `captions`."""

    @abstractmethod
    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        """The denoiser's arguments for texts whose token ids are int64 [B, T]."""

    @abstractmethod
    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        """The same arguments as the pipeline makes them when it is called for one prompt."""

    @abstractmethod
    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        """Noise of random strength on standardised latents [B, ...]."""

    @abstractmethod
    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The denoiser's answer, like `noisy`."""

    def tokenize(self, pipe: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
        """Token ids, int64 [len(captions), T]."""
        return _padded(pipe.tokenizer, captions, TOKENS)

    def pixels(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64], or clips, as the VAE takes them."""
        return pictures

    def trained(self, pipe: DiffusionPipeline) -> list[nn.Module]:
        """The denoiser, and what is trained with it."""
        return [denoiser(pipe), pipe.text_encoder]


# --- training examples --------------------------------------------------------------------------


def flow_example(latents: Tensor, shift: float) -> Example:
    """Flow matching; the strengths are logit-normal, a fifth of them uniform, and shifted as the scheduler's are."""
    normal, uniform = (draw(len(latents), device=latents.device) for draw in (torch.randn, torch.rand))
    sigma = torch.where(torch.rand_like(uniform) < 0.2, uniform, normal.sigmoid())  # both ends are trained too
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    mix = sigma.view(-1, *[1] * (latents.ndim - 1))
    noise = torch.randn_like(latents)
    return Example(torch.lerp(latents, noise, mix), 1000 * sigma, noise - latents, torch.ones_like(sigma))


def noise_example(latents: Tensor, scheduler: Any) -> Example:
    """Diffusion, whose denoiser predicts what `scheduler` asks for.

    The weights are min-SNR's and, where the noise is high, as much as a velocity loss would give: layout and the
    binding to the text are learned there, and plain noise prediction all but ignores it.
    """
    time = torch.randint(1000, (len(latents),), device=latents.device)
    alpha = scheduler.alphas_cumprod.to(latents.device)[time]
    snr = alpha / (1 - alpha)
    clean, noisy = (part.sqrt().view(-1, *[1] * (latents.ndim - 1)) for part in (alpha, 1 - alpha))
    noise = torch.randn_like(latents)
    of_clean = snr.clamp(max=5.0) + 1  # the weight of an error in the clean latents that the prediction implies
    if scheduler.config.prediction_type == "v_prediction":
        target, weight = clean * noise - noisy * latents, of_clean / (snr + 1)
    else:
        target, weight = noise, (of_clean / snr).clamp(max=30.0)
    return Example(clean * latents + noisy * noise, time, target, weight)


# --- tokenizers ---------------------------------------------------------------------------------


def _padded(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    return tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def clip_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE, learned. Its plain files, which every release reads, stay at its `name_or_path`."""
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = _merges(learner)
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(merge.replace(" ", "") for merge in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    special = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    special["bos_token"] = "<|startoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    folder = Path(tempfile.mkdtemp())
    vocabulary = json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special, indent=2))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _merges(learner: Tokenizer) -> list[str]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]


def t5_tokenizer(captions: Sequence[str], length: int = TOKENS) -> T5TokenizerFast:
    """T5's pieces, learned; with no captions the single letters. A word is cut into as few pieces as there can be."""
    letters = ["\u2581", *string.ascii_lowercase, *string.digits]
    learner = Tokenizer(models.BPE())
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    learner.pre_tokenizer = pre_tokenizers.Sequence(split)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 3, initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(captions, trainer)
    pieces = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    scored = [(piece, -10 - rank / len(pieces)) for piece, rank in pieces]  # of equally few, the commoner ones
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + scored, extra_ids=0, model_max_length=length)


def qwen_tokenizer(captions: Sequence[str], template: str) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE, learned. Every word of the pipeline's template is one piece, as it is in Qwen's own.

    The pipeline drops a fixed number of pieces in front of the prompt: the template's must be exactly so many.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    empty = Qwen2Tokenizer()
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = empty._tokenizer.normalizer, empty._tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    words = template.replace("{}", "\n")
    for token in special:
        words = words.replace(token, "\n")
    learner.train_from_iterator([*captions, *[words] * 1000], trainer)
    tokenizer = Qwen2Tokenizer(vocab=learner.get_vocab(), merges=[tuple(m.split(" ")) for m in _merges(learner)])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


# --- text encoders ------------------------------------------------------------------------------


def clip_encoder(tokenizer: CLIPTokenizer, projected: bool, layers: int) -> nn.Module:
    """A CLIP text encoder, with or without projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(weight, std=0.3)
        elif "position_embedding" in name:
            nn.init.normal_(weight, std=0.1)
    return encoder


def t5_encoder(tokenizer: T5TokenizerFast, config: type[T5Config], model: type[nn.Module]) -> nn.Module:
    """A T5 or UMT5 encoder."""
    size = dict(d_model=TEXT_WIDTH, d_kv=32, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0)
    return model(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **size))


def silent_t5() -> tuple[nn.Module, T5TokenizerFast]:
    """A T5 encoder whose output is zero, which is what SD3's pipeline takes where it has none.

    `StableDiffusion3Pipeline.from_pretrained(folder)` wants a third text encoder, unless it is told otherwise.
    """
    tokenizer = t5_tokenizer([], length=256)
    config = T5Config(vocab_size=len(tokenizer), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


# --- VAEs ---------------------------------------------------------------------------------------


def image_vae(scaling: float, shift: float | None = None) -> AutoencoderKL:
    """64 x 64 pictures to latents [4, 32, 32]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=scaling,
        shift_factor=shift,
        force_upcast=False,
    ).to(memory_format=torch.channels_last)


def _channels_last(vae: nn.Module) -> None:
    """Lay out the 3D convolutions as the GPU's fast kernels want them."""
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def standardise(vae: nn.Module, latents: Tensor) -> Tensor:
    """Have the VAE say what gives each channel of its `latents` [N, C, ...] mean 0 and deviation 1; these latents."""
    mean, std = (f([d for d in range(latents.ndim) if d != 1], keepdim=True) for f in (latents.mean, latents.std))
    if isinstance(vae, AutoencoderKL):
        _rescale(vae, mean.flatten(), std.flatten())
    else:
        vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    return (latents - mean) / std


def _rescale(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give each latent channel the mean `shift_factor` and the deviation 1 / `scaling_factor`.

    The affine maps go into the 1 x 1 convolutions behind the encoder and before the decoder: pictures decode as before.
    """
    shift = vae.config.shift_factor or 0.0
    scale = 1 / (vae.config.scaling_factor * std)
    channels, encode, decode = len(mean), vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] *= scale.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) * scale + shift
    encode.bias[channels:] += 2 * scale.log()
    decode.bias += decode.weight[:, :, 0, 0] @ (mean - shift / scale)
    decode.weight /= scale.view(1, -1, 1, 1)


def _zero(module: nn.Module, *names: str) -> None:
    """Zero the parameters whose name holds one of `names`: a block then starts as the identity."""
    for name, weight in module.named_parameters():
        if any(part in name for part in names):
            nn.init.zeros_(weight)


# --- the models ---------------------------------------------------------------------------------


class SD3(Recipe):
    """emoji-sd3: MMDiT with two CLIP text encoders, flow matching."""

    compiled = ("JointTransformerBlock",)

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        tokenizer = clip_tokenizer(captions)
        t5, letters = silent_t5()
        mmdit = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            num_attention_heads=4,
            attention_head_dim=40,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=4 * 40,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )
        _zero(mmdit, "proj_out", "norm1.linear", "norm1_context.linear", "norm_out.linear")
        return StableDiffusion3Pipeline(
            transformer=mmdit,
            vae=image_vae(1.5305, 0.0609),
            text_encoder=clip_encoder(tokenizer, projected=True, layers=2),
            text_encoder_2=clip_encoder(tokenizer, projected=True, layers=2),
            text_encoder_3=t5,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            tokenizer_3=letters,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )

    def trained(self, pipe: DiffusionPipeline) -> list[nn.Module]:
        return [*super().trained(pipe), pipe.text_encoder_2]

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        embeds = nn.functional.pad(embeds, (0, 0, 0, 256))  # what the silent T5 says of its 256 tokens
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(prompt, None, None)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        return flow_example(latents, shift=1.0)

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(noisy, timestep=time, **text).sample


class SD15(Recipe):
    """scenes-sd15: U-Net with one CLIP text encoder, v prediction."""

    data = "scenes"
    lr = 7e-4
    compiled = ("BasicTransformerBlock", "ResnetBlock2D")

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        tokenizer = clip_tokenizer(captions)
        return StableDiffusionPipeline(
            unet=self.unet(channels=(48, 80, 96), attention_head_dim=(3, 5, 6), cross_attention_dim=TEXT_WIDTH),
            vae=image_vae(0.18215),
            text_encoder=clip_encoder(tokenizer, projected=False, layers=3),
            tokenizer=tokenizer,
            scheduler=self.scheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @staticmethod
    def unet(channels: tuple[int, ...], **options: Any) -> UNet2DConditionModel:
        """A U-Net for latents [4, 32, 32] that attends to the text in its two lower levels."""
        unet = UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=channels,
            layers_per_block=1,
            norm_num_groups=8,
            use_linear_projection=True,
            **options,
        )
        nn.init.zeros_(unet.conv_out.weight)
        return unet.to(memory_format=torch.channels_last)

    @staticmethod
    def scheduler(**options: Any) -> DDIMScheduler:
        """Stable Diffusion's noise levels."""
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            **options,
        )

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipe.text_encoder(ids)[0]}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipe.encode_prompt(prompt, "cpu", 1, False)[0]}

    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        return noise_example(latents, pipe.scheduler)

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        return pipe.unet(noisy.contiguous(memory_format=torch.channels_last), time, **text).sample


class SDXL(SD15):
    """emoji-sdxl: U-Net with two CLIP text encoders and the sizes of the picture, noise prediction."""

    data = "emoji"

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        tokenizer = clip_tokenizer(captions)
        return StableDiffusionXLPipeline(
            unet=self.unet(
                channels=(48, 96, 96),
                attention_head_dim=(2, 4, 4),
                transformer_layers_per_block=(1, 1, 2),
                cross_attention_dim=2 * TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=32,
                projection_class_embeddings_input_dim=6 * 32 + TEXT_WIDTH,
            ),
            vae=image_vae(0.13025),
            text_encoder=clip_encoder(tokenizer, projected=False, layers=2),
            text_encoder_2=clip_encoder(tokenizer, projected=True, layers=2),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=self.scheduler(prediction_type="epsilon", timestep_spacing="leading"),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )

    def trained(self, pipe: DiffusionPipeline) -> list[nn.Module]:
        return [*super().trained(pipe), pipe.text_encoder_2]

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"encoder_hidden_states": embeds, "text_embeds": outputs[1].text_embeds}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(prompt)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        sizes = noisy.new_tensor([SIZE, SIZE, 0, 0, SIZE, SIZE]).expand(len(noisy), -1)
        added = {"text_embeds": text["text_embeds"], "time_ids": sizes}
        inputs = noisy.contiguous(memory_format=torch.channels_last)
        embeds = text["encoder_hidden_states"]
        return pipe.unet(inputs, time, encoder_hidden_states=embeds, added_cond_kwargs=added).sample


class PixArt(Recipe):
    """emoji-pixart: a transformer with cross attention to T5, noise prediction."""

    lr = 7e-4
    compiled = ("BasicTransformerBlock",)

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        tokenizer = t5_tokenizer(captions)
        transformer = PixArtTransformer2DModel(
            sample_size=32,
            num_attention_heads=4,
            attention_head_dim=48,
            cross_attention_dim=4 * 48,
            out_channels=8,  # the last four are a learned variance, which the pipeline ignores
            num_layers=5,
            caption_channels=TEXT_WIDTH,
        )
        _zero(transformer, "proj_out")
        return PixArtSigmaPipeline(
            transformer=transformer,
            vae=image_vae(0.13025),
            text_encoder=t5_encoder(tokenizer, T5Config, T5EncoderModel),
            tokenizer=tokenizer,
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        mask = (ids != pipe.tokenizer.pad_token_id).long()
        embeds = pipe.text_encoder(ids, attention_mask=mask)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        embeds, mask, *_ = pipe.encode_prompt(prompt, False, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        return noise_example(latents, pipe.scheduler)

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        return pipe.transformer(noisy, timestep=time, added_cond_kwargs=sizes, **text).sample.chunk(2, dim=1)[0]


class Wan(Recipe):
    """emoji-wan: a transformer for clips with cross attention to UMT5, flow matching."""

    data = "clips"
    batch = 256
    compiled = ("WanTransformerBlock",)
    vae_seconds = 180.0  # its 3D convolutions are slow
    vae_batch = 12
    shift = 3.0

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        tokenizer = t5_tokenizer(captions)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=4,
            attention_head_dim=48,
            in_channels=8,
            out_channels=8,
            text_dim=TEXT_WIDTH,
            freq_dim=128,
            ffn_dim=512,
            num_layers=6,
        )
        _zero(transformer, "proj_out")
        vae = AutoencoderKLWan(  # clips [3, 9, 64, 64] to latents [8, 5, 16, 16]
            base_dim=16,
            z_dim=8,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        )
        _channels_last(vae)
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift
        )
        return WanPipeline(
            transformer=transformer,
            vae=vae,
            text_encoder=t5_encoder(tokenizer, UMT5Config, UMT5EncoderModel),
            tokenizer=tokenizer,
            scheduler=scheduler,
        )

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        mask = (ids != pipe.tokenizer.pad_token_id).long()
        embeds = pipe.text_encoder(ids, attention_mask=mask)[0]
        return {"encoder_hidden_states": embeds * mask[:, :, None]}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        return {"encoder_hidden_states": pipe.encode_prompt(prompt, max_sequence_length=TOKENS)[0]}

    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        return flow_example(latents, self.shift)

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        return pipe.transformer(noisy, time, **text).sample


class Qwen(Recipe):
    """scenes-qwen: MMDiT with a causal text encoder, flow matching."""

    data = "scenes"
    empty = " "
    compiled = ("QwenImageTransformerBlock",)
    tokens = 40  # of a text and the template behind it

    def build(self, captions: Sequence[str]) -> DiffusionPipeline:
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=5,
            attention_head_dim=48,
            num_attention_heads=3,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 16, 16),
        )
        # It rounds the time step to the type of this layer's output, which autocast would make bfloat16.
        transformer.img_in.register_forward_hook(lambda module, args, output: output.float())
        _zero(transformer, "proj_out", "img_mod", "txt_mod", "norm_out.linear")
        vae = AutoencoderKLQwenImage(  # pictures [3, 1, 64, 64] to latents [4, 1, 32, 32]
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        _channels_last(vae)
        pipe = QwenImagePipeline(
            scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
        )
        tokenizer = qwen_tokenizer(captions, pipe.prompt_template_encode)
        front = len(tokenizer(pipe.prompt_template_encode.split("{}")[0]).input_ids)
        if front != pipe.prompt_template_encode_start_idx:
            raise ValueError(f"the template begins with {front} tokens, of which the pipeline drops another number")
        text = dict(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.05,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        eyes = dict(  # which see nothing here
            depth=1, hidden_size=16, intermediate_size=16, num_heads=1, out_hidden_size=TEXT_WIDTH, patch_size=2
        )
        config = Qwen2_5_VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=True)
        pipe.register_modules(tokenizer=tokenizer, text_encoder=Qwen2_5_VLForConditionalGeneration(config))
        return pipe

    def tokenize(self, pipe: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
        texts = [pipe.prompt_template_encode.format(caption) for caption in captions]
        return _padded(pipe.tokenizer, texts, pipe.prompt_template_encode_start_idx + self.tokens)

    def pixels(self, pictures: Tensor) -> Tensor:
        return pictures.unsqueeze(2)

    def trained(self, pipe: DiffusionPipeline) -> list[nn.Module]:
        return [pipe.transformer, pipe.text_encoder.model.language_model]

    def encode(self, pipe: DiffusionPipeline, ids: Tensor) -> dict[str, Tensor]:
        start = pipe.prompt_template_encode_start_idx
        mask = (ids != pipe.tokenizer.pad_token_id)[:, start:]
        model = pipe.text_encoder.model.language_model  # causal, so what is behind a text needs no mask
        hidden = model(ids, use_cache=False).last_hidden_state
        embeds = hidden[:, start:] * mask[:, :, None]
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

    def encode_prompt(self, pipe: DiffusionPipeline, prompt: str) -> dict[str, Tensor]:
        embeds, _ = pipe.encode_prompt(prompt)  # all of it is text; training pads it
        missing = self.tokens - embeds.shape[1]
        mask = nn.functional.pad(embeds.new_ones(embeds.shape[:2]), (0, missing)).bool()
        padded = nn.functional.pad(embeds, (0, 0, 0, missing))
        return {"encoder_hidden_states": padded, "encoder_hidden_states_mask": mask}

    def example(self, pipe: DiffusionPipeline, latents: Tensor) -> Example:
        return flow_example(latents, shift=math.exp(pipe.scheduler.config.base_shift))

    def predict(self, pipe: DiffusionPipeline, noisy: Tensor, time: Tensor, text: dict[str, Tensor]) -> Tensor:
        size, channels, _, height, width = noisy.shape
        packed = pipe._pack_latents(noisy, size, channels, height, width)
        shapes = [[(1, height // 2, width // 2)]] * size
        answer = pipe.transformer(packed, timestep=time / 1000, img_shapes=shapes, **text).sample
        return pipe._unpack_latents(answer, 2 * height, 2 * width, pipe.vae_scale_factor)


RECIPES: dict[str, Recipe] = {
    "emoji-sd3": SD3(),
    "emoji-sdxl": SDXL(),
    "emoji-wan": Wan(),
    "emoji-pixart": PixArt(),
    "scenes-qwen": Qwen(),
    "scenes-sd15": SD15(),
}
