"""How is a denoiser read?"""

from __future__ import annotations

from torch import nn

from .anatomy import Anatomy
from .blocks import Blocks
from .unet import UNet


def read(denoiser: nn.Module) -> Anatomy:
    """Read a denoiser's structure.

    Raises:
        ValueError: it is no Stable Diffusion U-Net, and has no lists of blocks.
    """
    if all(hasattr(denoiser, part) for part in UNet.parts):
        return UNet(denoiser)
    blocks = Blocks(denoiser)
    if blocks.modules:
        return blocks
    raise ValueError(
        f"hybrid-cond does not understand the structure of {type(denoiser).__name__}: it splits models made of lists "
        f"of blocks, and Stable Diffusion U-Nets ({', '.join(UNet.parts)}). Where no step is PIPELINED "
        "(--hybrid_kinds FS) and there are two stages, any denoiser runs; else use xDiT's --parallel cfg."
    )
