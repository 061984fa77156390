"""Real processes, one a rank, that run a function of a test file and hand back what it returns or raises."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import nursery

GRACE = 2  # seconds that a process has to end by itself


class Outcome(NamedTuple):
    """What a rank's function came to: a value, or an error, the last line of which is ``Type: message``."""

    value: Any
    error: str | None


class Ranks:
    """A process group of ``size`` processes, started at once and kept until `close`.

    Functions are found again in the processes by file and name: they must stand at the top level of a file of tests.

    Args:
        size: number of ranks.
        device: ``cpu`` (gloo) or ``cuda`` (NCCL, rank i has GPU i; where there are more ranks than GPUs, they share
            them, and gloo takes what is exchanged through the host).
        group_timeout: of the process group, seconds.
    """

    def __init__(self, size: int = 2, device: str = "cpu", group_timeout: float = 120) -> None:
        self.size, self.device, self.group_timeout = size, device, group_timeout
        self._start()

    def _start(self) -> None:
        # A process with CUDA cannot be forked.
        context = nursery.warm() if self.device == "cpu" else multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="hybridiff-")
        self._processes, self._pipes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self.size, self.device, store, self.group_timeout)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes; those that are stuck are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(GRACE)
            process.kill()
            process.join()

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Outcome]:
        """Run ``function(*args)`` on every rank; what each came to. After an error the processes are new ones."""
        job = pickle.dumps((inspect.getfile(function), function.__name__, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        deadline = time.monotonic() + timeout
        outcomes = [self._receive(rank, deadline, timeout) for rank in range(self.size)]
        if any(outcome.error for outcome in outcomes):
            self.close()
            self._start()
        return outcomes

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """Run ``function(*args)`` on every rank; the values in order of rank. An error on any rank fails the test."""
        outcomes = self.outcomes(function, *args, timeout=timeout)
        failed = {rank: outcome.error for rank, outcome in enumerate(outcomes) if outcome.error}
        summary = [f"rank {rank}: {error.splitlines()[-1]}" for rank, error in failed.items()]
        assert not failed, "\n".join([next(iter(failed.values())), *summary])
        return [outcome.value for outcome in outcomes]

    def _receive(self, rank: int, deadline: float, timeout: float) -> Outcome:
        pipe, process = self._pipes[rank], self._processes[rank]
        if not pipe.poll(max(0, deadline - time.monotonic())):
            return Outcome(None, f"TimeoutError: no answer within {timeout} s")
        try:
            return Outcome(*pickle.loads(pipe.recv_bytes()))
        except (EOFError, ConnectionResetError):
            process.join(5)
            return Outcome(None, f"ProcessDied: with exit code {process.exitcode}")


def device() -> str:
    """Device of this rank."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if os.environ["TEST_DEVICE"] == "cuda" else "cpu"


@contextmanager
def waiting_at_once() -> Iterator[None]:
    """Meanwhile each transfer is waited for at once.

    As where one communicator serves all of a rank's transfers, in the order in which the rank issued them.
    """
    from hybridiff_xdit.ranks.comm import Comm

    send, gather = Comm.send, Comm.gather

    def waits(self, tensor, dst):
        send(self, tensor, dst).wait()
        return SimpleNamespace(wait=lambda: None)  # gloo's would wait for another one

    def gathers(self, tensor):
        gathered = gather(self, tensor).wait()
        return SimpleNamespace(wait=lambda: gathered)

    Comm.send, Comm.gather = waits, gathers
    try:
        yield
    finally:
        Comm.send, Comm.gather = send, gather


def _serve(pipe: Any, rank: int, size: int, kind: str, store: str, timeout: float) -> None:
    """A rank's life: join the group, then answer jobs until the other end of the pipe is gone."""
    import torch
    import torch.distributed as dist

    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), **local, TEST_DEVICE=kind)
    torch.set_num_threads(1)
    is_shared = False
    if kind == "cuda":
        import group

        is_shared = group.gpus_are_shared()
        torch.cuda.set_device(rank % torch.cuda.device_count())
        # TF32 is off by default for matrix products, on for convolutions.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group(
        "nccl" if kind == "cuda" and not is_shared else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    if is_shared:
        from hybridiff_xdit.seam import hooks

        hooks.Comm = group.ThroughHost
    while True:
        try:
            path, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            if dist.is_initialized():
                dist.destroy_process_group()
            return
        try:
            outcome = (getattr(_load(path), name)(*args), None)
        except Exception as error:
            outcome = (None, f"{traceback.format_exc()}\n{type(error).__name__}: {error}")
        pipe.send_bytes(pickle.dumps(outcome))


@cache
def _load(path: str) -> Any:
    """A file of tests as a module of its own (pytest's import mode gives it no name that could be imported)."""
    spec = importlib.util.spec_from_file_location(f"on_rank_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
