"""The ledger of what we touch of xDiT, against the releases that we say we run on."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridiff_xdit.xdit import compat

ROOT = Path(__file__).parents[1]
#: In a process of its own, forked for each folder that is put in front of the path ("": the installed release).
CHECK = """
import os, sys
import diffusers, torch, transformers  # once, and nothing of xfuser's
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.path[:0] = filter(None, [folder])
            from hybridiff_xdit.xdit.compat import check_ledger
            problems = check_ledger()
            print(folder, sys.modules["xfuser"].__file__, *problems, sep="|", flush=True)
            status = 0
        finally:
            os._exit(status)
    assert not os.waitpid(child, 0)[1], folder
"""
#: Set this to go without an index; the installed release is checked all the same.
OFFLINE = "HYBRIDIFF_TEST_OFFLINE"
RELEASES = ["0.5.0", "0.6.0", "0.7.0"]
#: One process installs all, and what is not imported is not compiled.
INSTALL = """
import sys
from pip._internal.cli.main import main
folder, *releases = sys.argv[1:]
flags = ["--quiet", "--no-deps", "--no-compile", "--disable-pip-version-check"]
for release in releases:
    if status := main(["install", *flags, "--target", f"{folder}/{release}", f"xfuser=={release}"]):
        sys.exit(status)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """(where xfuser lies, what its ledger lacks) by release; of the installed one by "installed"."""
    base, releases = tmp_path_factory.mktemp("xfuser"), [] if os.environ.get(OFFLINE) else RELEASES
    if releases:
        installed = run(INSTALL, str(base), *releases)
        assert installed.returncode == 0, f"{installed.stderr}\n(set {OFFLINE}=1 where there is no index)"
    result = run(CHECK, "", *(str(base / release) for release in releases))
    assert result.returncode == 0, result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines() if "|" in line]
    return {Path(folder).name or "installed": (file, problems) for folder, file, *problems in rows}


def test_ledger_with_the_installed_xfuser(checked):
    _, problems = checked["installed"]
    assert not problems


@pytest.mark.parametrize("release", RELEASES)
def test_ledger_with_each_release(checked, release):
    if os.environ.get(OFFLINE):
        pytest.skip(f"{OFFLINE} is set")
    file, problems = checked[release]
    assert f"/{release}/xfuser/" in file
    assert not problems


def test_ledger_names_what_is_missing():
    def problem(name, *parameters):
        return compat._problem(compat.Seam("pathlib", name, parameters, why="", until="")) or ""

    assert not problem("Path.mkdir", "mode")
    assert problem("Path.mkdir", "mode", "colour") == "pathlib.Path.mkdir: no parameter colour"
    assert "no_such_name" in problem("Path.no_such_name")


def test_every_import_from_xfuser_is_in_the_ledger():
    listed = {(seam.module, seam.name) for seam in (*compat.LEDGER, *compat.PLUGIN_LEDGER)}
    for path in (ROOT / "hybridiff_xdit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("xfuser"):
                assert path.parent.name == "xdit", f"{path} imports xfuser"
                for alias in node.names:
                    assert (node.module, alias.name) in listed, f"{path.name}: {node.module}.{alias.name}"
