"""A small classifier of emoji pictures by name: its features measure what the checkpoints draw.

    python benchmarks/models/classifier.py --data .data/emoji.npz --out benchmarks/models/emoji-classifier

The folder written holds the network and the features of all its training pictures, so that the nearest of them is found
without the data set. A picture's *name* is its caption without style and skin tone; names that share a picture (the
flags of Norway and of Bouvet Island) are one class.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FEATURES = 128
SCALE = 24.0  # of the cosines that the loss sees


class Network(nn.Sequential):
    """Pictures [N, 3, 64, 64] in [0, 1] to unit vectors [N, FEATURES]."""

    def __init__(self) -> None:
        widths = (3, 32, 64, 128, 256)
        blocks = [_block(a, b) for a, b in pairwise(widths)]  # [N, 256, 4, 4]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(16 * widths[-1], FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        return F.normalize(super().forward(2 * pictures - 1), dim=1)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Classifier:
    """The trained network and the features of its training pictures.

    Args:
        folder: what this script has written.
        device: where it computes.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        tensors = load_file(folder / "classifier.safetensors", device=str(device))
        self.features = tensors.pop("features").float()  # [M, FEATURES]
        self._classes = tensors.pop("classes")  # [M]
        self._names: dict[str, int] = json.loads((folder / "names.json").read_text())
        self._network = Network().to(device).eval()
        self._network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Features [N, FEATURES] of pictures [N, 3, 64, 64] in [0, 1]."""
        return self._network(pictures.float())

    def finds(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Whether the nearest training picture has the name that the caption asks for: bool [N]."""
        asked = torch.tensor([self._names[name_of(caption)] for caption in captions], device=features.device)
        return self._classes[nearest(features, self.features)] == asked


def nearest(features: Tensor, known: Tensor) -> Tensor:
    """Index of the known unit vector with the largest cosine: int64 [N]."""
    return (features @ known.T).argmax(1)


def name_of(caption: str) -> str:
    """``google style emoji of waving hand sign, dark skin tone``: ``waving hand sign``."""
    return re.sub(r", [a-z -]+ skin tone$", "", caption.split(" style emoji of ")[1])


def classes_of(pictures: Tensor, captions: Sequence[str]) -> dict[str, int]:
    """The class of each name; names with a picture in common share one."""
    head: dict[str, str] = {}

    def find(name: str) -> str:
        while head[name] != name:
            name = head[name]
        return name

    owner: dict[bytes, str] = {}
    for picture, caption in zip(pictures, captions, strict=True):
        name = name_of(caption)
        head.setdefault(name, name)
        first = owner.setdefault(picture.numpy().tobytes(), name)
        head[find(name)] = find(first)
    number = {name: i for i, name in enumerate(sorted({find(name) for name in head}))}
    return {name: number[find(name)] for name in sorted(head)}


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, blur, colour and noise at random, no flips: float in, the same shape out."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(pictures), *shape, generator=generator)

    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.88, 1.12)
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)  # up to 4 pixels
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, align_corners=False)  # what comes in is white
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = torch.lerp(moved, blurred, uniform(0, 1, 1, 1, 1))
    coloured = mixed * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    noise = torch.randn(pictures.shape, generator=generator)
    return (coloured + uniform(0, 0.1, 1, 1, 1) * noise).clamp(0, 1)


def train(pictures: Tensor, classes: Tensor, minutes: float, generator: torch.Generator) -> Network:
    """Fit the network to uint8 pictures [M, 3, 64, 64] within the given time."""
    network = Network().train()
    heads = nn.Parameter(torch.randn(int(classes.max()) + 1, FEATURES, generator=generator))
    optimizer = torch.optim.AdamW([*network.parameters(), heads], weight_decay=0.02)
    start, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        for rate in optimizer.param_groups:
            rate["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - done) + 1e-6
        picked = torch.randint(len(pictures), (128,), generator=generator)
        features = network(augment(pictures[picked].float() / 255, generator))
        loss = F.cross_entropy(SCALE * features @ F.normalize(heads, dim=1).T, classes[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, done = step + 1, (time.monotonic() - start) / (60 * minutes)
        if step % 200 == 0:
            print(f"step {step}, {100 * done:.0f} % of the time, loss {loss.item():.3f}", flush=True)
    return network.eval()


@torch.no_grad()
def describe(network: Network, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Features of uint8 pictures, augmented if a generator is given: [M, FEATURES]."""
    parts = []
    for part in pictures.split(256):
        scaled = part.float() / 255
        parts.append(network(augment(scaled, generator) if generator else scaled))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the .npz file of data.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    import data as emoji_data  # beside this script; who imports the classifier has no need of it

    torch.manual_seed(0)
    arrays, captions = emoji_data.load(args.data)
    pictures = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()  # uint8 [M, 3, 64, 64]
    names = classes_of(pictures, captions)
    classes = torch.tensor([names[name_of(caption)] for caption in captions])
    print(f"{len(pictures)} pictures, {len(names)} names, {int(classes.max()) + 1} classes", flush=True)

    network = train(pictures, classes, args.minutes, torch.Generator().manual_seed(0))
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    features = describe(network, pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    held = {"features": features.half(), "classes": classes.to(torch.int16)}
    save_file({**tensors, **held}, args.out / "classifier.safetensors")
    (args.out / "names.json").write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n")

    unseen = describe(network, pictures, torch.Generator().manual_seed(1))
    found = (classes[nearest(unseen, features)] == classes).float().mean().item()
    print(f"fresh augmentations whose nearest training picture has their name: {100 * found:.1f} %")


if __name__ == "__main__":
    main()
