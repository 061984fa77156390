"""xDiT's own strategies, run as xDiT offers them, for the columns beside ours.

Each changes the pipeline it is given for good: hand it one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from hybridiff_xdit.xdit.compat import import_xfuser

#: As named on the command line.
NAMES = ("xdit cfg", "xdit ulysses", "xdit pipefusion")


def degrees(name: str, family: str) -> dict[str, Any] | None:
    """xDiT's flags for a strategy on all processes; None where xDiT does not offer it.

    ``xdit cfg`` is CFG parallelism, on more than two processes with Ulysses in each branch. xDiT runs a U-Net on two
    processes by CFG parallelism, and in no other way.
    """
    size = dist.get_world_size()
    if family == "unet" and (name, size) != ("xdit cfg", 2):
        return None
    return {
        "xdit cfg": {"use_cfg_parallel": True, "ulysses_degree": size // 2},
        "xdit ulysses": {"ulysses_degree": size},
        "xdit pipefusion": {"pipefusion_parallel_degree": size},
    }[name]


@contextmanager
def applied(name: str, pipe: Any, family: str, dtype: torch.dtype) -> Iterator[Any]:
    """xDiT's wrapper of a diffusers pipeline, on groups made for it."""
    xfuser: Any = import_xfuser()
    from xfuser.core import distributed

    parallel_state: Any = distributed.parallel_state
    if parallel_state._WORLD is None:
        distributed.init_distributed_environment(backend=dist.get_backend())
    if distributed.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    flags = degrees(name, family)
    assert flags is not None
    engine_config, _ = xfuser.xFuserArgs(model="", **flags).create_config()
    engine_config.runtime_config.dtype = dtype
    wrapper = xfuser.xFuserStableDiffusionXLPipeline if family == "unet" else xfuser.xFuserStableDiffusion3Pipeline
    try:
        yield wrapper(pipe, engine_config)
    finally:
        parallel_state.destroy_model_parallel()
