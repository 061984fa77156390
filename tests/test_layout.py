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
    "sampler": set(),
    "plan": {"discrepancy", "sampler"},
    "guidance": {"discrepancy", "sampler"},
    "adaptive": {"discrepancy", "sampler", "plan"},
    "policies": {"plan", "adaptive", "sampler"},
    "config": {"plan", "guidance", "policies"},
    "partition": set(),
    "comm": {"partition"},
    "agreement": {"partition", "comm"},
    "encoding": {"partition", "comm", "agreement"},
    "sequence": {"partition", "comm"},
    "graphs": {"partition"},
    "executor": {"partition", "comm", "graphs", "plan"},
    "report": {"plan"},
    "hybrid": {
        *("discrepancy", "sampler", "plan", "guidance", "policies", "config"),
        *("partition", "comm", "agreement", "encoding", "sequence", "graphs", "executor", "report"),
    },
    "denoisers": set(),
    "checkpoints": {"denoisers"},
    "planner": {"plan", "config", "partition", "graphs", "denoisers", "checkpoints"},
}

#: What a module may name in annotations only (``if TYPE_CHECKING``), against the direction.
MAY_NAME = {"policies": {"config"}}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST, for_types: bool) -> list[ast.AST]:
    """Every node within ``if TYPE_CHECKING``, or every other."""
    blocks = [node for node in ast.walk(tree) if is_for_types(node)]
    inside = {id(child) for block in blocks for node in block.body for child in ast.walk(node)}
    return [node for node in ast.walk(tree) if (id(node) in inside) == for_types]


def imports(source: str, for_types: bool = False) -> set[str]:
    """Absolute names of every module that a file imports, wherever in it."""
    package = ["hybridiff_xdit", *source.split("/")[:-1]]
    names = set()
    for node in nodes(SOURCES[source], for_types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names.add(".".join(module))
            names |= {".".join([*module, alias.name]) for alias in node.names}
    return names


def imports_any(source: str, *packages: str, for_types: bool = False) -> set[str]:
    names = imports(source, for_types)
    return {name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def called(source: str) -> set[str]:
    """Last parts of the names of everything that a file calls."""
    functions = [node.func for node in ast.walk(SOURCES[source]) if isinstance(node, ast.Call)]
    return {getattr(function, "attr", getattr(function, "id", "")) for function in functions}


def test_every_module_has_its_place():
    top = {name.removesuffix(".py") for name in SOURCES if "/" not in name}
    assert top == MAY_IMPORT.keys() | {"__init__", "launch"}  # launch is a door: one line that calls xdit/


def own(module: str, for_types: bool = False) -> set[str]:
    names = imports_any(f"{module}.py", "hybridiff_xdit", for_types=for_types)
    return {name.split(".")[1] for name in names if "." in name}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_go_one_way(module):
    assert own(module) <= MAY_IMPORT[module]
    assert own(module, for_types=True) <= MAY_IMPORT[module] | MAY_NAME.get(module, set())


def test_the_map_itself_goes_one_way():
    placed: set[str] = set()
    while ready := {module for module, needs in MAY_IMPORT.items() if module not in placed and needs <= placed}:
        placed |= ready
    assert placed == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", ["discrepancy", "plan", "adaptive", "policies", "sampler"])
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
    # But for two: measurements are waited for by themselves, which leaves the GPU the steps that are queued behind; and
    # units are timed before the first run.
    allowed = {"Event", "synchronize"} if source in ("hybrid.py", "graphs.py") else set()
    assert not called(source) & {"synchronize", "Event"} - allowed


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
