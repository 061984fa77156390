"""xDiT's runner with ``--parallel`` understood: what ``xdit-hybrid`` starts in each process.

torchrun --nproc_per_node=2 -m hybridiff_xdit.xdit.runner --model ... --parallel hybrid-cond
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..config import HybridConfig
from . import options, output, processes
from .compat import count_gpus, has_accelerator, import_xfuser

output.quieten("--verbose" in sys.argv)  # before xDiT is imported
import_xfuser()

from xfuser.core.distributed import get_runtime_state, get_world_group  # noqa: E402
from xfuser.core.utils.runner_utils import is_last_process  # noqa: E402
from xfuser.model_executor.models.runner_models.base_model import DiffusionOutput, xFuserModel  # noqa: E402
from xfuser.runner import xFuserModelRunner  # noqa: E402

from ..seam.hooks import last_report  # noqa: E402
from .models import model_class  # noqa: E402


class HybridRunner(xFuserModelRunner):
    """xDiT's runner, with our models beside xDiT's.

    Args:
        config: xDiT's arguments.
        hybrid: how to run hybrid-cond; None for one of xDiT's own strategies.
    """

    def __init__(self, config: dict[str, Any], hybrid: HybridConfig | None) -> None:
        self.hybrid = hybrid
        self.strategy = config.get("parallel")
        self.is_verbose = bool(config.get("verbose"))
        self.denoising: output.Denoising | None = None
        super().__init__({**config, "parallel": None})  # an xDiT that loads plugins would apply it, too

    def _select_model(self, model_name: str, config: Any) -> xFuserModel:
        model = model_class(model_name, self.hybrid)(config)
        if self.strategy:  # pictures of two strategies must not overwrite each other
            model.settings.output_name += f"_{self.strategy}"
        return model

    def initialize(self, input_args: dict[str, Any]) -> None:
        with output.loading(self.is_verbose):
            super().initialize(input_args)
        pipe = getattr(self.model.pipe, "module", self.model.pipe)
        if hasattr(pipe, "progress_bar"):
            self.denoising = output.Denoising(pipe)

    def summary(self, made: DiffusionOutput, timings: list[float]) -> list[str]:
        """What to tell of the last call, and where what was made lies."""
        calls = list(made.get_outputs())
        names = [f"{self.model.get_output_name(call)}_{index}" for index, (_, call) in enumerate(calls)]
        ending = "png" if made.images else "mp4"
        files = [str(Path(self.config.output_directory, f"{name}.{ending}")) for name in names]
        report = last_report(self.model.pipe) if self.hybrid else None
        seconds = self.denoising.seconds if self.denoising else timings[-1]
        return [output.summary(report, calls[-1][1]["num_inference_steps"], seconds), ", ".join(files)]

    def cleanup(self) -> None:
        if has_accelerator():
            super().cleanup()
        else:
            get_runtime_state().destroy_distributed_env()


def main(argv: list[str] | None = None) -> None:
    """Make the pictures; one process of them."""
    try:
        args = options.build_parser().parse_args(argv)
        hybrid = options.prepare(args, count_gpus(), int(os.environ["WORLD_SIZE"]))
    except ValueError as error:
        raise processes.UsageError(f"xdit-hybrid: error on rank {os.environ['RANK']}: {error}") from error
    os.makedirs(args.output_directory, exist_ok=True)
    runner = HybridRunner(vars(args), hybrid)
    input_args = runner.preprocess_args(vars(args))
    runner.initialize(input_args)
    if args.profile:
        *_, profile = runner.profile(input_args)
        runner.save(profile=profile)
    else:
        made, timings = runner.run(input_args)
        runner.save(output=made, timings=timings if args.save_timings else None)
        get_world_group().barrier()  # the first rank's bars have ended
        if is_last_process():
            output.say(runner.summary(made, timings))
    runner.cleanup()


if __name__ == "__main__":
    processes.rank(main)
