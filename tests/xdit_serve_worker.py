"""One rank of a server, which says its id; the second one fails on ``fail in a step`` and ``fail at the end``."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from hybridiff_xdit.xdit import output, processes, serve

from hybridiff_xdit.xdit.runner import HybridRunner  # isort: skip  # last: it quietens what it imports

OUT_OF_MEMORY = torch.OutOfMemoryError("no memory is left")


def fault(pipe, prompt):
    """Context in which the pipeline of the second rank fails, and the first's does not."""
    if torch.distributed.get_rank() != 1:
        return nullcontext()
    if prompt == "fail in a step":
        forward, calls = pipe.transformer.forward, []

        def forward_thrice(*args, **kwargs):
            calls.append(1)
            if len(calls) > 3:
                raise OUT_OF_MEMORY
            return forward(*args, **kwargs)

        return patch.object(pipe.transformer, "forward", forward_thrice)
    if prompt == "fail at the end":
        return patch.object(pipe.vae, "decode", side_effect=OUT_OF_MEMORY)
    return nullcontext()


def main():
    Path(f"pid {os.environ['RANK']}").write_text(str(os.getpid()))
    run = HybridRunner.run

    def run_with_faults(runner, input_args):
        with fault(runner.model.pipe, input_args["prompt"][0]):
            return run(runner, input_args)

    HybridRunner.run = run_with_faults
    serve.main()


if __name__ == "__main__":
    output.quieten("--verbose" in sys.argv)
    processes.rank(main)
