"""Batch level: the pictures of one call are dealt out to xDiT's data parallel groups.

Each group makes a share in order, from the noise that one group would have drawn for those pictures: the pictures do
not depend on the number of groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..seam.hooks import denoiser_of
from .compat import import_xfuser

import_xfuser()

from xfuser.core.distributed import (  # noqa: E402
    get_data_parallel_rank,
    get_data_parallel_world_size,
    is_dp_last_group,
)

#: Arguments of a pipeline's call that have an entry a prompt.
_PER_PROMPT = tuple(f"{negative}{name}" for negative in ("", "negative_") for name in (
    "prompt", "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds",
))  # fmt: skip


class Share(NamedTuple):
    """Pictures ``start`` up to ``stop`` of a call."""

    start: int
    stop: int


def share_of_call(pipe: Any, call: dict[str, Any], *, decodes: bool = False) -> list[Any]:
    """Make this data parallel group's share of the pictures or videos of a call.

    As in xDiT, the last rank of each group hands out what the group has made (perhaps nothing), the others nothing.

    Args:
        pipe: the diffusers pipeline, with the strategy on it.
        call: arguments of its call, the same on every rank.
        decodes: whether all ranks take part in the decoding.

    Raises:
        ValueError: as `deal`.
    """
    is_last = is_dp_last_group()
    if not is_last and not decodes:
        call = {**call, "output_type": "latent"}  # what nobody will see needs no decoding
    share: dict[str, Any] | None = call
    if (groups := get_data_parallel_world_size()) > 1:
        share = deal(pipe, call, get_data_parallel_rank(), groups)
    output = pipe(**share) if share else None
    if output is None or not is_last:
        return []
    return list(output.frames if hasattr(output, "frames") else output.images)


def share_of(count: int, group: int, groups: int) -> Share:
    """A group's share of ``count`` pictures, as xDiT's scripts number them: the last groups have fewer, or none."""
    size = -(-count // groups)
    return Share(min(group * size, count), min((group + 1) * size, count))


def deal(pipe: Any, call: dict[str, Any], group: int, groups: int) -> dict[str, Any] | None:
    """The arguments for a group's share of a call; None where no picture is left for it.

    Args:
        pipe: the diffusers pipeline.
        call: arguments of its call. A picture of each prompt, ``num_images_per_prompt`` times, is one call's.
        group: of `groups`, this one.

    Raises:
        ValueError: there is no generator and no latents, so that every group would draw noise of its own.
    """
    repeats = call.get("num_images_per_prompt") or 1
    dealt = {name: _entries(call[name], repeats) for name in _PER_PROMPT if call.get(name) is not None}
    count = max(map(len, dealt.values()))
    share = share_of(count, group, groups)
    latents, generator = call.get("latents"), call.get("generator")
    if latents is None and isinstance(generator, torch.Generator):
        latents, generator = _noise(pipe, count, call), None
    elif latents is None and generator is None:
        raise ValueError("hybrid-cond: --data_parallel_degree needs generator= or latents=, the same on every rank.")
    dealt |= {"latents": latents, "generator": generator}
    if share.start == share.stop:
        return None
    return {**call, **{name: _part(value, share, count) for name, value in dealt.items()}, "num_images_per_prompt": 1}


def _entries(value: Any, repeats: int) -> Any:
    """One entry a picture, those of a prompt side by side."""
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(repeats, dim=0)
    return [entry for entry in ([value] if isinstance(value, str) else value) for _ in range(repeats)]


def _part(value: Any, share: Share, count: int) -> Any:
    """A share's entries; one entry for all stays one, and a text for all a text, as pipelines take it."""
    if not isinstance(value, list | torch.Tensor):
        return value
    if len(value) == count:
        return value[share.start : share.stop]
    return value[0] if isinstance(value[0], str) else value[:1]


def _noise(pipe: Any, count: int, call: dict[str, Any]) -> torch.Tensor:
    """What the pipeline would draw for all pictures, [count, C, H, W]."""
    denoiser: Any = denoiser_of(pipe)
    default = denoiser.config.sample_size * pipe.vae_scale_factor
    size = ((call.get(name) or default) // pipe.vae_scale_factor for name in ("height", "width"))
    shape = (count, denoiser.config.in_channels, *size)
    return randn_tensor(shape, call["generator"], pipe._execution_device, denoiser.dtype)
