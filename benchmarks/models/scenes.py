"""Procedural scenes: captioned 64 x 64 pictures of a few shapes before a background, rendered on the device.

A caption reads "a small red striped circle left of a big green square, blue sky over brown ground". The caption is all
that is fixed: exact colours, places, sizes and angles vary around what it says.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

SIZE = 64
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.85, 0.2),
    "green": (0.2, 0.65, 0.25),
    "blue": (0.2, 0.4, 0.85),
    "purple": (0.55, 0.25, 0.7),
    "pink": (0.95, 0.55, 0.7),
    "brown": (0.5, 0.33, 0.2),
    "white": (0.95, 0.95, 0.95),
    "black": (0.1, 0.1, 0.12),
}
SHAPES = ("circle", "square", "diamond", "triangle", "ring", "cross", "star", "moon", "hexagon", "oval")
TEXTURES = ("", "striped", "dotted")
SIZES = {"small": (0.2, 0.26), "big": (0.36, 0.44)}
BACKGROUNDS = ("{} sky over {} ground", "plain {} background", "{} and {} stripes", "{} and {} squares")
PLACES = {
    "in the middle": (0.0, 0.0),
    "at the left": (-0.5, 0.0),
    "at the right": (0.5, 0.0),
    "at the top": (0.0, -0.5),
    "at the bottom": (0.0, 0.5),
}
RELATIONS = {  # where the first and the second shape are, and where a third one may be
    "left of": ((-0.5, 0.0), (0.5, 0.0), ("at the top", "at the bottom")),
    "right of": ((0.5, 0.0), (-0.5, 0.0), ("at the top", "at the bottom")),
    "above": ((0.0, -0.5), (0.0, 0.5), ("at the left", "at the right")),
    "below": ((0.0, 0.5), (0.0, -0.5), ("at the left", "at the right")),
}
ABSENT = [0.0, 0.0, 9.0, 9.0, 0.1, 0.0, 0.0, 0.0, 0.0]  # a shape outside the picture


class Scenes:
    """`count` scenes of one seed.

    Args:
        count: number of scenes.
        device: where they are rendered.
        seed: of their descriptions.
    """

    def __init__(self, count: int, device: torch.device, seed: int = 0) -> None:
        rng = random.Random(seed)
        scenes = [_scene(rng) for _ in range(count)]
        self.captions = [caption for caption, _, _ in scenes]
        self.weights = torch.ones(count, device=device)
        self._shapes = torch.tensor([shapes for _, shapes, _ in scenes], device=device)  # [N, 3, 9]
        self._backgrounds = torch.tensor([background for *_, background in scenes], device=device)  # [N, 8]

    def draw(self, index: Tensor) -> Tensor:
        """The scenes of `index` int64 [B]: float32 [B, 3, 64, 64] in [-1, 1]."""
        shapes, backgrounds = self._shapes[index], self._backgrounds[index]
        axis = (torch.arange(SIZE, device=index.device) + 0.5) * (2 / SIZE) - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        picture = _background(backgrounds[:, :, None, None], x, y)
        for shape in shapes.unbind(1):
            picture = _put(picture, shape[:, :, None, None], x, y)
        return picture.clamp(0, 1) * 2 - 1


def _scene(rng: random.Random) -> tuple[str, list[list[float]], list[float]]:
    """(caption, three shapes, background)."""
    count = rng.choice((1, 2, 2, 2, 3))
    if count == 1:
        place = rng.choice(list(PLACES))
        text, shape = _shape(rng, PLACES[place], rng.choice(list(SIZES)))
        texts, shapes = f"{text} {place}", [shape]
    else:
        relation = rng.choice(list(RELATIONS))
        first, second, others = RELATIONS[relation]
        text, shape = _shape(rng, first, rng.choice(list(SIZES)))
        other_text, other = _shape(rng, second, rng.choice(list(SIZES)))
        texts, shapes = f"{text} {relation} {other_text}", [shape, other]
        if count == 3:
            place = rng.choice(others)
            text, shape = _shape(rng, PLACES[place], "small")
            texts, shapes = f"{texts} and {text} {place}", [*shapes, shape]
    kind = rng.choice((0, 0, 0, 1, 1, 2, 3))
    names = rng.sample(list(COLOURS), 2)
    caption = f"{texts}, {BACKGROUNDS[kind].format(*names)}"
    background = [float(kind), rng.uniform(-0.15, 0.35), *_colour(rng, names[0]), *_colour(rng, names[1])]
    return caption, shapes + [ABSENT] * (3 - count), background


def _shape(rng: random.Random, place: tuple[float, float], size: str) -> tuple[str, list[float]]:
    """(its words, [kind, texture, x, y, size, angle, red, green, blue])."""
    kind, name = rng.randrange(len(SHAPES)), rng.choice(list(COLOURS))
    texture = rng.choice((0, 0, 1, 2))
    words = ["a", size, name, TEXTURES[texture], SHAPES[kind]]
    x, y = (centre + rng.uniform(-0.12, 0.12) for centre in place)
    placed = [x, y, rng.uniform(*SIZES[size]), rng.uniform(-0.25, 0.25)]
    return " ".join(word for word in words if word), [float(kind), float(texture), *placed, *_colour(rng, name)]


def _colour(rng: random.Random, name: str) -> list[float]:
    return [value + rng.uniform(-0.06, 0.06) for value in COLOURS[name]]


def _background(given: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Backgrounds [B, 8, 1, 1] over the grid: [B, 3, 64, 64]."""
    kind, horizon, one, two = given[:, :1], given[:, 1:2], given[:, 2:5], given[:, 5:]
    edges = torch.stack(  # the second colour where they are positive, in the grid's units
        [
            (y - horizon).squeeze(1),
            (0 * y - 1).expand(len(given), -1, -1),
            ((4 * math.pi * (x + horizon)).sin() / 12).squeeze(1),
            ((2 * math.pi * (x + horizon)).sin() * (2 * math.pi * (y + horizon)).sin() / 6).squeeze(1),
        ],
        dim=1,
    )
    edge = edges.gather(1, kind.long().expand(-1, -1, SIZE, SIZE))
    light = 1 - 0.3 * torch.where(edge < 0, (1 + y) / 2 - 0.5, (1 - y) / 2 - 0.25)  # lighter above, and near below
    return torch.lerp(one, two, _cover(edge)) * light


def _put(picture: Tensor, given: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] with a shape [B, 9, 1, 1] each and its shadow."""
    kind, texture, left, top, size, angle = (given[:, i : i + 1] for i in range(6))
    u, v = (x - left) / size, (y - top) / size
    u, v = angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u
    inside = -_distances(u, v).gather(1, kind.long().expand(-1, -1, SIZE, SIZE)) * size
    shadow = (0.5 + inside * 5).clamp(0, 1).roll((2, 2), (2, 3))
    stripes = _cover((5 * math.pi * u).sin() * size / 16)
    dots = _cover(((3 * math.pi * u).sin() * (3 * math.pi * v).sin() - 0.3) * size / 8)
    marks = torch.where(texture == 1, stripes, torch.where(texture == 2, dots, 0 * dots))
    colour = given[:, 6:]
    contrast = torch.where(colour.mean(1, keepdim=True) > 0.6, 0.35 * colour, 0.4 * colour + 0.6)
    body = torch.lerp(colour, contrast, 0.85 * marks) * (1 - 0.18 * (u + v).clamp(-1.2, 1.2))
    return torch.lerp(picture * (1 - 0.35 * shadow), body, _cover(inside))


def _cover(inside: Tensor) -> Tensor:
    """The covered part of a pixel whose centre is so far inside an edge."""
    return (0.5 + inside * (SIZE / 2)).clamp(0, 1)


def _distances(u: Tensor, v: Tensor) -> Tensor:
    """How far outside of each of the `SHAPES`, of about unit radius: [B, 1, H, W] twice to [B, len(SHAPES), H, W]."""
    a, b, radius = u.abs(), v.abs(), torch.hypot(u, v)
    fifth = math.pi / 5
    turned = (torch.remainder(torch.atan2(u, -v) + fifth, 2 * fifth) - fifth).abs()  # a star is ten equal halves
    distances = [
        radius - 1,
        torch.maximum(a, b) - 0.85,
        (a + b - 1.2) * math.sqrt(0.5),
        torch.maximum(0.866 * a - 0.5 * v, v) - 0.6,
        (radius - 0.72).abs() - 0.28,
        torch.minimum(torch.maximum(a - 1, b - 0.32), torch.maximum(a - 0.32, b - 1)),
        (0.636 * radius * turned.sin() + 0.2645 * (radius * turned.cos() - 1.1)) / 0.689,
        torch.maximum(radius - 1, 0.85 - torch.hypot(u - 0.55, v + 0.2)),
        torch.maximum(0.866 * a + 0.5 * b, b) - 0.87,
        (torch.hypot(u, 1.8 * v) - 1.05) / 1.4,
    ]
    return torch.cat(distances, dim=1)
