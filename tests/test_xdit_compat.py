"""The ledger of what we touch of xDiT, against the releases that we say we run on."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridiff_xdit.xdit import compat

ROOT = Path(__file__).parents[1]
CHECK = """
import sys
from hybridiff_xdit.xdit.compat import check_ledger
problems = check_ledger()
print(sys.modules["xfuser"].__file__)
sys.exit("\\n".join(problems) or None)
"""
#: Set this to go without an index; the installed release is checked all the same.
OFFLINE = "HYBRIDIFF_TEST_OFFLINE"


def check_with(python_path: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": python_path}
    return subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, env=env, capture_output=True, text=True)


def test_ledger_with_the_installed_xfuser():
    result = check_with("")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("version", ["0.5.0", "0.6.0", "0.7.0"])
def test_ledger_with_each_release(version, tmp_path):
    if os.environ.get(OFFLINE):
        pytest.skip(f"{OFFLINE} is set")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    result = subprocess.run([*install, f"xfuser=={version}"], capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stderr}\n(set {OFFLINE}=1 where there is no index)"
    result = check_with(str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(str(tmp_path))


def test_ledger_names_what_is_missing():
    def problem(name, *parameters):
        return compat._problem(compat.Seam("pathlib", name, parameters, why="", until="")) or ""

    assert not problem("Path.mkdir", "mode")
    assert problem("Path.mkdir", "mode", "colour") == "pathlib.Path.mkdir: no parameter colour"
    assert "no_such_name" in problem("Path.no_such_name")


def test_every_import_from_xfuser_is_in_the_ledger():
    listed = {(seam.module, seam.name) for seam in compat.LEDGER}
    for path in (ROOT / "hybridiff_xdit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("xfuser"):
                assert path.parent.name == "xdit", f"{path} imports xfuser"
                for alias in node.names:
                    assert (node.module, alias.name) in listed, f"{path.name}: {node.module}.{alias.name}"
