"""What a ledger of another package's names lacks, in the installed release and in others that are put aside."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Set this to go without an index; the installed release is checked all the same.
OFFLINE = "HYBRIDIFF_TEST_OFFLINE"
#: One process installs all, and what is not imported is not compiled.
INSTALL = """
import sys
from pip._internal.cli.main import main
folder, package, *releases = sys.argv[1:]
flags = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check"]
for release in releases:
    if status := main(["install", *flags, "--target", f"{folder}/{release}", f"{package}=={release}"]):
        sys.exit(status)
"""
#: In a process of its own, forked for each folder that is put in front of the path ("": the installed release).
CHECK = """
import importlib, os, sys
shared, ledger, package, *folders = sys.argv[1:]
for name in shared.split():  # once, and nothing of the package's
    importlib.import_module(name)
for folder in folders:
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.path[:0] = filter(None, [folder])
            problems = importlib.import_module(ledger).check_ledger()
            print(folder, sys.modules[package].__file__, *problems, sep="|", flush=True)
            status = 0
        finally:
            os._exit(status)
    assert not os.waitpid(child, 0)[1], folder
"""


def check(package: str, ledger: str, shared: str, releases: list[str], base: Path) -> dict[str, tuple[str, list[str]]]:
    """(where the package lies, what the ledger misses of it) by release; of the installed one by "installed".

    Args:
        package: whose names they are.
        ledger: module that has ``check_ledger``.
        shared: modules that all releases may share, with spaces between.
        releases: beside the installed one; none where there is no index.
        base: folder that they are installed in.
    """
    releases = [] if os.environ.get(OFFLINE) else releases
    if releases:
        installed = _run(INSTALL, str(base), package, *releases)
        assert installed.returncode == 0, f"{installed.stderr}\n(set {OFFLINE}=1 where there is no index)"
    result = _run(CHECK, shared, ledger, package, "", *(str(base / release) for release in releases))
    assert result.returncode == 0, result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines() if "|" in line]
    return {Path(folder).name or "installed": (file, problems) for folder, file, *problems in rows}


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
