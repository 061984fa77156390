"""How close pictures are to others. Needs torchmetrics: the extra ``compare``."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

BEST_PSNR = 100.0  # dB: what a picture that is the same bit for bit counts as

Measure = Callable[[Tensor, Tensor], float]  # (pictures, reference), each [N, 3, H, W] in [0, 1]


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each picture in dB, at most `BEST_PSNR`: [N]."""
    values = peak_signal_noise_ratio(pictures, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=BEST_PSNR)


def ssim(pictures: Tensor, reference: Tensor) -> float:
    """Structural similarity, the mean."""
    return float(structural_similarity_index_measure(pictures, reference, data_range=1.0))  # type: ignore[arg-type]


def lpips(device: torch.device) -> Measure | None:
    """LPIPS, the mean; None where its weights are not on this disk: nothing is downloaded."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if not find_spec("torchvision") or not list(checkpoints.glob("alexnet-owt-*.pth")):
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    measure = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(device)
    return lambda pictures, reference: float(measure(pictures, reference))
