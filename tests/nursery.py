"""Python command lines in processes that need not import everything anew, as torchrun starts them and with torchrun.

Importing torch, diffusers and xfuser takes a process ten seconds, and the tests start hundreds. So a fork server
imports them once (`warm`) and is asked for each process. (What such a script starts imports that script, as
multiprocessing has it: it needs its ``if __name__``.) The command and its launcher are started as users do, with
nothing imported, in `test_xdit_runs` and `test_xdit_patches`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partialmethod
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

TESTS = Path(__file__).parent
FOLDERS = (TESTS.parent, TESTS, TESTS.parent / "benchmarks")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(map(str, FOLDERS))}
LONGEST = 240  # seconds of a script
GRACE = 5  # seconds that the other ranks have to end by themselves when one has failed


@cache
def warm() -> Any:
    """The context of processes that are forked from one that has imported `warm`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "oracle"])
    with patch.dict(os.environ, ENV):
        forkserver._forkserver.ensure_running()
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_module(module: str, *arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess:
    """`run`, as ``python -m`` does with a module."""
    return run("-m", module, *arguments, **kwargs)


def run(*command: Any, processes: int, check: bool = True, cwd: Path = TESTS) -> subprocess.CompletedProcess:
    """Run ``python COMMAND`` on so many ranks in a folder; the first status that is not 0, and all that they print."""
    place = {"GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        ranks = [
            start(*command, env={**place, "RANK": rank, "LOCAL_RANK": rank}, cwd=cwd, output=output.name)
            for rank in range(processes)
        ]
        result = subprocess.CompletedProcess(command, _wait(ranks), stderr=output.read())
    assert not check or not result.returncode, result.stderr[-4000:]
    return result


def launch(*commands: Sequence[Any], cwd: Path = TESTS, check: bool = True) -> subprocess.CompletedProcess:
    """Run each ``python COMMAND`` beside the others, as launchers of ranks; as `run`, but with both outputs apart."""
    with tempfile.NamedTemporaryFile("r") as output, tempfile.NamedTemporaryFile("r", errors="replace") as errors:
        launchers = [start(*c, cwd=cwd, output=output.name, errors=errors.name) for c in commands]
        result = subprocess.CompletedProcess(commands, _wait(launchers), output.read(), errors.read())
    assert not check or not result.returncode, result.stderr[-4000:]
    return result


def start(*command: Any, env: dict | None = None, cwd: Path = TESTS, output: str, errors: str | None = None) -> Any:
    """Start ``python COMMAND``; its outputs go to files."""
    given = {name: str(value) for name, value in (env or {}).items()}
    process = warm().Process(target=_python, args=(list(map(str, command)), given, cwd, output, errors or output))
    process.start()
    return process


def _python(command: list[str], env: dict[str, str], cwd: Path | str, *files: str) -> None:
    """The life of a process that is ``python COMMAND``."""
    import torch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    torch.set_num_threads(1)  # the first call after a fork renews PyTorch's pool, which two threads must not do at once
    status = 1
    try:
        os.setsid()
        os.environ.update(env)
        for stream, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
        os.chdir(cwd)
        forkserver._forkserver.ensure_running = lambda: None  # this one's is asked for another process too
        SubprocessHandler._popen = _popen
        SubprocessHandler.close = partialmethod(_close, SubprocessHandler.close)
        is_module = command[0] == "-m"
        sys.argv = command[is_module:]
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _popen(handler: Any, args: Sequence[str], env: dict[str, str]) -> Any:
    """What torchrun starts a rank with, in place of `subprocess.Popen`."""
    command = [argument for argument in args[1:] if argument != "-u"]
    output, errors = (f"/proc/{os.getpid()}/fd/{stream}" for stream in (1, 2))
    return start(*command, env=env, cwd=Path.cwd(), output=output, errors=errors)._popen


def _close(handler: Any, close: Any, death_sig: Any = None) -> None:
    with suppress(ProcessLookupError):  # the fork server leaves nothing of a process that has ended
        close(handler, death_sig)


def _wait(processes: list[Any]) -> int:
    """The first status that is not 0; then, or when it takes too long, the other processes are killed."""
    running, failed, deadline = set(processes), 0, time.monotonic() + LONGEST
    while running:
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            if process.exitcode and not failed:
                failed, deadline = process.exitcode, min(deadline, time.monotonic() + GRACE)
        if running and time.monotonic() > deadline:
            failed = failed or 124
            for process in running:
                process.kill()
            deadline = float("inf")
        time.sleep(0.02)
    return failed
