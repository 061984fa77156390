"""``xdit-hybrid``: xDiT's ``xdit`` with ``--parallel`` and ``--hybrid_*``.

Checks the flags, counts the processes, and starts torchrun on `hybridiff_xdit.xdit.runner`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import options
from .compat import count_gpus


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    gpus = count_gpus()
    with _hidden_gpus():
        parser = options.build_parser()
    args = parser.parse_args(argv)
    try:
        options.prepare(args, gpus)
        if args.nnodes > 1 and args.master_port is None:
            raise ValueError("--nnodes > 1 needs --master_addr and --master_port, the same on every node.")
    except ValueError as error:
        parser.exit(2, f"xdit-hybrid: error: {error}\n")
    return _run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            f"--nproc_per_node={args.nproc_per_node}",
            f"--nnodes={args.nnodes}",
            f"--node_rank={args.node_rank}",
            f"--master_addr={args.master_addr}",
            f"--master_port={args.master_port or _free_port()}",
            *("-m", "hybridiff_xdit.xdit.runner", *argv),
        ]
    )


def _run(command: list[str]) -> int:
    # In a group of its own, so that a Ctrl-C in the terminal reaches torchrun once, from us; it ends its workers.
    process = subprocess.Popen(command, start_new_session=True)

    def forward(signum: int, frame: Any) -> None:
        process.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, forward)
    status = process.wait()
    return status if status >= 0 else 128 - status


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Importing xfuser opens a context on a GPU: the launcher only parses, and wants none."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


if __name__ == "__main__":
    sys.exit(main())
