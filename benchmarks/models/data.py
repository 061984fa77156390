"""Builds the captioned emoji picture set from two npm packages of emoji pictures.

npm pack emoji-datasource-google emoji-datasource-twitter     # then unpack both .tgz files
python data.py --google g/package --twitter t/package --out ../../.data/emoji.npz
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

logger = logging.getLogger("emoji.data")

SIZE = 64
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


def entries(package: Path, style: str) -> Iterator[tuple[Path, str]]:
    """Yields (picture path, caption) of every emoji that `package` has in `style`.

    Captions read "google style emoji of waving hand sign, medium skin tone"; an emoji of two
    people with two tones names both ("light and dark skin tone").
    """
    folder = package / "img" / style / str(SIZE)
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        name = (emoji.get("name") or emoji["short_name"].replace("_", " ")).lower()
        name = " ".join(name.replace("\u2019", "'").split())
        caption = f"{style} style emoji of {name}"
        variants = [(emoji, caption)]
        for codes, variant in emoji.get("skin_variations", {}).items():
            tones = " and ".join(TONES[code] for code in codes.split("-"))
            variants.append((variant, f"{caption}, {tones} skin tone"))
        for item, text in variants:
            path = folder / item["image"]
            if item.get(f"has_img_{style}") and path.is_file():
                yield path, text


def load_picture(path: Path) -> np.ndarray:
    """Reads one picture, composited on white: uint8 [64, 64, 3]."""
    picture = Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(canvas, picture).convert("RGB"))


def build(google_dir: str | Path, twitter_dir: str | Path, out: str | Path) -> int:
    """Writes `out` (.npz): `pictures` uint8 [N, 64, 64, 3] and `captions` str [N]. Returns N."""
    found = [*entries(Path(google_dir), "google"), *entries(Path(twitter_dir), "twitter")]
    pictures = np.stack([load_picture(path) for path, _ in found])
    captions = np.array([caption for _, caption in found])
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, pictures=pictures, captions=captions)
    logger.info("%d pictures, %.1f MB -> %s", len(found), Path(out).stat().st_size / 1e6, out)
    return len(found)


def load(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Reads what `build` wrote: pictures uint8 [N, 64, 64, 3] and N captions."""
    with np.load(path, allow_pickle=False) as file:
        return file["pictures"], [str(caption) for caption in file["captions"]]


class Emoji:
    """The emoji as they are.

    Args:
        pictures: uint8 [N, 3, 64, 64], on the device that trains.
        captions: N captions.
    """

    def __init__(self, pictures: Tensor, captions: list[str]) -> None:
        self._pictures, self.captions = pictures, captions
        often = [0.35 if "skin tone" in caption else 1.0 for caption in captions]  # half of them are such variations
        self.weights = torch.tensor(often, device=pictures.device)

    def draw(self, index: Tensor) -> Tensor:
        """The pictures of `index` int64 [B]: float32 [B, 3, 64, 64] in [-1, 1]."""
        return self._pictures[index].float() / 127.5 - 1


def main() -> None:
    """Command line of `build`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--google", required=True, help="unpacked emoji-datasource-google")
    parser.add_argument("--twitter", required=True, help="unpacked emoji-datasource-twitter")
    parser.add_argument("--out", required=True, help="the .npz file to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(args.google, args.twitter, args.out)


if __name__ == "__main__":
    main()
