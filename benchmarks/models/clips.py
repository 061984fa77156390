"""Short clips of one emoji that moves, turns or grows before a plain background, rendered on the device.

A caption reads "google style emoji of red apple moving left on blue".
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from sample import FRAMES
from scenes import COLOURS
from torch import Tensor

MOTIONS = {  # from the first to the last frame: x and y (half a picture is 1), angle, logarithm of the size
    "moving left": (-1.0, 0.0, 0.0, 0.0),
    "moving right": (1.0, 0.0, 0.0, 0.0),
    "moving up": (0.0, -1.0, 0.0, 0.0),
    "moving down": (0.0, 1.0, 0.0, 0.0),
    "turning left": (0.0, 0.0, -math.pi / 2, 0.0),
    "turning right": (0.0, 0.0, math.pi / 2, 0.0),
    "growing": (0.0, 0.0, 0.0, 0.9),
    "shrinking": (0.0, 0.0, 0.0, -0.9),
}


class Clips:
    """`count` clips of the emoji of `names`, without their skin-tone variations.

    Args:
        pictures: emoji on white, uint8 [M, 3, 64, 64], on the device that renders.
        names: their M captions.
        count: number of clips.
        seed: of their descriptions.
    """

    def __init__(self, pictures: Tensor, names: list[str], count: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        plain = [i for i, name in enumerate(names) if "skin tone" not in name]
        chosen = [(rng.choice(plain), rng.choice(list(MOTIONS)), rng.choice(list(COLOURS))) for _ in range(count)]
        self.captions = [f"{names[i]} {motion} on {colour}" for i, motion, colour in chosen]
        self.weights = torch.ones(count, device=pictures.device)
        device = pictures.device
        self._emoji = torch.tensor([i for i, *_ in chosen], device=device)
        self._motions = torch.tensor([MOTIONS[motion] for _, motion, _ in chosen], device=device)  # [N, 4]
        self._colours = torch.tensor([COLOURS[colour] for *_, colour in chosen], device=device)  # [N, 3]
        self._layers = torch.cat([_layer(part.float() / 255) for part in pictures.split(512)])  # [M, 4, 64, 64]

    def draw(self, index: Tensor) -> Tensor:
        """The clips of `index` int64 [B], with their places and sizes at random: [B, 3, 9, 64, 64] in [-1, 1]."""
        size = len(index)
        time = torch.linspace(-0.5, 0.5, FRAMES, device=index.device)
        pace = torch.empty(size, 1, device=index.device).uniform_(0.8, 1.1)
        x, y, angle, growth = ((self._motions[index] * pace)[:, :, None] * time).unbind(1)  # [B, 9] each
        x, y = (way + 0.1 * torch.randn(size, 1, device=index.device).clamp(-2, 2) for way in (x, y))
        scale = growth.exp() * torch.empty(size, 1, device=index.device).uniform_(0.5, 0.65)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        rows = [torch.stack([cos, sin, -cos * x - sin * y], 2), torch.stack([-sin, cos, sin * x - cos * y], 2)]
        theta = torch.stack(rows, 2).flatten(0, 1)  # [B * 9, 2, 3], from the picture's places to the emoji's
        layers = self._layers[self._emoji[index]].repeat_interleave(FRAMES, 0)
        grid = F.affine_grid(theta, list(layers.shape), align_corners=False)
        moved = F.grid_sample(layers, grid, align_corners=False)
        light = torch.empty(size, 3, device=index.device).uniform_(-0.05, 0.05)
        behind = (self._colours[index] + light).clamp(0, 1).repeat_interleave(FRAMES, 0)[:, :, None, None]
        frames = moved[:, :3] + (1 - moved[:, 3:]) * behind
        return (2 * frames.clamp(0, 1) - 1).unflatten(0, (size, FRAMES)).transpose(1, 2)


def _layer(pictures: Tensor) -> Tensor:
    """Emoji on white [M, 3, 64, 64] as premultiplied colours and opacity [M, 4, 64, 64].

    What is white and connected to the border is outside. A pixel at the edge is as clear as its white part allows.
    """
    darkest = pictures.amin(1, keepdim=True)
    white = (darkest > 0.98).float()
    outside = F.pad(torch.zeros_like(white)[:, :, 1:-1, 1:-1], (1, 1, 1, 1), value=1.0) * white
    for _ in range(96):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1) * white
    edge = F.max_pool2d(outside, 3, stride=1, padding=1)
    clear = torch.maximum(outside, edge * darkest)
    return torch.cat([pictures - clear, 1 - clear], dim=1)
