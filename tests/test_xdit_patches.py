"""The patches for xfuser 0.7.0, and `hybrid-cond` as a plugin of an xfuser that has them."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from nursery import ENV, TESTS, free_port, run_module

ROOT = TESTS.parent
PATCHES = sorted((ROOT / "integrations" / "xdit" / "patches" / "xfuser-0.7.0").glob("*.patch"))
#: A model of the runner that a plugin brings.
TINY = """
from types import SimpleNamespace

from PIL import Image
from xfuser.model_executor.models.runner_models.base_model import (
    DiffusionOutput, ModelSettings, register_model, xFuserModel,
)


class Pipeline:
    unet, components = None, {}

    def to(self, device):
        assert device.type == "cpu"
        return self


class Tiny(xFuserModel):
    settings = ModelSettings(model_name="tiny", output_name="tiny", model_output_type="image")

    def _load_model(self):
        return Pipeline()

    def _run_pipe(self, input_args):
        return DiffusionOutput(images=[Image.new("RGB", (8, 8))], pipe_args=input_args)


def register():
    register_model("tiny")(Tiny)
"""
#: (Number of patches, which of our distributions is installed) by check.
CHECKS = {
    "runs_without_an_accelerator": (1, "with"),
    "loads_plugins": (2, "with"),
    "has_no_flag_without_the_entry_point": (3, "without"),
    "has_the_strategy_with_the_entry_point": (4, "with"),
}
FLAGS = ["--model", "emoji-sd3", "--parallel", "hybrid-cond", "--prompt", "a cup of tea", "--num_inference_steps", "6"]
FLAGS += ["--hybrid-plan", "FFSFPF", "--seed", "7"]


def package(folder: Path, name: str, entry_points: str) -> Path:
    """A folder that, in front of the path, is an installed distribution of this name, in place of any other."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


def apply(patch: Path, folder: Path) -> str:
    """Apply a patch as git does: without fuzz. What git says of it."""
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "LC_ALL": "C"}  # the folder is no repository
    command = ["git", "apply", "--verbose", str(patch)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stderr


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[int, tuple[Path, str]]:
    """(The installed xfuser with the first patches, what git said of the last one) by the number of patches."""
    base = tmp_path_factory.mktemp("patched")
    installed = distribution("xfuser")
    assert installed.version == "0.7.0"
    before = base / "0"
    for file in installed.files or ():
        if file.suffix != ".pyc" and file.parts[0] in ("xfuser", "docs", "tests", "examples"):
            (before / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), before / file)
    patched = {}
    for number, patch in enumerate(PATCHES, 1):
        copy = shutil.copytree(before, base / str(number))
        patched[number] = copy, apply(patch, copy)
        before = copy
    return patched


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    """Folders of installed distributions: ours with what pyproject.toml says, without it, and one with a model."""
    base = tmp_path_factory.mktemp("plugins")
    (ours,) = re.findall(
        r'(?<=\[project.entry-points."xfuser.plugins"\]\n)\w+ = "[\w.:]+"', (ROOT / "pyproject.toml").read_text()
    )
    package(base / "with", "hybridiff_xdit", f"[xfuser.plugins]\n{ours}\n".replace('"', ""))
    package(base / "without", "hybridiff_xdit", "")
    package(base / "tiny", "tiny", "[xfuser.plugins]\ntiny = tiny_plugin:register\n")
    (base / "tiny" / "tiny_plugin.py").write_text(TINY)
    return base


def path(*folders: Path) -> str:
    return os.pathsep.join(map(str, folders))


@pytest.fixture(scope="module")
def checked(copies, plugins, tmp_path_factory) -> Path:
    """The folder with what each of the checks came to."""
    folder, arguments = tmp_path_factory.mktemp("checked"), []
    for check, (number, ours) in CHECKS.items():
        arguments += [path(copies[number][0], plugins / ours, plugins / "tiny"), check]
    command = [sys.executable, TESTS / "xdit_patches_worker.py", *arguments]
    result = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=240)
    assert not result.returncode, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def picture_of_xdit(copies, plugins, tmp_path_factory):
    """Starts xDiT's command; called, the picture that it has made. The checks run meanwhile."""
    folder = tmp_path_factory.mktemp("xdit")
    env = {**ENV, "PYTHONPATH": path(copies[4][0], plugins / "with", ROOT), "LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "xfuser.cli", *FLAGS, "--master_port", str(free_port())]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield lambda: finished(process, folder)
        finally:
            process.terminate()
            process.wait()


def finished(process: subprocess.Popen, folder: Path) -> bytes:
    assert process.wait(240) == 0, (folder / "log").read_text()[-4000:]
    (picture,) = folder.glob("*.png")
    return picture.read_bytes()


def test_there_are_four_patches():
    titles = [re.search(r"^Subject: \[PATCH \d/4\] (.*)", patch.read_text(), re.M)[1] for patch in PATCHES]
    assert [title.split(":")[0] for title in titles] == ["feat", "feat", "feat", "docs"]


@pytest.mark.parametrize("number", range(1, 5))
def test_every_hunk_applies_where_it_says(copies, number):
    _, said = copies[number]
    files = re.findall(r"^diff --git a/(\S+)", PATCHES[number - 1].read_text(), re.M)
    assert said.splitlines() == [
        *(f"Checking patch {file}..." for file in files),
        *(f"Applied patch {file} cleanly." for file in files),
    ]


@pytest.mark.parametrize("check", CHECKS)
def test_a_patched_xfuser(picture_of_xdit, checked, check):
    assert (checked / check).read_text() == ""


def test_the_page_of_the_last_patch_is_linked(copies):
    docs = copies[4][0] / "docs"
    assert "(../methods/plugins.md)" in (docs / "runner" / "runner.md").read_text()
    assert (docs / "methods" / "plugins.md").is_file()


def test_xdit_with_the_plugin_makes_the_picture_of_xdit_hybrid(picture_of_xdit, tmp_path):
    run_module("hybridiff_xdit.xdit.runner", *FLAGS, processes=2, cwd=tmp_path)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes() == picture_of_xdit()
