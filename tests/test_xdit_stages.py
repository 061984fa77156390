"""More than two stages from xDiT, alone and beside its other axes: the pictures of one process that plays all."""

import json

import numpy as np
import pytest
import xdit_tiny
from nursery import run_module
from PIL import Image

from hybridiff_xdit import HybridConfig, apply_hybrid
from hybridiff_xdit.xdit.groups import stage_ranks

from xfuser.core.distributed.utils import RankGenerator  # isort: skip  # it imports only after ours

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = "FFFFFPPFSF"


def simulated(folder, name, prompts):
    """Pictures, [N, H, W, C] in [0, 1]."""
    pipe = xdit_tiny.load(folder / name)
    apply_hybrid(pipe, HybridConfig(plan=PLAN, stages=4), simulate=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 10, "guidance_scale": 5, "output_type": "np"}
    return pipe(prompts, **call, generator=xdit_tiny.generator()).images


@pytest.mark.parametrize(
    ("name", "prompts", "flags", "shards"),
    [
        ("sdxl", ["a cat", "two dogs", "red"], ["--data_parallel_degree", "2"], 1),
        (
            *("sd3", ["a cat", "two dogs"]),
            ["--data_parallel_degree", "2", "--ring_degree", "2", "--attention_backend", "sdpa_flash"],
            2,
        ),
    ],
)
def test_the_runner(tmp_path, name, prompts, flags, shards):
    xdit_tiny.save(name, tmp_path)
    command = ["--model", tmp_path / name, "--prompt", *prompts, "--num_inference_steps", 10, "--guidance_scale", 5]
    command += ["--seed", 42, "--parallel", "hybrid-cond", "--hybrid_stages", 4, "--hybrid_plan", PLAN, *flags]
    command += ["--hybrid_report", tmp_path / "report"]
    run_module("hybridiff_xdit.xdit.runner", *command, processes=8 * shards, cwd=tmp_path)
    expected = simulated(tmp_path, name, prompts)
    for i, picture in enumerate(expected):
        found = Image.open(tmp_path / f"{name}_hybrid-cond_u1r{shards}_tc_False_32x32_{i}.png")
        assert abs(np.asarray(found) - 255 * picture).max() < 1  # one 8-bit level
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["plan"], report["world_size"], len(report["bytes_sent"])) == (PLAN, 4 * shards, 4)


@pytest.mark.parametrize(
    ("data", "stages", "shards"), [(1, 4, 1), (1, 4, 2), (2, 4, 2), (3, 6, 4), (2, 8, 3), (1, 2, 2), (2, 2, 2)]
)
def test_the_groups_follow_xdits_numbers(data, stages, shards):
    """xDiT numbers ranks, but makes no group of pipeline and branch."""
    generator = RankGenerator(1, shards, stages // 2, 2, data, 1, "tp-sp-pp-cfg-dp")
    assert stage_ranks(data * stages * shards, stages, shards) == generator.get_ranks("pp-cfg")
