"""Which family is a denoiser of?"""

from __future__ import annotations

from torch import nn

from .anatomy import Anatomy
from .blocks import MMDiT
from .unet import UNet


def read(denoiser: nn.Module) -> Anatomy:
    """Read a denoiser's structure.

    Raises:
        ValueError: the structure is neither an SD3-type MMDiT's nor a Stable Diffusion U-Net's.
    """
    for anatomy in (MMDiT, UNet):
        if all(hasattr(denoiser, part) for part in anatomy.parts):
            return anatomy(denoiser)
    raise ValueError(
        f"hybrid-cond does not understand the structure of {type(denoiser).__name__}: it splits SD3-type MMDiTs "
        f"({', '.join(MMDiT.parts)}) and Stable Diffusion U-Nets ({', '.join(UNet.parts)}). Where no step is PIPELINED "
        "(--hybrid_kinds FS) and there are two stages, any denoiser runs; else use xDiT's --parallel cfg."
    )
