"""The ledger of what we touch of diffusers, against the lowest and the newest release that we say we run on."""

import ast
import os

import pytest
import releases

from hybridiff_xdit.seam import compat

#: The lowest; the newest is the one that is installed.
LOWEST = "0.35.2"


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """As `releases.check` returns it."""
    base = tmp_path_factory.mktemp("diffusers")
    return releases.check("diffusers", "hybridiff_xdit.seam.compat", "torch transformers", [LOWEST], base)


def test_ledger_with_the_installed_diffusers(checked):
    _, problems = checked["installed"]
    assert not problems


def test_ledger_with_the_lowest_diffusers(checked):
    if os.environ.get(releases.OFFLINE):
        pytest.skip(f"{releases.OFFLINE} is set")
    file, problems = checked[LOWEST]
    assert f"/{LOWEST}/diffusers/" in file
    assert not problems


def test_the_lowest_is_what_the_package_asks_for():
    lines = (releases.ROOT / "pyproject.toml").read_text()
    assert f'"diffusers>={LOWEST},<' in lines


def test_ledger_names_what_is_missing():
    def problem(name: str, *parameters: str) -> str:
        return "".join(compat.missing([compat.Seam("pathlib", name, parameters, why="", until="")]))

    assert not problem("Path.mkdir", "mode")
    assert problem("Path.mkdir", "mode", "colour") == "pathlib.Path.mkdir: no parameter colour"
    assert "no_such_name" in problem("Path.no_such_name")


def test_ledger_finds_what_a_method_sets():
    def problem(name: str) -> str:
        return "".join(compat.missing([compat.Seam("argparse", name, None, why="", until="")]))

    assert not problem("ArgumentParser.add_help")
    assert not problem("ArgumentParser.prefix_chars")  # by a class that it is made of
    assert "no_such_name" in problem("ArgumentParser.no_such_name")


def test_every_import_from_within_diffusers_is_in_the_ledger():
    listed = {(seam.module, seam.name.split(".")[0]) for seam in compat.LEDGER}
    for path in (releases.ROOT / "hybridiff_xdit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers."):
                for alias in node.names:
                    is_module = (f"{node.module}.{alias.name}", "tqdm") in listed  # diffusers.utils.logging
                    assert is_module or (node.module, alias.name) in listed, f"{path.name}: {node.module}.{alias.name}"
