"""The models of xDiT's runner under hybrid-cond on two GPUs: tiny checkpoints, in bf16 as the runner loads them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from nursery import FOLDERS, TESTS
from test_xdit_models import HYBRID, MODELS, PLAN, SKIPPING, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

EXACT = [*HYBRID, "--hybrid_policy", "cfg"]
PLANNED = [*HYBRID, "--hybrid_plan", PLAN]
COMPILED = ["wan21-unipc", "qwen", "pixart"]
#: Name, processes, flags and cases of each run.
RUNS = [
    ("plain", 1, [], [*MODELS]),
    ("exact", 2, EXACT, [*MODELS]),
    ("eager", 2, [*EXACT, "--hybrid_cuda_graphs", "off"], [*MODELS]),
    ("alone", 1, PLANNED, SKIPPING),
    ("skipping", 2, PLANNED, SKIPPING),
    ("compiled", 2, [*EXACT, "--use_torch_compile"], COMPILED),
]
ROUNDING = 0.1  # of the largest latent: bf16, eight steps, and batches of one beside a batch of two


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name of the run: what its last rank saved, by case."""
    folder = tmp_path_factory.mktemp("models")
    save(folder, MODELS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])}
    running = [subprocess.Popen(command(folder, *run), env=env, stderr=subprocess.PIPE, text=True) for run in RUNS]
    for process in running:
        error = process.communicate(timeout=300)[1]
        assert not process.returncode, error[-4000:]
    return {name: torch.load(folder / f"{name}-{processes - 1}.pt", weights_only=False) for name, processes, *_ in RUNS}


def command(folder, name, processes, flags, cases):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launch, str(TESTS / "xdit_models_worker.py"), str(folder), name, json.dumps(flags), *cases]


def made(results, run, name):
    result = results[run][name]
    assert "error" not in result, result["trace"]
    return result["made"].float().cpu()


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_runners_own(results, name):
    found, expected = made(results, "exact", name), made(results, "plain", name)
    assert expected.isfinite().all() and off(found, expected) < ROUNDING
    assert torch.equal(made(results, "eager", name), found)
    assert results["exact"][name]["report"]["plan"] == "F" * 8


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_steps(results, name):
    found, alone = made(results, "skipping", name), made(results, "alone", name)
    assert results["skipping"][name]["report"]["plan"] == PLAN
    assert off(found, alone) < ROUNDING
    assert not torch.equal(found, made(results, "plain", name))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(results, name):
    assert off(made(results, "compiled", name), made(results, "exact", name)) < ROUNDING
