"""Draws a labelled contact sheet of 12 well-known emoji with the stock diffusers pipeline.

python benchmarks/models/sample.py --model benchmarks/models/emoji-sd3 --out emoji-sd3.png
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger("emoji.sample")

PROMPTS = (
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


def draw(
    pipe: DiffusionPipeline,
    prompts: tuple[str, ...] = PROMPTS,
    *,
    steps: int = 50,
    guidance: float = 5.0,
    seed: int = 0,
) -> list[Image.Image]:
    """One RGB picture a prompt, in one batch; picture i starts from the seed `seed + i`."""
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
    ).images


def sheet(pictures: list[Image.Image], captions: tuple[str, ...], columns: int = 6) -> Image.Image:
    """Lays pictures out in rows of `columns`, 3x enlarged, the caption in two lines under each."""
    cell, text = 3 * pictures[0].width, 34
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (cell + 8), rows * (cell + text)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * (cell + 8) + 4, index // columns * (cell + text)
        canvas.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (left, top))
        head, _, tail = caption.partition(" emoji of ")
        pen.text((left, top + cell + 2), f"{head} emoji of\n{tail}", fill="black", font=font)
    return canvas


def contact_sheet(
    model: str | Path,
    out: str | Path,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.float32,
    steps: int = 50,
    guidance: float = 5.0,
    seed: int = 0,
) -> None:
    """Loads the folder `model` offline with its stock pipeline and writes the sheet to `out`."""
    pipe = DiffusionPipeline.from_pretrained(model, local_files_only=True).to(device, dtype)
    pictures = draw(pipe, steps=steps, guidance=guidance, seed=seed)
    sheet(pictures, PROMPTS).save(out)
    logger.info("%s: %d pictures -> %s", type(pipe).__name__, len(pictures), out)


def main() -> None:
    """Command line of `contact_sheet`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved pipeline")
    parser.add_argument("--out", required=True, help="the .png file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    contact_sheet(
        args.model,
        args.out,
        device=args.device,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
