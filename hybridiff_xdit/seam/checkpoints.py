"""Which checkpoint does a name mean? Hub ids, local diffusers folders and the embedded models. No xfuser here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..planner.denoisers import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SDXL, Settings

#: Families whose layers `hybrid-cond` splits, by the prefix of the pipeline class in ``model_index.json``.
FAMILIES = {"StableDiffusion3": "sd3", "StableDiffusionXL": "sdxl"}

#: The models that this repository makes, and what a call asks of them unless the user says otherwise.
EMBEDDED: dict[str, dict[str, Any]] = {
    "emoji-sd3": {},
    "emoji-sdxl": {},
    "emoji-wan": {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 32},
    "scenes-qwen": {"height": 64, "width": 64},
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in diffusers format.

    Attributes:
        name: what the user wrote.
        source: hub id or folder, for ``from_pretrained``.
        pipeline: class of the pipeline; None of a hub id that is not known here.
        dtype: dtype of the weights on a GPU.
        index: of a folder, its ``model_index.json``.
        asks: what a call asks for, in place of the pipeline's defaults.
    """

    name: str
    source: str
    pipeline: str | None = None
    dtype: torch.dtype = torch.bfloat16
    index: dict[str, Any] = field(default_factory=dict)
    asks: dict[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> tuple[str, ...]:
        """Components that the folder says it has none of; ``from_pretrained`` wants to be told so."""
        return tuple(part for part, origin in self.index.items() if origin == [None, None])


@dataclass(frozen=True, kw_only=True)
class FamilyCheckpoint(Checkpoint):
    """One of a family whose layers can be split, and what it is run with unless the user says otherwise.

    Attributes:
        family: ``sd3`` or ``sdxl``.
        size: height and width of the picture, pixels.
        denoiser: the denoiser's configuration.
    """

    family: str
    denoiser: Settings
    size: int = 1024
    steps: int = 50
    guidance_scale: float = 7.0
    dtype: torch.dtype = torch.float16


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

#: Short names of those, and those of xDiT's runner.
SHORT = {
    **dict(zip(("sdxl", "sd3-medium", "sd3.5-medium", "sd3.5-large"), _HUB, strict=True)),
    **dict.fromkeys(("SD3.5", "stable-diffusion-3.5-large"), "stabilityai/stable-diffusion-3.5-large"),
}


def resolve(name: str) -> Checkpoint:
    """Find the checkpoint that ``--model name`` means. Nothing is fetched: a hub id may turn out to be none.

    Raises:
        ValueError: it is no folder in diffusers format, no name that is known here, and cannot be a hub id.
    """
    source = SHORT.get(name, name)
    if source in _HUB:
        return FamilyCheckpoint(name=name, source=source, **_HUB[source])
    folder = _embedded(name) if name in EMBEDDED else Path(name)
    if (folder / "model_index.json").is_file():
        return _read_folder(name, folder)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not folder.exists():
        return Checkpoint(name=name, source=name)
    raise ValueError(
        f"--model {name}: no such model. Give a folder in diffusers format (with model_index.json), a hub id "
        f"(owner/name), or one of {', '.join([*SHORT, *EMBEDDED])}."
    )


def resolve_family(name: str) -> FamilyCheckpoint:
    """As `resolve`, for what is known of two families alone.

    Raises:
        ValueError: the checkpoint is of neither.
    """
    checkpoint = resolve(name)
    if not isinstance(checkpoint, FamilyCheckpoint):
        raise ValueError(f"--model {name}: the planner knows SD3, SD3.5 and SDXL only.")
    return checkpoint


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
    facts = {"name": name, "source": str(folder), "pipeline": index.get("_class_name", ""), "index": index}
    family = next((f for prefix, f in FAMILIES.items() if facts["pipeline"].startswith(prefix)), None)
    if family is None:
        return Checkpoint(**facts, asks=EMBEDDED.get(name, {}))
    denoiser = _json(folder / ("transformer" if family == "sd3" else "unet") / "config.json")
    vae = _json(folder / "vae" / "config.json")
    return FamilyCheckpoint(
        **facts,
        family=family,
        denoiser=denoiser,
        size=denoiser["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
        guidance_scale=5.0 if name in EMBEDDED or family == "sdxl" else 7.0,
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
