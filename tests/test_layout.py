"""What the package is made of: who imports whom, what it never does, and what is in the wheel."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridiff_xdit"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

#: What each module of the core may import from the package: nothing that stands to its right in design.md's picture.
MAY_IMPORT = {
    "discrepancy": set(),
    "plan": {"discrepancy"},
    "guidance": set(),
    "config": {"plan", "guidance"},
    "partition": set(),
    "comm": {"partition"},
    "executor": {"partition", "comm"},
    "report": {"plan"},
    "hybrid": {"discrepancy", "plan", "guidance", "config", "partition", "comm", "executor", "report"},
    "checkpoints": set(),
}


def imports(source: str) -> set[str]:
    """Absolute names of every module that a file imports, wherever in it."""
    package = ["hybridiff_xdit", *source.split("/")[:-1]]
    names = set()
    for node in ast.walk(SOURCES[source]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names.add(".".join(module))
            names |= {".".join([*module, alias.name]) for alias in node.names}
    return names


def imports_any(source: str, *packages: str) -> set[str]:
    return {name for name in imports(source) if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def called(source: str) -> set[str]:
    """Last parts of the names of everything that a file calls."""
    functions = [node.func for node in ast.walk(SOURCES[source]) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def test_every_module_has_its_place():
    top = {name.removesuffix(".py") for name in SOURCES if "/" not in name}
    assert top == MAY_IMPORT.keys() | {"__init__", "launch"}  # launch is a door: one line that calls xdit/


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    own = {name.split(".")[1] for name in imports_any(f"{module}.py", "hybridiff_xdit") if "." in name}
    assert own <= MAY_IMPORT[module]


@pytest.mark.parametrize("module", ["discrepancy", "plan"])
def test_decisions_are_made_of_floats_only(module):
    assert not imports_any(f"{module}.py", "torch.distributed", "diffusers", "xfuser")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_only_xdit_imports_xfuser(source):
    if not source.startswith("xdit/"):
        assert not imports_any(source, "xfuser")
        if source != "launch.py":
            assert not imports_any(source, "hybridiff_xdit.xdit")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_nothing_prints(source):
    if source != "xdit/cli.py":
        assert "print" not in called(source)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_no_cuda_event_and_no_synchronize(source):
    assert not called(source) & {"synchronize", "Event"}


def test_importing_the_package_does_not_import_xfuser():
    code = "import sys, hybridiff_xdit; sys.exit('xfuser' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_the_wheel_contains_only_the_package(tmp_path):
    checkout = tmp_path / "checkout"  # a copy, because building leaves files behind
    big_or_built = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "models", "results")
    shutil.copytree(ROOT, checkout, ignore=big_or_built)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, checkout]
    offline = subprocess.run([*build, "--no-build-isolation"], capture_output=True, text=True, timeout=200)
    if offline.returncode:  # this environment's setuptools is missing or too old: let pip fetch one
        subprocess.run(build, check=True, timeout=200)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert modules == {f"hybridiff_xdit/{source}" for source in SOURCES}
