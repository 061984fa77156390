"""xDiT's own strategies, run as xDiT offers them, for the columns beside ours.

Each changes the pipeline it is given for good: hand it one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import group
import torch.distributed as dist

from hybridiff_xdit.xdit.compat import import_xfuser

#: As named on the command line.
NAMES = ("xdit cfg", "xdit ulysses", "xdit pipefusion", "xdit cfg ring", "xdit cfg pipefusion", "xdit cfg dbcache")


def degrees(name: str, family: str) -> dict[str, Any] | None:
    """xDiT's flags for a strategy on all processes; None where xDiT does not offer it.

    ``xdit cfg`` is CFG parallelism, on more than two processes with Ulysses in each branch, ring attention in its place
    or PipeFusion, or with cache-dit's cache of steps. xDiT runs a U-Net on two processes by CFG parallelism, and in no
    other way.
    """
    size = dist.get_world_size()
    cfg, a_branch = {"use_cfg_parallel": True}, size // 2
    if family == "unet" and (name, size) != ("xdit cfg", 2):
        return None
    if a_branch == 1 and name in ("xdit cfg ring", "xdit cfg pipefusion"):
        return None
    return {
        "xdit cfg": {**cfg, "ulysses_degree": a_branch},
        "xdit cfg dbcache": {**cfg, "ulysses_degree": a_branch},
        "xdit cfg ring": {**cfg, "ring_degree": a_branch},
        "xdit cfg pipefusion": {**cfg, "pipefusion_parallel_degree": a_branch},
        "xdit ulysses": {"ulysses_degree": size},
        "xdit pipefusion": {"pipefusion_parallel_degree": size},
    }[name]


@contextmanager
def applied(name: str, pipe: Any, family: str, is_decoder_split: bool, steps: int) -> Iterator[Any]:
    """xDiT's wrapper of a diffusers pipeline, on groups made for it, for runs of so many steps."""
    flags = degrees(name, family)
    assert flags is not None
    engine_config = group.xdit_config(**flags, use_parallel_vae=is_decoder_split)
    engine_config.runtime_config.dtype = pipe.dtype
    xfuser: Any = import_xfuser()
    if "pipefusion" in name:
        _mend_pipefusion()
    wrapper = xfuser.xFuserStableDiffusionXLPipeline if family == "unet" else xfuser.xFuserStableDiffusion3Pipeline
    wrapped = wrapper(pipe, engine_config)
    with cached_steps(wrapped, "SD3.5", steps) if "dbcache" in name else nullcontext():
        yield wrapped
    from xfuser.core.cache_manager.cache_manager import get_cache_manager

    get_cache_manager().cache.clear()  # PipeFusion's layers with their keys and values, kept for good


@contextmanager
def cached_steps(pipe: Any, model: str, steps: int) -> Iterator[None]:
    """As xDiT's runner does with ``--cache_method dbcache`` and the preset of one of its models."""
    from xfuser.model_executor.cache.adapters import apply_cache
    from xfuser.model_executor.models.runner_models.base_model import MODEL_REGISTRY

    preset = MODEL_REGISTRY[model].settings.step_cache_config["dbcache"]
    apply_cache("dbcache", steps, pipe, preset_kwargs=preset.preset, adapter_config=preset.adapter)
    try:
        yield
    finally:
        import_module("cache_dit").disable_cache(pipe)


@cache
def _mend_pipefusion() -> None:
    """Have the cache of keys and values kept once a block.

    In xfuser 0.7, SD3's attention processor updates it, and so does the attention that it calls, in another shape:
    PipeFusion ends in an error on its first asynchronous step.
    """
    from xfuser.model_executor.layers import attention_processor

    attend = attention_processor.USP
    attention_processor.USP = lambda *args, attn_layer=None, **kwargs: attend(*args, **kwargs)
