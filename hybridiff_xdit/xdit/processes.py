"""Starts the processes with torchrun, and tells once, for all of them, what has ended them.

A process that fails leaves its error in a file, as torchrun has it, and the one that has started it prints the first.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

USAGE = 2  # exit status of a command that is wrongly called


class UsageError(Exception):
    """A flag is wrong: the message is all that there is to say."""


def start(module: str, args: argparse.Namespace, argv: list[str]) -> list[str]:
    """The arguments of torchrun for ``python -m module argv``, one process a rank.

    Args:
        module: name of the module.
        args: with the flags of `options.add_launch_options`.
        argv: what each process reads.
    """
    return [
        f"--nproc_per_node={args.nproc_per_node}",
        f"--nnodes={args.nnodes}",
        f"--node_rank={args.node_rank}",
        f"--master_addr={args.master_addr}",
        f"--master_port={args.master_port or _free_port()}",
        *("-m", module, *argv),
    ]


def run(command: list[str], is_verbose: bool = False) -> int:
    """Run torchrun in this process until all ranks have ended; their exit status.

    Args:
        command: torchrun's arguments.
        is_verbose: whether torchrun logs what it does.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not is_verbose:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as signalled:
        return 128 + signalled.sigval
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode != USAGE or isinstance(failure.message, dict):
            sys.stderr.write(f"{_reason(rank, failure)}\n")
        if isinstance(failure.message, dict):  # whatever has then ended the process, before it could end itself
            return USAGE if _is_usage(failure.message) else 1
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def rank(main: Callable[[], None]) -> None:
    """Run a rank's part. An error ends the process; who has started it tells of it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        main()
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
        elif isinstance(error, UsageError):
            sys.stderr.write(f"{error}\n")
        else:
            raise
        sys.stderr.flush()
        sys.exit(USAGE if isinstance(error, UsageError) else 1)


def _reason(rank: int, failure: object) -> str:
    """What has ended a rank: its traceback, the message of a wrong flag, or a signal."""
    message = getattr(failure, "message", "")
    if not isinstance(message, dict):
        return f"xdit-hybrid: error: rank {rank} has ended: {message}."
    if _is_usage(message):
        return message["message"].removeprefix(f"{UsageError.__name__}: ")
    return f"{message['extraInfo']['py_callstack']}\nxdit-hybrid: error on rank {rank}: {message['message']}"


def _is_usage(message: dict[str, Any]) -> bool:
    return message["message"].startswith(f"{UsageError.__name__}: ")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
