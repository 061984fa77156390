"""Runs a script in several processes, as torchrun does, without each of them importing everything anew.

Importing torch, diffusers and xfuser takes a process ten seconds, and the tests start a hundred. So one process imports
them once and forks the others: ``python nursery.py`` does that, for each line of JSON that it reads. What torchrun
itself does is tested where the command and the launcher are.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
FOLDERS = (TESTS.parent, TESTS, TESTS.parent / "benchmarks")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(map(str, FOLDERS))}
LONGEST = 240  # seconds of a script
GRACE = 5  # seconds that the other ranks have to end by themselves when one has failed


def run_module(module: str, *arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess:
    """`run`, as ``python -m`` does with a module."""
    return run(TESTS / "xdit_module_worker.py", module, *arguments, **kwargs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    script: Path, *arguments: Any, processes: int, check: bool = True, cwd: Path = TESTS, warm: str = "warm"
) -> subprocess.CompletedProcess:
    """Run a script on so many ranks in a folder; the first status that is not 0, and what all of them printed.

    ``warm`` is a module that is imported once, before they are forked.
    """
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        job = {"argv": [str(script), *map(str, arguments)], "processes": processes, "output": output.name}
        job |= {"cwd": str(cwd), "warm": warm}
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the nursery has ended: see its first error"
        result = subprocess.CompletedProcess(job["argv"], json.loads(answer), stderr=output.read())
    assert not check or not result.returncode, result.stderr[-4000:]
    return result


@cache
def _server() -> Any:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=ENV, **pipes)
    atexit.register(server.kill)
    return server


def main() -> None:
    os.environ.setdefault("LOG_LEVEL", "error")  # xDiT would log to where the answers go
    importlib.import_module("hybridiff_xdit.xdit.models")  # and with it everything that is large
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job.pop("warm"))
        port = free_port()
        children = [_fork(rank, port, **job) for rank in range(job["processes"])]
        print(_wait(children), flush=True)


def _fork(rank: int, port: int, argv: list[str], processes: int, output: str, cwd: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
        sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in (place | sizes).items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.chdir(cwd)
        sys.argv = argv
        sys.path[0] = str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
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


def _wait(children: list[int]) -> int:
    """The first status that is not 0; then, or when it takes too long, the other children are killed."""
    running, failed, deadline = set(children), 0, time.monotonic() + LONGEST
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                code = os.waitstatus_to_exitcode(status)
                if code and not failed:
                    failed, deadline = code, min(deadline, time.monotonic() + GRACE)
        if running and time.monotonic() > deadline:
            failed = failed or 124
            for child in running:
                os.kill(child, 9)
            deadline = float("inf")
        time.sleep(0.02)
    return failed


if __name__ == "__main__":
    main()
