"""xDiT's runner with ``--parallel`` understood: what ``xdit-hybrid`` starts in each process.

torchrun --nproc_per_node=2 -m hybridiff_xdit.xdit.runner --model ... --parallel hybrid-cond
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

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
        *_, (_, call) = made.get_outputs()
        report = last_report(self.model.pipe) if self.hybrid else None
        seconds = self.denoising.seconds if self.denoising else timings[-1]
        return [output.summary(report, call["num_inference_steps"], seconds), ", ".join(map(str, self._files(made)))]

    def save(self, output: DiffusionOutput | None = None, **others: Any) -> None:
        """As xDiT's, whose way to write a video needs a package that it does not install."""
        if output and output.videos:
            if is_last_process():
                for file, video in zip(self._files(output), output.videos, strict=True):
                    file.write_bytes(mp4(video, self.model.settings.fps))
            output = None
        super().save(output=output, **others)

    def _files(self, made: DiffusionOutput) -> list[Path]:
        names = [f"{self.model.get_output_name(call)}_{index}" for index, (_, call) in enumerate(made.get_outputs())]
        ending = "png" if made.images else "mp4"
        return [Path(self.config.output_directory, f"{name}.{ending}") for name in names]

    def cleanup(self) -> None:
        if has_accelerator():
            super().cleanup()
        else:
            get_runtime_state().destroy_distributed_env()


def mp4(video: Any, fps: int | None) -> bytes:
    """A file of frames: an array [F, H, W, 3] in [0, 1] or of bytes, or a list of pictures."""
    import av

    frames = np.stack([np.asarray(frame) for frame in video])
    if frames.dtype != np.uint8:
        frames = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps or 16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


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
