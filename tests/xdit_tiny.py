"""Tiny random SD3 and SDXL checkpoints in diffusers format, with text encoders and tokenizers of their own."""

import json
import string
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@cache
def pipeline(name: str) -> DiffusionPipeline:
    """`tiny.pipeline`'s denoiser, scheduler and VAE, with text encoders, one for the whole process."""
    pipe = tiny.pipeline(name)
    tokenizer = _tokenizer()
    torch.manual_seed(1)
    first = CLIPTextModelWithProjection if "sd3" in name else CLIPTextModel
    texts = {
        "text_encoder": first(_text_config(tokenizer, 10)).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer, 10 if "sd3" in name else 20)).eval(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
    }
    settings = {} if "sd3" in name else {"add_watermarker": False}
    made = type(pipe)(**{**pipe.components, **texts}, **settings)
    made.set_progress_bar_config(disable=True)
    return made


def save(name: str, folder: Path) -> Path:
    """Write the checkpoint to ``folder``."""
    pipeline(name).save_pretrained(folder / name)
    return folder / name


def _text_config(tokenizer: CLIPTokenizer, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


#: What the tests call the pipelines with, by checkpoint.
CALLS = {
    "sd3": {"prompt": "a cat", "negative_prompt": "ugly", "num_inference_steps": 8, "guidance_scale": 7.0},
    "sdxl": {
        "prompt": ["a cat", "two dogs"],
        "negative_prompt": ["ugly", "grey"],
        "num_images_per_prompt": 2,
        "num_inference_steps": 8,
        "guidance_scale": 5.0,
    },
}
COMMON = {"height": 32, "width": 32, "output_type": "latent"}
ABSENT = {"sd3": {"text_encoder_3": None, "tokenizer_3": None}, "sdxl": {}}


def load(folder: Path) -> DiffusionPipeline:
    """The pipeline of a checkpoint."""
    pipe = DiffusionPipeline.from_pretrained(folder, **ABSENT["sdxl" if folder.name == "sdxl" else "sd3"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)
