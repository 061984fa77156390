"""Which checkpoint does a name mean? Hub ids, local diffusers folders and the embedded models. No xfuser here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..planner.denoisers import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SDXL, Settings

#: Families that `hybrid-cond` splits, by the prefix of the pipeline class in ``model_index.json``.
FAMILIES = {"StableDiffusion3": "sd3", "StableDiffusionXL": "sdxl"}

EMBEDDED = ("emoji-sd3", "emoji-sdxl")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint and what it is run with unless the user says otherwise.

    Attributes:
        name: what the user wrote.
        source: hub id or folder, for ``from_pretrained``.
        family: ``sd3`` or ``sdxl``.
        size: height and width of the picture, pixels.
        dtype: dtype of the weights on a GPU.
        denoiser: the denoiser's configuration.
        absent: components that the folder says it has none of; ``from_pretrained`` wants to be told so.
    """

    name: str
    source: str
    family: str
    denoiser: Settings
    size: int = 1024
    steps: int = 50
    guidance_scale: float = 7.0
    dtype: torch.dtype = torch.float16
    absent: tuple[str, ...] = ()


_HUB: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {"family": "sdxl", "denoiser": SDXL, "guidance_scale": 5.0},
    "stabilityai/stable-diffusion-3-medium-diffusers": {"family": "sd3", "denoiser": SD3_MEDIUM},
    "stabilityai/stable-diffusion-3.5-medium": {
        "family": "sd3",
        "denoiser": SD35_MEDIUM,
        "steps": 40,
        "guidance_scale": 4.5,
        "dtype": torch.bfloat16,
    },
    "stabilityai/stable-diffusion-3.5-large": {
        "family": "sd3",
        "denoiser": SD35_LARGE,
        "steps": 28,
        "guidance_scale": 3.5,
        "dtype": torch.bfloat16,
    },
}

#: Short names of those.
SHORT = dict(zip(("sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large"), _HUB, strict=True))


def resolve(name: str) -> Checkpoint:
    """Find the checkpoint that ``--model name`` means.

    Raises:
        ValueError: the name is none that `hybrid-cond` can run; the message lists those that are.
    """
    source = SHORT.get(name, name)
    if source in _HUB:
        return Checkpoint(name=name, source=source, **_HUB[source])
    folder = _embedded(name) if name in EMBEDDED else Path(name)
    if (folder / "model_index.json").is_file():
        return _read_folder(name, folder)
    raise ValueError(
        f"--model {name}: no such model. Give a folder in diffusers format (with model_index.json), "
        f"or one of {', '.join([*_HUB, *SHORT, *EMBEDDED])}."
    )


def _embedded(name: str) -> Path:
    named = os.environ.get("HYBRIDIFF_MODELS")
    folder = Path(named) if named else Path(__file__).parents[2] / "benchmarks" / "models"
    if not (folder / name / "model_index.json").is_file():
        raise ValueError(
            f"--model {name}: not found in {folder}. It comes with a checkout of the repository and is not in the "
            "wheel: install with 'pip install -e' from a checkout, or set HYBRIDIFF_MODELS to the folder that holds it."
        )
    return folder / name


def _read_folder(name: str, folder: Path) -> Checkpoint:
    index = _json(folder / "model_index.json")
    pipeline = index.get("_class_name", "")
    family = next((f for prefix, f in FAMILIES.items() if pipeline.startswith(prefix)), None)
    if family is None:
        raise ValueError(
            f"--model {name}: its model_index.json names {pipeline!r}, and hybrid-cond runs "
            f"{' and '.join(f'{prefix}Pipeline' for prefix in FAMILIES)} checkpoints only."
        )
    denoiser = _json(folder / ("transformer" if family == "sd3" else "unet") / "config.json")
    vae = _json(folder / "vae" / "config.json")
    size = denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    return Checkpoint(
        name=name,
        source=str(folder),
        family=family,
        denoiser=denoiser,
        size=size,
        guidance_scale=5.0 if name in EMBEDDED or family == "sdxl" else 7.0,
        absent=tuple(part for part, origin in index.items() if origin == [None, None]),
    )


def _json(path: Path) -> dict:
    return json.loads(path.read_text())
