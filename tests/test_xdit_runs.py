"""xDiT's pipelines, runner and example scripts under hybrid-cond, on two gloo ranks."""

import json
import re
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
import xdit_tiny
from nursery import ENV, TESTS, launch, run, run_module
from PIL import Image

#: As a user has it, who has said nothing about threads or warnings.
AS_SHIPPED = {name: value for name, value in ENV.items() if name not in ("OMP_NUM_THREADS", "PYTHONWARNINGS")}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("sd3", "sdxl"):
        xdit_tiny.save(name, folder)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank got, by (pipeline, policy)."""
    folder = tmp_path_factory.mktemp("results")
    run(TESTS / "xdit_worker.py", folder, processes=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@torch.no_grad()
def branch_by_branch(pipe, call):
    """SD3's loop with the two branches evaluated one by one, [B, C, H, W]."""
    cond, uncond, pooled_c, pooled_u = pipe.encode_prompt(
        call["prompt"], None, None, negative_prompt=call["negative_prompt"], do_classifier_free_guidance=True
    )
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    size = xdit_tiny.COMMON["height"] // pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels, size, size)
    latents = torch.randn(shape, generator=xdit_tiny.generator())
    for t in pipe.scheduler.timesteps:
        pred_u, pred_c = (
            pipe.transformer(
                hidden_states=latents,
                timestep=t.expand(1),
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            for tokens, pooled in ((uncond, pooled_u), (cond, pooled_c))
        )
        guided = pred_u + call["guidance_scale"] * (pred_c - pred_u)
        latents = pipe.scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


def test_sd3_all_full_is_bit_identical(results):
    expected = branch_by_branch(xdit_tiny.pipeline("sd3"), xdit_tiny.CALLS["sd3"])
    assert torch.equal(results[1]["sd3", "cfg"][0], expected)


def test_sdxl_with_prompts_and_images_is_plain_diffusers(results):
    expected = xdit_tiny.pipeline("sdxl")(
        **xdit_tiny.CALLS["sdxl"], **xdit_tiny.COMMON, generator=xdit_tiny.generator()
    ).images
    assert expected.shape[0] == 4
    torch.testing.assert_close(results[1]["sdxl", "cfg"][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_pipelined_steps_are_taken(results, name):
    full, fixed = results[1][name, "cfg"], results[1][name, "fixed"]
    assert fixed[1]["plan"] == "FFPPFPFF"
    assert fixed[1]["model"] == name
    assert not torch.equal(full[0], fixed[0])
    assert (full[0] - fixed[0]).abs().max() < full[0].abs().max()


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_the_default_policy_with_a_target(results, name):
    (_, report), (images, last) = (results[rank][name, "adaptive"] for rank in range(2))
    assert report == last
    assert "S" in last["plan"] and last["speedup_bound"] >= 2.2
    assert last["config"]["guidance"] == "deferred" and images.isfinite().all()
    full = results[1][name, "cfg of ten"][0]
    assert 0 < (full - images).abs().max() < full.abs().max()


def test_only_the_last_rank_hands_out_pictures(results):
    assert all(images is None for images, _ in results[0].values())


def test_cli_makes_a_picture_and_a_report_and_says_little(models, tmp_path):
    command = [sys.executable, "-m", "hybridiff_xdit.xdit.cli", "--model", str(models / "sd3"), "--prompt", "a cat"]
    command += ["--parallel", "hybrid-cond", "--num_inference_steps", "10", "--hybrid-plan", "3-9/2"]
    command += ["--output_directory", str(tmp_path / "new"), "--hybrid_report", str(tmp_path / "report")]
    result = subprocess.run(command, env=AS_SHIPPED, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    picture = tmp_path / "new" / "sd3_hybrid-cond_u1r1_tc_False_32x32_0.png"
    assert list((tmp_path / "new").iterdir()) == [picture]  # and no timings.json
    summary, where = result.stdout.splitlines()
    assert re.fullmatch(
        r"7 FULL, 3 PIPELINED of 10 steps; speed-up bound 2\.35 over one GPU; \d+\.\d\d s denoising", summary
    )
    assert where == str(picture)
    bars = [line.partition(": ") for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert list(dict.fromkeys(name for name, *_ in bars)) == ["loading", "denoising"]
    kinds = dict(re.findall(r"(\d+)/10 \[[^]]*, (\w+)\]", result.stderr))
    assert [kinds[str(step)][0] for step in range(1, 11)] == [*"FFFPFPFPFF"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["plan"] == "FFFPFPFPFF"
    assert report["model"] == str(models / "sd3")


def test_cli_deals_pictures_out(models, tmp_path):
    prompts = ["a cat", "two dogs", "red"]
    command = ["-m", "hybridiff_xdit.xdit.cli", "--model", models / "sdxl", "--prompt", *prompts]
    command += ["--parallel", "hybrid-cond", "--hybrid_policy", "cfg", "--data_parallel_degree", "2"]
    command += ["--use_parallel_vae", "--num_inference_steps", "6", "--guidance_scale", "5", "--save-timings"]
    result = launch(command, cwd=tmp_path)
    size = {"height": 32, "width": 32, "num_inference_steps": 6, "guidance_scale": 5, "output_type": "np"}
    expected = xdit_tiny.pipeline("sdxl")(prompts, **size, generator=xdit_tiny.generator()).images
    for i, picture in enumerate(expected):
        found = Image.open(tmp_path / f"sdxl_hybrid-cond_u1r1_tc_False_32x32_{i}.png")
        assert abs(np.asarray(found) - 255 * picture).max() < 1  # one 8-bit level
    summary, where = result.stdout.splitlines()
    assert summary.startswith("6 FULL of 6 steps; speed-up bound 2.00 over one GPU; ")
    assert [tmp_path / name for name in where.split(", ")] == sorted(tmp_path.glob("*.png"))
    assert len(json.loads((tmp_path / "timings.json").read_text())) == 1


def test_a_wrong_flag_of_xdits_is_told_once(models, tmp_path):
    command = ["-m", "hybridiff_xdit.xdit.cli", "--model", models / "sd3", "--prompt", "a cat"]
    result = launch([*command, "--parallel", "hybrid-cond", "--seed", "first"], cwd=tmp_path, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(r"xdit-hybrid: error on rank \d: argument --seed: invalid int value: 'first'", line)


def test_runner_refuses_a_wrong_world_size(models, tmp_path):
    flags = ("--model", models / "sd3", "--prompt", "a cat", "--parallel", "hybrid-cond", "--hybrid_plan", "8-48/2")
    result = run_module("hybridiff_xdit.xdit.runner", *flags, processes=1, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert "error on rank 0: --parallel hybrid-cond needs 2 processes, not 1" in result.stderr


def test_the_embedded_model_for_video_writes_a_clip(tmp_path):
    flags = ["--model", "emoji-wan", "--parallel", "hybrid-cond", "--num_inference_steps", "2", "--prompt"]
    shown = run_module(
        "hybridiff_xdit.xdit.runner", *flags, "a cat", "--output_directory", tmp_path, processes=2
    ).stderr
    (file,) = tmp_path.iterdir()
    assert file.name in shown and file.suffix == ".mp4"
    with av.open(file) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 9
    assert np.std(frames) > 5  # not of one colour
