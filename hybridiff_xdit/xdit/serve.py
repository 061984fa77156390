"""``xdit-hybrid serve``: a model stays loaded on its ranks, and the first rank answers HTTP.

The flags are here, and what each process does: the first serves (`serving.http`), and all of them make the pictures
together (`serving.ranks`). The command imports this file, so what is large is imported in the processes alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

from ..config import HybridConfig
from . import options, output, processes
from .compat import count_gpus

if TYPE_CHECKING:
    from .serving.ranks import Ranks

#: Flags of a run that a server has no use for: what they say comes with each request, or is about files.
_EXCLUDED = (
    *("prompt", "dataset_path", "input_images", "batch_size", "num_iterations", "warmup_calls", "determinism_check"),
    *("profile", "save_timings", "output_directory"),
)

#: Seconds that torchrun has to end this process where another one has ended. It then tells which, and how.
_TORCHRUN_ENDS_IT = 10


def build_parser() -> argparse.ArgumentParser:
    """Parser of what ``xdit-hybrid serve`` has beside the flags of a run."""
    parser = argparse.ArgumentParser(
        prog="xdit-hybrid serve",
        usage="%(prog)s --model MODEL --parallel hybrid-cond [--host HOST] [--port PORT] [--queue N] [flags of a run]",
        description="Keep a model loaded on its ranks and make a picture or video for each POST /generate. "
        "GET /health and GET /metrics tell how it is. The flags of a run, see xdit-hybrid --help, say how it runs and "
        "are the defaults of a request.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, metavar="PORT", help="0 takes a free one (default: %(default)s)")
    add("--queue", type=int, default=16, metavar="N", help="requests that may wait (default: %(default)s)")
    return parser


def read(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The server's own flags, and the argument list of the run.

    Raises:
        ValueError: with the flag and the mend.
    """
    own, rest = build_parser().parse_known_args(argv)
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in rest if arg.startswith("--")}
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install hybridiff_xdit[serve].")
    if idle := [f"--{name}" for name in _EXCLUDED if name in given]:
        raise ValueError(f"{' and '.join(idle)}: no effect on a server. Drop what has none.")
    if not 0 <= own.port < 1 << 16:
        raise ValueError(f"--port {own.port}: give a number from 0 to 65535.")
    if own.queue < 1:
        raise ValueError(f"--queue {own.queue}: give a whole number, 1 or more.")
    return own, rest


def flags(own: argparse.Namespace) -> list[str]:
    """The server's own flags as an argument list."""
    return [f"--{name}={value}" for name, value in vars(own).items()]


def check(args: argparse.Namespace) -> None:
    """Refuse what a server cannot run with.

    Args:
        args: flags of a run, after `options.prepare`.

    Raises:
        ValueError: with the flag and the mend.
    """
    if args.parallel != "hybrid-cond":
        raise ValueError(
            "a server needs --parallel hybrid-cond, under which an error on one rank ends the run on all of them: add "
            "it. (--hybrid_policy cfg makes every step exact.)"
        )
    if args.data_parallel_degree > 1:
        raise ValueError(
            f"--data_parallel_degree {args.data_parallel_degree}: a server makes one picture at a time. Drop it, and "
            "start a server for each group of GPUs."
        )


def main(argv: list[str] | None = None) -> None:
    """Serve; one process of the server."""
    is_first = os.environ["RANK"] == "0"
    # Ctrl-C ends a process as torchrun's signals do, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        own, rest = read(sys.argv[1:] if argv is None else argv)
        args = options.build_parser().parse_args(rest)
        hybrid = options.prepare(args, count_gpus(), int(os.environ["WORLD_SIZE"]))
        check(args)
        listener = _listen(own.host, own.port) if is_first else None
    except ValueError as error:
        raise processes.UsageError(f"xdit-hybrid serve: error on rank {os.environ['RANK']}: {error}") from error
    assert hybrid is not None
    if listener is None:
        ranks = _load(args, hybrid)
        ranks.messages.watch(lambda rank: _end(f"rank {rank} has ended"))
        ranks.follow()
        _end("rank 0 has ended")
    from .serving.http import Service

    # Signals come to the main thread: it must not be the one that waits for other ranks.
    maker = ThreadPoolExecutor(1)
    ranks = maker.submit(_load, args, hybrid).result()
    service = Service(args.model, ranks, hybrid, own.queue)
    reason = service.run(maker, listener)
    _end(reason, by_signal=service.is_signalled)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: a port that is in use is told before a model is loaded."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror}. Give another one.") from error
    return listener


def _load(args: argparse.Namespace, hybrid: HybridConfig) -> Ranks:
    from .runner import HybridRunner
    from .serving.ranks import Ranks

    args.prompt = [""]  # a model that is compiled runs once
    runner = HybridRunner(vars(args), hybrid)
    runner.initialize(runner.preprocess_args(vars(args)))
    return Ranks(runner, vars(args))


def _end(reason: str, by_signal: bool = False) -> NoReturn:
    """End this process from any thread; others may be waiting for ranks that will not answer."""
    if not by_signal:
        time.sleep(_TORCHRUN_ENDS_IT)  # the process that ended was on another node, whose torchrun ends that node alone
        sys.stderr.write(f"xdit-hybrid serve: error: {reason}.\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    output.quieten("--verbose" in sys.argv)
    processes.rank(main)
