"""``xdit-hybrid``: xDiT's ``xdit`` with ``--parallel`` and ``--hybrid_*``.

Checks the flags, counts the processes, and starts torchrun on `hybridiff_xdit.xdit.runner`.
"""

from __future__ import annotations

import os
import socket
import sys

from . import options
from .compat import count_gpus


def main(argv: list[str] | None = None) -> int:
    """Check the flags and become torchrun, whose exit status is then this command's."""
    argv = sys.argv[1:] if argv is None else argv
    parser = options.build_parser()
    args = parser.parse_args(argv)
    try:
        options.prepare(args, count_gpus())
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
    # In place of this process: importing xfuser has opened a context on a GPU, which goes with it, and torchrun gets
    # the terminal's signals itself.
    sys.stdout.flush()
    os.execv(command[0], command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
