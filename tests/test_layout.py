"""What the package is made of: who imports whom, what it never does, and what is in the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hybridiff_xdit"
SOURCES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}

#: Files and folders of the package, from bottom to top: what stands in one may import what stands in those before it.
#: `planner` stands before `seam` because the known checkpoints are made of its configurations of denoisers.
ROOMS = (
    *("trees", "ranks", "schedule", "estimates", "evaluate", "config", "report", "engine", "measures"),
    *("planner", "seam", "xdit"),
)

#: The door imports from the top: the package's own names.
DOORS = ("__init__",)

#: Which room may name which in annotations only (``if TYPE_CHECKING``), against the direction.
MAY_NAME = {("schedule", "config"), ("planner", "seam")}


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


def room(name: str) -> str:
    """First part of a path or of a module's name below the package."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def rooms_imported(source: str, for_types: bool = False) -> set[str]:
    names = imports_any(source, "hybridiff_xdit", for_types=for_types)
    return {room(name.removeprefix("hybridiff_xdit.")) for name in names if "." in name} & {*ROOMS, *DOORS}


def test_imports_go_one_way():
    assert set(map(room, SOURCES)) == {*ROOMS, *DOORS}
    against = set()
    for source in SOURCES:
        if (at := room(source)) not in DOORS:
            higher = {*ROOMS[ROOMS.index(at) + 1 :], *DOORS}
            against |= {(source, other) for other in rooms_imported(source) & higher}
            named = rooms_imported(source, for_types=True) & higher
            against |= {(source, other) for other in named if (at, other) not in MAY_NAME}
    assert not against


def test_no_modules_import_each_other():
    modules = {f"hybridiff_xdit.{source.removesuffix('.py').replace('/', '.')}": source for source in SOURCES}
    needs = {module: imports(source) & modules.keys() for module, source in modules.items()}
    TopologicalSorter(needs).prepare()  # raises CycleError


def test_decisions_are_made_of_floats_only():
    outside = ("torch.distributed", "diffusers", "xfuser", "hybridiff_xdit.ranks")
    assert not {name for source in SOURCES if room(source) == "schedule" for name in imports_any(source, *outside)}


def test_only_xdit_imports_xfuser():
    assert {room(source) for source in SOURCES if imports_any(source, "xfuser")} == {"xdit"}
    assert {room(source) for source in SOURCES if imports_any(source, "hybridiff_xdit.xdit")} == {"xdit"}


def test_nothing_prints():
    # But for the commands.
    assert {source for source in SOURCES if "print" in called(source)} == {"xdit/cli.py", "xdit/output.py"}


def test_no_cuda_event_and_no_synchronize():
    # But for three: measurements are waited for by themselves, which leaves the GPU the steps that are queued behind;
    # units are timed before the first run; and a command tells the seconds of a denoising, before and after it.
    waiting = {source for source in SOURCES if called(source) & {"synchronize", "Event"}}
    assert waiting == {"engine.py", "evaluate/graphs.py", "xdit/output.py"}


WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(("xfuser", "yunchang", "triton", "matplotlib", "torchmetrics"))
import tiny, hybridiff_xdit
pipe = tiny.pipeline("sd3")
hybridiff_xdit.apply_hybrid(pipe, hybridiff_xdit.HybridConfig(plan="FFSF"))
tiny.call(pipe, "sd3", num_inference_steps=4)
assert hybridiff_xdit.last_report(pipe)["plan"] == "FFSF"
try:
    hybridiff_xdit.apply_hybrid(pipe, hybridiff_xdit.HybridConfig(report="."))
except ValueError as error:
    print(error)
"""


def test_plain_diffusers_needs_none_of_the_extras():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "pip install hybridiff_xdit[report]" in run.stdout


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
    assert modules == {f"hybridiff_xdit/{source}" for source in [*SOURCES, "py.typed", "planner/speeds.json"]}
