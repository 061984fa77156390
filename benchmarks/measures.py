"""How close pictures are to those of one GPU, and whether they still show what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from models.classifier import FEATURES, Classifier
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hybridiff_xdit.measures import Measure, lpips, psnr, ssim

CLASSIFIER = Path(__file__).parent / "models" / "emoji-classifier"


class Judge:
    """Measures the pictures of a list of captions.

    Args:
        captions: one a picture.
        clip: folder of a CLIP checkpoint, for the CLIP score.
    """

    def __init__(self, captions: Sequence[str], device: torch.device, clip: Path | None = None) -> None:
        self.captions = list(captions)
        self._classifier = Classifier(CLASSIFIER, device)
        self._further = _further_measures(self.captions, device, clip)

    def alone(self, pictures: Tensor) -> dict[str, float]:
        """Measures that need no reference; pictures [N, 3, H, W]."""
        features = self._classifier(pictures)
        return {
            "retrieval": round(self._classifier.finds(features, self.captions).float().mean().item(), 4),
            "frechet_training": round(frechet(features, self._classifier.features), 5),
        }

    def beside(self, pictures: Tensor, reference: Tensor) -> dict[str, float | list[float]]:
        """Measures against the one-GPU pictures."""
        values = psnr(pictures, reference)
        return {
            "psnr": [round(values.mean().item(), 2), round(values.quantile(0.05).item(), 2)],  # mean, 5th percentile
            "ssim": round(ssim(pictures, reference), 5),
            "frechet": round(frechet(self._classifier(pictures), self._classifier(reference)), 5),
            **{name: round(measure(pictures, reference), 5) for name, measure in self._further.items()},
        }


def frechet(features: Tensor, known: Tensor) -> float:
    """Frechet distance of two sets of the classifier's features, each [N, FEATURES]."""
    identity = nn.Identity()
    identity.num_features = FEATURES
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(known.cpu(), real=True)
    metric.update(features.cpu(), real=False)
    return max(0.0, float(metric.compute()))


def _further_measures(captions: list[str], device: torch.device, clip: Path | None) -> dict[str, Measure]:
    """Measures whose weights lie on this disk: nothing is downloaded."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    measures: dict[str, Measure] = {}
    if perceptual := lpips(device):
        measures["lpips"] = perceptual
    if find_spec("torch_fidelity") and list(checkpoints.glob("weights-inception-2015-12-05-*.pth")):
        inception = FrechetInceptionDistance(normalize=True).to(device)

        def fid(pictures: Tensor, reference: Tensor) -> float:
            inception.reset()
            inception.update(reference, real=True)
            inception.update(pictures, real=False)
            return float(inception.compute())

        measures["fid"] = fid
    if clip is not None:
        measures["clip"] = _clip_score(captions, device, clip)
    return measures


def _clip_score(captions: list[str], device: torch.device, folder: Path) -> Measure:
    """100 cos(picture, caption), the mean; torchmetrics' own does not run with transformers 5."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device)
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def score(pictures: Tensor, reference: Tensor) -> float:
        images = list((255 * pictures).round().byte().cpu())
        inputs = processor(text=captions, images=images, return_tensors="pt", padding=True, truncation=True).to(device)
        found = model(**inputs)
        return 100 * (found.image_embeds * found.text_embeds).sum(1).mean().item()

    return score
