"""xDiT's runner with ``--parallel`` understood: what ``xdit-hybrid`` starts in each process.

torchrun --nproc_per_node=2 -m hybridiff_xdit.xdit.runner --model ... --parallel hybrid-cond
"""

from __future__ import annotations

import os
from typing import Any

from .. import HybridConfig
from ..seam.checkpoints import resolve
from . import options
from .compat import count_gpus, has_accelerator, import_xfuser

import_xfuser()

from xfuser.core.distributed import get_runtime_state  # noqa: E402
from xfuser.model_executor.models.runner_models.base_model import (  # noqa: E402
    MODEL_REGISTRY,
    xFuserModel,
)
from xfuser.runner import setup_logging, xFuserModelRunner  # noqa: E402

from .models import REGISTERED  # noqa: E402


class HybridRunner(xFuserModelRunner):
    """xDiT's runner, with our models beside xDiT's.

    Args:
        config: xDiT's arguments.
        hybrid: how to run hybrid-cond; None for one of xDiT's own strategies.
    """

    def __init__(self, config: dict[str, Any], hybrid: HybridConfig | None) -> None:
        self.hybrid = hybrid
        self.strategy = config.get("parallel")
        super().__init__(config)

    def _select_model(self, model_name: str, config: Any) -> xFuserModel:
        try:
            name = REGISTERED[resolve(model_name).family]
        except ValueError:
            if self.hybrid:
                raise
            return super()._select_model(model_name, config)
        model_class = MODEL_REGISTRY[name]
        model = (model_class.with_hybrid(self.hybrid) if self.hybrid else model_class)(config)
        if self.strategy:  # pictures of two strategies must not overwrite each other
            model.settings.output_name += f"_{self.strategy}"
        return model

    def cleanup(self) -> None:
        if has_accelerator():
            super().cleanup()
        else:
            get_runtime_state().destroy_distributed_env()


def main(argv: list[str] | None = None) -> None:
    """Make the pictures; one process of them."""
    setup_logging()
    parser = options.build_parser()
    args = parser.parse_args(argv)
    try:
        hybrid = options.prepare(args, count_gpus(), int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        parser.exit(2, f"xdit-hybrid: error on rank {os.environ['RANK']}: {error}\n")
    os.makedirs(args.output_directory, exist_ok=True)
    runner = HybridRunner(vars(args), hybrid)
    input_args = runner.preprocess_args(vars(args))
    runner.initialize(input_args)
    if args.profile:
        *_, profile = runner.profile(input_args)
        runner.save(profile=profile)
    else:
        output, timings = runner.run(input_args)
        runner.save(output=output, timings=timings)
    runner.cleanup()


if __name__ == "__main__":
    main()
