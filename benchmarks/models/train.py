"""Trains one of two small text-to-image checkpoints on captioned emoji, within a time budget.

    python benchmarks/models/train.py --model emoji-sd3 --data .data/emoji.npz --out OUT

The folder written loads with the stock `StableDiffusion3Pipeline` (emoji-sd3) or
`StableDiffusionXLPipeline` (emoji-sdxl). Order of work: a VAE, its latents of the whole data set,
then the denoiser and both text encoders together; what is saved is their moving average.
"""

from __future__ import annotations

import time

START = time.monotonic()  # the budget counts the imports below too

import argparse  # noqa: E402
import copy  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import string  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tarfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import AbstractContextManager, nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402

import diffusers  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
import data as emoji_data  # noqa: E402
import sample  # noqa: E402

logger = logging.getLogger("emoji.train")

MODELS = ("emoji-sd3", "emoji-sdxl")
TOKENS = 32  # the tokenizers' model_max_length
VOCABULARY = 2560
TEXT_WIDTH = 128  # of each of the two text encoders
LATENT_CHANNELS = 4
T5_TOKENS = 256  # rows of zeros that SD3's encode_prompt appends: its T5 is silent here
SKIN_TONE_WEIGHT = 0.35  # half of the pictures are skin-tone variations: draw them less often
PART_BYTES = 15 * 2**20
CLIP_WORDS = (  # how CLIPTokenizer splits text before it applies the merges
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
CLIP_FOLDERS = ("text_encoder", "text_encoder_2")


# --- tokenizer ----------------------------------------------------------------------------------


def write_tokenizer(captions: Sequence[str], folder: Path) -> None:
    """Learns CLIP's byte-level BPE on `captions`; writes the files CLIPTokenizer reads."""
    pattern = models.BPE(end_of_word_suffix="</w>")
    learner = Tokenizer(pattern)
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(alphabet) - 2,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    pieces += [merge.replace(" ", "") for merge in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special, indent=2))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids as the pipelines make them: int64 [len(captions), TOKENS]."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


# --- models -------------------------------------------------------------------------------------


def build_text_encoders(model: str, tokenizer: CLIPTokenizer) -> list[nn.Module]:
    """Two CLIP text encoders; SDXL's first one has no projection, like the real one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    first = CLIPTextModel if model == "emoji-sdxl" else CLIPTextModelWithProjection
    encoders = [first(copy.deepcopy(config)), CLIPTextModelWithProjection(copy.deepcopy(config))]
    for encoder in encoders:
        for name, weight in encoder.named_parameters():
            if "token_embedding" in name:
                nn.init.normal_(weight, std=0.3)
            elif "position_embedding" in name:
                nn.init.normal_(weight, std=0.1)
    return encoders


def build_silent_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder whose output is zero, and a tokenizer of single letters.

    `StableDiffusion3Pipeline.from_pretrained(folder)` wants a third encoder unless told
    `text_encoder_3=None, tokenizer_3=None`, and without one it uses zeros. This one yields the
    same zeros, so both ways of loading the folder draw the same pictures.
    """
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase + string.digits]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * TEXT_WIDTH,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_denoiser(model: str) -> nn.Module:
    """The MMDiT of SD3 or the U-Net of SDXL, small, for [B, 4, 32, 32] latents."""
    if model == "emoji-sd3":
        mmdit = SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=8,
            num_attention_heads=4,
            attention_head_dim=56,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=4 * 56,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )
        for name, weight in mmdit.named_parameters():  # each block starts as the identity
            if name.startswith("proj_out") or ("norm" in name and ".linear." in name):
                nn.init.zeros_(weight)
        return mmdit
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + TEXT_WIDTH,
    )
    nn.init.zeros_(unet.conv_out.weight)
    return unet


def build_vae(model: str) -> AutoencoderKL:
    """A 2x downsampling VAE with the latent scale (and shift) of the real SD3 or SDXL VAE."""
    sd3 = model == "emoji-sd3"
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=LATENT_CHANNELS,
        sample_size=emoji_data.SIZE,
        scaling_factor=1.5305 if sd3 else 0.13025,
        shift_factor=0.0609 if sd3 else None,
        force_upcast=False,
    )


def build_scheduler(model: str) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """The sampler the checkpoint is saved with."""
    if model == "emoji-sd3":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


class OneForManyZeros:
    """Joint attention in which the last text token stands for `count` equal ones.

    SD3's `encode_prompt` with a silent T5 appends 256 rows of zeros. They carry no position, so
    they stay equal through all blocks, and one of them whose logit is raised by log(256) gives
    exactly the same result. The logit is raised through 8 more channels of query and key, so that
    the fast attention kernels apply. For training only: the saved model has no trace of it.
    """

    def __init__(self, count: int = T5_TOKENS) -> None:
        self.count = count

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Both streams' attention outputs, shaped as the inputs [B, N, C] and [B, T, C]."""
        batch, length, width = hidden_states.shape

        def heads(states: Tensor, norm: nn.Module | None = None) -> Tensor:
            states = states.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2)
            return states if norm is None else norm(states)

        text = encoder_hidden_states
        query = torch.cat(
            [
                heads(attn.to_q(hidden_states), attn.norm_q),
                heads(attn.add_q_proj(text), attn.norm_added_q),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                heads(attn.to_k(hidden_states), attn.norm_k),
                heads(attn.add_k_proj(text), attn.norm_added_k),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(hidden_states)), heads(attn.add_v_proj(text))], dim=2)
        query, key = query.to(value.dtype), key.to(value.dtype)
        head_dim = query.shape[-1]
        raised = math.log(self.count) * math.sqrt(head_dim)
        coarse = math.floor(raised)  # two channels, so that bfloat16 holds the sum well
        bias = F.pad(query.new_tensor([[coarse, raised - coarse]]), (0, 6, key.shape[2] - 1, 0))
        ones = F.pad(query.new_ones(1, 2), (0, 6)).expand(*query.shape[:3], 8)
        attended = F.scaled_dot_product_attention(
            torch.cat([query, ones], dim=-1),
            torch.cat([key, bias.expand(*key.shape[:2], -1, -1)], dim=-1),
            F.pad(value, (0, 8)),
            scale=1 / math.sqrt(head_dim),
        )[..., :head_dim]
        attended = attended.transpose(1, 2).reshape(batch, -1, width)
        image, text = attended[:, :length], attended[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


def encode_text(model: str, encoders: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the pipeline's `encode_prompt` yields for `ids` int64 [B, TOKENS].

    Returns the token embeddings [B, TOKENS, 2 * TEXT_WIDTH] (for SD3 without the zeros of the
    silent T5 encoder) and the pooled embedding [B, 2 * TEXT_WIDTH] (SD3) or [B, TEXT_WIDTH].
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    if model == "emoji-sdxl":
        return embeds, outputs[1][0]
    return embeds, torch.cat([output[0] for output in outputs], dim=-1)


def count(module: nn.Module) -> float:
    """Parameters of `module`, in millions."""
    return sum(weight.numel() for weight in module.parameters()) / 1e6


# --- VAE ----------------------------------------------------------------------------------------


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on a GPU, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def train_vae(vae: AutoencoderKL, pictures: Tensor, batch: int, until: float) -> None:
    """Trains `vae` on `pictures` uint8 [N, 3, 64, 64] until time.monotonic() passes `until`."""
    device, begin, step, logged = pictures.device, time.monotonic(), 0, time.monotonic()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    while (now := time.monotonic()) < until:
        progress = (now - begin) / (until - begin)
        rate = 2e-3 * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * math.cos(progress * math.pi / 2))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = pictures[torch.randint(len(pictures), (batch,), device=device)]
        picked = picked.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(picked).latent_dist
            again = vae.decode(posterior.sample()).sample
        again = again.float()
        loss = F.l1_loss(again, picked) + F.mse_loss(again, picked)
        loss = loss + 1e-6 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if now - logged > 15:
            logged = now
            speed = step / (now - begin)
            logger.info("vae step %d loss %.4f %.1f it/s", step, loss.item(), speed)
    logger.info("vae done: %d steps", step)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior means of `pictures` uint8 [N, 3, 64, 64]: float32 [N, 4, 32, 32]."""
    return torch.cat([vae.encode(p.float() / 127.5 - 1).latent_dist.mode() for p in pictures.split(128)])


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Gives each latent channel mean `shift_factor` and deviation 1 / `scaling_factor`.

    `latents` float32 [N, 4, 32, 32] are the VAE's own. The affine map goes into the 1x1
    convolutions after the encoder and before the decoder, so pictures decode as before.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    shift = vae.config.shift_factor or 0.0
    scale = 1 / (vae.config.scaling_factor * std)
    channels, encode, decode = len(mean), vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] *= scale.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) * scale + shift
    encode.bias[channels:] += 2 * scale.log()
    decode.bias += decode.weight[:, :, 0, 0] @ (mean - shift / scale)
    decode.weight /= scale.view(1, -1, 1, 1)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean PSNR in dB of the reconstructions of `pictures` uint8 [N, 3, 64, 64]."""
    values = []
    for part in pictures.split(128):
        part = part.float() / 127.5 - 1
        again = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * torch.log10(4 / (again - part).square().mean((1, 2, 3)).clamp(min=1e-8)))
    return torch.cat(values).mean().item()


# --- denoiser -----------------------------------------------------------------------------------


class Trainer:
    """The denoiser and both text encoders, their optimizer and their moving averages."""

    def __init__(
        self,
        model: str,
        denoiser: nn.Module,
        encoders: Sequence[nn.Module],
        empty: Tensor,
        *,
        batch: int,
        lr: float,
        device: torch.device,
        compiled: bool,
    ) -> None:
        """`empty`: the token ids of the empty caption, int64 [TOKENS]."""
        self.model, self.batch, self.lr, self.device = model, batch, lr, device
        self.denoiser, self.encoders, self.empty = denoiser, list(encoders), empty
        if model == "emoji-sd3":
            denoiser.set_attn_processor(OneForManyZeros())
        else:
            denoiser.to(memory_format=torch.channels_last)
            scheduler = build_scheduler(model)
            self.alphas = scheduler.alphas_cumprod.to(device)
        self.net = torch.compile(denoiser) if compiled else denoiser
        self.weights = [w for m in (denoiser, *encoders) for w in m.parameters()]
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.steps = 0

    def loss(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Scalar loss for scaled latents [B, 4, 32, 32] and token ids int64 [B, TOKENS]."""
        dropped = torch.rand(len(ids), 1, device=self.device) < 0.1
        embeds, pooled = encode_text(self.model, self.encoders, torch.where(dropped, self.empty, ids))
        noise, size = torch.randn_like(latents), len(latents)
        if self.model == "emoji-sd3":
            normal = torch.randn(size, device=self.device).sigmoid()
            uniform = torch.rand(size, device=self.device)  # a fifth: keeps both ends trained
            sigma = torch.where(torch.rand_like(uniform) < 0.2, uniform, normal)
            mix = sigma.view(-1, 1, 1, 1)
            predicted = self.net(
                hidden_states=(1 - mix) * latents + mix * noise,
                encoder_hidden_states=F.pad(embeds, (0, 0, 0, 1)),
                pooled_projections=pooled,
                timestep=1000 * sigma,
                return_dict=False,
            )[0]
            return F.mse_loss(predicted.float(), noise - latents)
        steps = torch.randint(1000, (size,), device=self.device)
        alpha = self.alphas[steps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        side = float(emoji_data.SIZE)
        time_ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device)
        predicted = self.net(
            noisy.contiguous(memory_format=torch.channels_last),
            steps,
            encoder_hidden_states=embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids.expand(size, 6)},
            return_dict=False,
        )[0]
        snr = self.alphas[steps] / (1 - self.alphas[steps])
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        # Min-SNR weights and, where the noise is high, as much as a velocity loss would give: layout
        # and the binding to the text are learned there, and plain noise prediction all but ignores it.
        return (error * ((snr.clamp(max=5.0) + 1) / snr).clamp(max=30.0)).mean()

    def step(self, latents: Tensor, ids: Tensor, progress: float) -> Tensor:
        """One update; `progress` in [0, 1] is the share of the time that is over."""
        rate = self.lr * min(1.0, (self.steps + 1) / 300)
        rate *= 0.005 + 0.995 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.device):
            loss = self.loss(latents, ids)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if dist.is_initialized():
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            shares = flat.split([gradient.numel() for gradient in gradients])
            for gradient, share in zip(gradients, shares, strict=True):
                gradient.copy_(share.view(gradient.shape))
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.steps += 1
        decay = min(0.999, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)
        return loss.detach()

    def averaged(self) -> tuple[nn.Module, list[nn.Module]]:
        """Copies of the denoiser and the encoders that hold the averaged weights."""
        modules = copy.deepcopy([self.denoiser, *self.encoders])
        with torch.no_grad():
            targets = [weight for module in modules for weight in module.parameters()]
            for target, value in zip(targets, self.average, strict=True):
                target.copy_(value)
        return modules[0], modules[1:]


# --- saving -------------------------------------------------------------------------------------


def save(
    model: str,
    vae: AutoencoderKL,
    denoiser: nn.Module,
    encoders: Sequence[nn.Module],
    tokenizer_folder: Path,
    out: Path,
) -> None:
    """Writes the pipeline's folder `out`: float16 safetensors, no file above 15 MB."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    parts = {
        "vae": copy.deepcopy(vae),
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": build_scheduler(model),
    }
    if model == "emoji-sd3":
        t5, letters = build_silent_t5()
        pipe = StableDiffusion3Pipeline(transformer=denoiser, text_encoder_3=t5, tokenizer_3=letters, **parts)
    else:
        pipe = StableDiffusionXLPipeline(
            unet=denoiser, force_zeros_for_empty_prompt=False, add_watermarker=False, **parts
        )
    half = pipe.to(device="cpu", dtype=torch.float16)
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half.save_pretrained(fresh, safe_serialization=True, max_shard_size="14MB")
    for name in ("tokenizer", "tokenizer_2"):  # the plain files, which every release can read
        shutil.rmtree(fresh / name)
        shutil.copytree(tokenizer_folder, fresh / name)
    for path in (fresh / f"{name}/model.safetensors" for name in CLIP_FOLDERS):
        weights = load_file(path)  # transformers 4 wants the prefix, 5 reads both
        state = {name if name.startswith("text_") else f"text_model.{name}": weight for name, weight in weights.items()}
        save_file(state, path, metadata={"format": "pt"})
    for path in fresh.glob("text_encoder*/config.json"):  # load as float32, like the other parts
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for path in fresh.glob("tokenizer_3/tokenizer_config.json"):  # transformers 4 takes no list of special tokens
        config = json.loads(path.read_text())
        config.pop("extra_special_tokens", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    index = fresh / "model_index.json"  # older releases know the fast tokenizer by this name
    index.write_text(index.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    logger.info("saved %s, %.1f MB", out, size / 1e6)


def load(model: str, folder: Path) -> tuple[AutoencoderKL, nn.Module, list[nn.Module]]:
    """The VAE, the denoiser and the text encoders of a saved pipeline, in float32."""
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    denoiser = pipe.transformer if model == "emoji-sd3" else pipe.unet
    for module in (denoiser, pipe.text_encoder, pipe.text_encoder_2):
        module.train().requires_grad_()
    return pipe.vae, denoiser, [pipe.text_encoder, pipe.text_encoder_2]


def write_parts(model: str, folder: Path, parts_out: Path) -> None:
    """Writes `folder` as `model`.tgz.00, .01, ...: a gzipped tar cut into parts of 15 MiB."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        tar.add(folder, arcname=model)
    content = buffer.getvalue()
    parts_out.mkdir(parents=True, exist_ok=True)
    for stale in parts_out.glob(f"{model}.tgz.*"):
        stale.unlink()
    for index, begin in enumerate(range(0, len(content), PART_BYTES)):
        part = parts_out / f"{model}.tgz.{index:02d}"
        part.write_bytes(content[begin : begin + PART_BYTES])
        logger.info("wrote %s, %.1f MB", part, part.stat().st_size / 1e6)


@torch.no_grad()
def verify(model: str, folder: Path) -> None:
    """Checks a saved folder, on the CPU in float32, against what training computed.

    The text embeddings of training equal the pipeline's `encode_prompt`, and for SD3 the one
    weighted zero token gives what the pipeline's 256 give.
    """
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    prompt = sample.PROMPTS[0]
    third = {"prompt_3": None} if model == "emoji-sd3" else {}
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(prompt=prompt, prompt_2=None, device="cpu", **third)
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    for text, full, vector in ((prompt, embeds, pooled), ("", negative, negative_pooled)):
        ours, our_vector = encode_text(model, encoders, tokenize(pipe.tokenizer, [text]))
        torch.testing.assert_close(full[:, :TOKENS], ours)
        torch.testing.assert_close(vector, our_vector)
        if full[:, TOKENS:].any():
            raise AssertionError("the tokens of the T5 encoder are not zeros")
    if model == "emoji-sd3":
        inputs = {
            "hidden_states": torch.randn(1, LATENT_CHANNELS, 32, 32),
            "pooled_projections": pooled,
            "timestep": torch.tensor([500.0]),
        }
        full = pipe.transformer(encoder_hidden_states=embeds, **inputs).sample
        pipe.transformer.set_attn_processor(OneForManyZeros(embeds.shape[1] - TOKENS))
        short = pipe.transformer(encoder_hidden_states=embeds[:, : TOKENS + 1], **inputs).sample
        torch.testing.assert_close(full, short, rtol=1e-3, atol=1e-4)
    logger.info("verified: training and %s.encode_prompt agree", type(pipe).__name__)


# --- command line -------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the .npz file of data.py")
    parser.add_argument("--init", type=Path, help="go on from this saved pipeline, VAE included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--parts-out", type=Path, help="folder of the cut tar and the sheet")
    parser.add_argument("--minutes", type=float, default=8.3, help="for everything, from start")
    parser.add_argument("--reserve", type=float, default=35.0, help="seconds kept for the end")
    parser.add_argument("--vae-seconds", type=float, default=75.0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--vae-batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use this many pictures only (smoke tests)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--warm-up", action="store_true", help="only fill torch.compile's cache")
    return parser.parse_args()


def warm_up(args: argparse.Namespace, trainer: Trainer) -> None:
    """One step on noise, which leaves the compiled kernels in the cache on disk."""
    latents = torch.randn(args.batch, LATENT_CHANNELS, 32, 32, device=trainer.device)
    trainer.step(latents, trainer.empty.expand(args.batch, TOKENS), 0.0).item()


def main() -> None:
    """Trains, saves, verifies and samples one model within the budget."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args.model} %(message)s", datefmt="%H:%M:%S")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(args.device)
    if ranks > 1:  # under torchrun: one process a GPU, gradients averaged
        if args.init is None:
            raise SystemExit("several processes need --init: the VAE is trained by one alone")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    is_first = ranks == 1 or dist.get_rank() == 0
    end = START + 60 * args.minutes - args.reserve
    parts_out = args.parts_out or args.out.parent
    parts_out.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    compiled = device.type == "cuda" and not args.no_compile

    helper = None
    if compiled and not args.warm_up and args.init is None:  # compiles beside the VAE's training
        helper = subprocess.Popen([sys.executable, *sys.argv, "--warm-up"])

    arrays, captions = emoji_data.load(args.data)
    arrays, captions = arrays[: args.limit], captions[: args.limit]
    tokenizer_folder = args.out.with_name(args.out.name + ".tokenizer")
    if args.init is not None:
        tokenizer_folder = args.init / "tokenizer"
    elif not args.warm_up:
        write_tokenizer(captions, tokenizer_folder)
    while not (tokenizer_folder / "tokenizer_config.json").exists():
        time.sleep(0.2)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    encoders, denoiser = build_text_encoders(args.model, tokenizer), build_denoiser(args.model)
    vae = build_vae(args.model)
    if args.init is not None:
        vae, denoiser, encoders = load(args.model, args.init)
    encoders = [encoder.to(device) for encoder in encoders]
    trainer = Trainer(
        args.model,
        denoiser.to(device),
        encoders,
        tokenize(tokenizer, [""])[0].to(device),
        batch=args.batch,
        lr=args.lr,
        device=device,
        compiled=compiled,
    )
    if args.warm_up:
        warm_up(args, trainer)
        logger.info("compile cache filled after %.0f s", time.monotonic() - START)
        return

    vae = vae.to(device, memory_format=torch.channels_last)
    logger.info(
        "parameters (M): denoiser %.2f, text encoders %.2f + %.2f, vae %.2f; vocabulary %d",
        count(trainer.denoiser),
        *map(count, encoders),
        count(vae),
        len(tokenizer),
    )
    pictures = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous().to(device)
    ids = tokenize(tokenizer, captions).to(device)
    weights = torch.tensor([SKIN_TONE_WEIGHT if "skin tone" in c else 1.0 for c in captions])
    weights = weights.to(device)

    if args.init is None:
        budget = min(args.vae_seconds, 0.2 * (end - START))
        train_vae(vae, pictures, min(args.vae_batch, 4 * args.batch), time.monotonic() + budget)
        standardise(vae, encode_all(vae, pictures))
    latents = encode_all(vae, pictures)
    shift = vae.config.shift_factor or 0.0
    latents = (latents - shift) * vae.config.scaling_factor
    deviation = [round(value, 3) for value in latents.std((0, 2, 3)).tolist()]
    logger.info("vae: PSNR %.2f dB, latents std %s", psnr(vae, pictures[::8]), deviation)
    if helper is not None:
        try:
            code = helper.wait(timeout=max(1.0, START + 170 - time.monotonic()))
        except subprocess.TimeoutExpired:
            helper.kill()
            code = None
        if code != 0:
            logger.warning("compiling failed or took too long (%s): training eagerly", code)
            trainer.net = trainer.denoiser

    def checkpoint() -> None:
        denoiser, text = trainer.averaged()
        save(args.model, vae, denoiser, text, tokenizer_folder, args.out)
        write_parts(args.model, args.out, parts_out)

    begin = logged = time.monotonic()
    logger.info("training for %.0f s, %.0f s after the start", end - begin, begin - START)
    marks, last, progress = [0.5, 0.8], 0, 0.0
    torch.manual_seed(args.seed + (dist.get_rank() if ranks > 1 else 0))
    while True:
        now = time.monotonic()
        if ranks == 1 or trainer.steps % 10 == 0:  # the first rank's clock is everyone's
            clock = torch.tensor((now - begin) / (end - begin), device=device)
            if ranks > 1:
                dist.broadcast(clock, 0)
            progress = clock.item()  # also keeps the host near the device
        if progress >= 1:
            break
        picked = torch.multinomial(weights, args.batch, replacement=True)
        try:
            loss = trainer.step(latents[picked], ids[picked], progress)
        except Exception:
            if trainer.steps or trainer.net is trainer.denoiser:
                raise
            logger.exception("the compiled model failed: training eagerly")
            trainer.net = trainer.denoiser
            continue
        if trainer.steps == 1:
            loss.item()
            logger.info("first step took %.1f s", time.monotonic() - now)
        if now - logged > 15:
            speed = (trainer.steps - last) / (now - logged)
            logged, last, value = now, trainer.steps, loss.item()
            logger.info("step %d loss %.4f %.1f it/s %.2f", last, value, speed, progress)
            if not math.isfinite(value):
                raise RuntimeError("the loss is not finite: the last checkpoint stands")
        if is_first and marks and progress > marks[0]:
            marks.pop(0)
            checkpoint()
    if not is_first:
        return
    logger.info("trained %d steps, %.0f s after the start", trainer.steps, time.monotonic() - START)
    checkpoint()
    sheet = parts_out / f"{args.model}.png"
    sample.contact_sheet(args.out, sheet, device=args.device, steps=args.sample_steps)
    verify(args.model, args.out)
    if args.init is None:
        shutil.rmtree(tokenizer_folder, ignore_errors=True)
    logger.info("done %.0f s after the start", time.monotonic() - START)


if __name__ == "__main__":
    main()
