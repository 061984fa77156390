"""Draws a labelled sheet of what a small model makes of twelve prompts, with the stock diffusers pipeline.

python benchmarks/models/sample.py --model benchmarks/models/emoji-sd3 --out emoji-sd3.png
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

EMOJI = (
    "google style emoji of grinning face",
    "google style emoji of red apple",
    "google style emoji of slice of pizza",
    "google style emoji of rocket",
    "google style emoji of dog face",
    "google style emoji of sunflower",
    "twitter style emoji of octopus",
    "twitter style emoji of strawberry",
    "twitter style emoji of smiling face with sunglasses",
    "twitter style emoji of christmas tree",
    "twitter style emoji of fire engine",
    "twitter style emoji of frog face",
)
FRAMES = 9  # of a clip
FILES = {
    "QwenImagePipeline": "prompts_scenes.txt",
    "StableDiffusionPipeline": "prompts_scenes.txt",
    "WanPipeline": "prompts_clips.txt",
}


def prompts_of(pipe: DiffusionPipeline) -> list[str]:
    """Twelve prompts of the kind that the model was trained on."""
    name = FILES.get(type(pipe).__name__)
    return (Path(__file__).parent / name).read_text().splitlines()[:12] if name else list(EMOJI)


def arguments(pipe: DiffusionPipeline, prompts: Sequence[str], guidance: float) -> dict[str, Any]:
    """What the pipeline is called with: the sizes and the length of text that the model was trained on."""
    given: dict[str, Any] = {"prompt": list(prompts), "guidance_scale": guidance}
    match type(pipe).__name__:
        case "QwenImagePipeline":
            del given["guidance_scale"]
            given |= {"true_cfg_scale": guidance, "negative_prompt": [" "] * len(prompts), "height": 64, "width": 64}
        case "WanPipeline":
            given |= {"height": 64, "width": 64, "num_frames": FRAMES, "max_sequence_length": 32, "output_type": "pil"}
        case "PixArtSigmaPipeline":
            given |= {"max_sequence_length": 32, "clean_caption": False, "use_resolution_binning": False}
    return given


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's transformer or U-Net."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def noise(pipe: Any, seeds: Iterable[int]) -> torch.Tensor:
    """What the pipeline starts from, a sample a seed: drawn in float32 on the CPU, whatever runs where."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    network = denoiser(pipe)
    channels, extra = network.config.in_channels, {}
    match type(pipe).__name__:
        case "QwenImagePipeline":
            channels //= 4  # two by two places are one token
        case "WanPipeline":
            extra["num_frames"] = FRAMES
    found = pipe.prepare_latents(
        len(generators), channels, 64, 64, dtype=torch.float32, device="cpu", generator=generators, **extra
    )
    latents = found[0] if isinstance(found, tuple) else found
    return latents.to(pipe.device, network.dtype)


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], *, steps: int = 50, guidance: float = 5.0, seed: int = 0
) -> list[Image.Image]:
    """One RGB picture a prompt, in one batch; picture i starts from `seed + i`. A clip is a strip of frames."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    drawn = pipe(**arguments(pipe, prompts, guidance), num_inference_steps=steps, generator=generators)
    return [_strip(frames[::4]) for frames in drawn.frames] if "frames" in drawn else drawn.images


def _strip(frames: list[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * width, 0))
    return strip


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Lays pictures out in rows, 3x enlarged, the caption under each."""
    width, height = 3 * pictures[0].width, 3 * pictures[0].height
    columns, text = max(2, 1152 // width), 62
    canvas = Image.new("RGB", (columns * (width + 8), -(-len(pictures) // columns) * (height + text)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * (width + 8) + 4, index // columns * (height + text)
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        pen.text((left, top + height + 2), textwrap.fill(caption, width // 6), fill="black", font=font)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved pipeline")
    parser.add_argument("--out", required=True, help="the .png file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(args.model, local_files_only=True).to(args.device)
    prompts = prompts_of(pipe)
    sheet(draw(pipe, prompts, steps=args.steps, guidance=args.guidance, seed=args.seed), prompts).save(args.out)


if __name__ == "__main__":
    main()
