"""`hybrid-cond` as a plugin of xDiT: ``xdit --parallel hybrid-cond``.

An xDiT that loads plugins finds `register` by the entry point ``xfuser.plugins``. The released ones do not; they need
the patches in ``integrations/xdit/patches``. Options and models are those of ``xdit-hybrid``.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from xfuser import xFuserArgs
from xfuser.model_executor.models.runner_models.base_model import xFuserModel
from xfuser.plugins import ParallelStrategy, register_strategy

from . import options
from .compat import count_gpus


class HybridCond(ParallelStrategy):
    """The strategy of one of xDiT's runners."""

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        options.add_hybrid_options(parser.add_argument_group("hybridiff-xdit"))

    def configure(self, args: xFuserArgs, config: dict[str, Any]) -> None:
        world_size = int(os.environ.get("WORLD_SIZE", 0))  # 0 in the command, before there are processes
        nodes = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if world_size else 1
        flags = options.read_degrees([])
        vars(flags).update(config, nnodes=nodes, nproc_per_node=None)
        self.hybrid = options.prepare(flags, count_gpus(), world_size or None)
        args.use_cfg_parallel = flags.use_cfg_parallel
        args.pipefusion_parallel_degree = flags.pipefusion_parallel_degree
        for name in {*options.INPUTS} - config.keys():
            setattr(args, name, None)  # as the command has it; the defaults of xFuserArgs are not what a user asks for

    def model_class(self, name: str, model: type[xFuserModel] | None) -> type[xFuserModel]:
        from .models import model_class  # what it changes of xDiT is for a run with this strategy

        return model_class(name, self.hybrid)


def register() -> None:
    """Have xDiT's ``--parallel hybrid-cond`` select `HybridCond`."""
    register_strategy("hybrid-cond", HybridCond)
