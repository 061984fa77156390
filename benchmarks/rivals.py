"""xDiT's own strategies, run as xDiT offers them, for the columns beside ours.

Each changes the pipeline it is given for good: hand it one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import group
import torch.distributed as dist

from hybridiff_xdit.xdit.compat import import_xfuser

#: As named on the command line.
NAMES = ("xdit cfg", "xdit ulysses", "xdit pipefusion", "xdit cfg ring", "xdit cfg pipefusion")


def degrees(name: str, family: str) -> dict[str, Any] | None:
    """xDiT's flags for a strategy on all processes; None where xDiT does not offer it.

    ``xdit cfg`` is CFG parallelism, on more than two processes with Ulysses in each branch, ring attention in its place
    or PipeFusion. xDiT runs a U-Net on two processes by CFG parallelism, and in no other way.
    """
    size = dist.get_world_size()
    cfg, a_branch = {"use_cfg_parallel": True}, size // 2
    if family == "unet" and (name, size) != ("xdit cfg", 2):
        return None
    if a_branch == 1 and name in ("xdit cfg ring", "xdit cfg pipefusion"):
        return None
    return {
        "xdit cfg": {**cfg, "ulysses_degree": a_branch},
        "xdit cfg ring": {**cfg, "ring_degree": a_branch},
        "xdit cfg pipefusion": {**cfg, "pipefusion_parallel_degree": a_branch},
        "xdit ulysses": {"ulysses_degree": size},
        "xdit pipefusion": {"pipefusion_parallel_degree": size},
    }[name]


@contextmanager
def applied(name: str, pipe: Any, family: str, is_decoder_split: bool) -> Iterator[Any]:
    """xDiT's wrapper of a diffusers pipeline, on groups made for it."""
    flags = degrees(name, family)
    assert flags is not None
    engine_config = group.xdit_config(**flags, use_parallel_vae=is_decoder_split)
    engine_config.runtime_config.dtype = pipe.dtype
    xfuser: Any = import_xfuser()
    if "pipefusion" in name:
        _mend_pipefusion()
    wrapper = xfuser.xFuserStableDiffusionXLPipeline if family == "unet" else xfuser.xFuserStableDiffusion3Pipeline
    yield wrapper(pipe, engine_config)
    from xfuser.core.cache_manager.cache_manager import get_cache_manager

    get_cache_manager().cache.clear()  # PipeFusion's layers with their keys and values, kept for good


@cache
def _mend_pipefusion() -> None:
    """Have the cache of keys and values kept once a block.

    In xfuser 0.7, SD3's attention processor updates it, and so does the attention that it calls, in another shape:
    PipeFusion ends in an error on its first asynchronous step.
    """
    from xfuser.model_executor.layers import attention_processor

    attend = attention_processor.USP
    attention_processor.USP = lambda *args, attn_layer=None, **kwargs: attend(*args, **kwargs)
