"""The speed benchmark at a tiny size, on four gloo ranks: that it measures what it says, not how fast that is."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from nursery import launch
from nursery import run as start

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
run = partial(start, BENCHMARKS / "run.py")
STRATEGIES = ["one-gpu", "paper", "cfg, stages", "adaptive 2.5, pairs"]


def lines(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_strategy_is_timed_and_reported(tmp_path):
    out, flags = tmp_path / "times.jsonl", ("--steps", 10, "--repeats", 2, "--blocks", 1, "--warm-up", 1)
    run("--scenario", "sdxl-tiny", *flags, "--out", out, "--strategy", *STRATEGIES, processes=4)
    found = {line["strategy"]: line for line in lines(out)}
    assert [*found] == STRATEGIES
    for strategy, line in found.items():
        assert len(line["seconds"]) == 2 and min(line["seconds"]) > 0
        assert all(0.5 * whole < loop < whole for loop, whole in zip(line["loop"], line["seconds"], strict=True))
        assert line["whole"] is False and max(line["after"]) < 0.2 * min(line["seconds"])  # latents out
        assert line["pictures"] == (2 if strategy.endswith("pairs") else 1)
        assert (line["plan"] is None) == (strategy == "one-gpu")
    assert found["cfg, stages"]["plan"] == "F" * 10 and found["cfg, stages"]["speedup_bound"] > 2
    assert found["paper"]["plan"].count("P") == 1  # k = 5 of 50 steps
    assert found["paper"]["floor"] is None and found["paper"]["pieces"] == [{}] * 4  # no GPU
    assert found["adaptive 2.5, pairs"]["speedup_bound"] >= 2.5
    table = launch((BENCHMARKS / "report.py", out)).stdout
    assert len([row for row in table.splitlines() if row.startswith("| sd")]) == len(found)
    loop = found["adaptive 2.5, pairs"]["loop"]
    assert f"| sdxl-tiny | adaptive 2.5, pairs | {sum(loop) / 4:.3f} (" in table  # a pair makes half of the pictures


def test_one_rank_alone_does_what_its_rank_does(tmp_path):
    """On one process: as many evaluations, and as many bytes, as that rank of two."""
    out, strategies = tmp_path / "times.jsonl", ["one-gpu, graphs", *(f"fixed 8-48/4, rank {rank}" for rank in (0, 1))]
    flags = ("--repeats", 1, "--blocks", 1, "--warm-up", 1, "--out", out, "--strategy", *strategies)
    run("--scenario", "sdxl-tiny", *flags, processes=1)
    one, rank_0, rank_1 = lines(out)
    assert one["plan"] is None
    assert rank_0["plan"] == rank_1["plan"] == "F" * 8 + "PPPF" * 10 + "FF"
    # float32, latents of 16 x 16; both boundaries lie on the lowest of three levels.
    prediction, features, inner = 4 * 4 * 16 * 16, 4 * 32 * 4 * 4, 4 * 64 * 4 * 4
    agreement = 24 * 8 + 3 * 16  # and three headers alone, while the calls are learnt
    handed_over = 20  # of three PIPELINED steps in a row the last is read by nobody
    expected = [agreement + 20 * (16 + prediction) + handed_over * boundary for boundary in (inner, features)]
    expected[1] += 30 * prediction
    assert [rank_0["bytes_sent"], rank_1["bytes_sent"]] == [[expected[0]], [expected[1]]]


def test_a_trace_of_each_rank_labels_steps_with_their_kinds(tmp_path):
    out, flags = tmp_path / "times.jsonl", ("--steps", 10, "--repeats", 1, "--blocks", 1, "--warm-up", 1)
    flags += ("--trace", tmp_path / "traces", "--strategy", "paper", "adaptive 2.5")
    run("--scenario", "sd3-tiny", *flags, "--out", out, processes=2)
    found = lines(out)
    assert {*"".join(line["plan"] for line in found)} == {*"FPS"}
    assert len(list((tmp_path / "traces").iterdir())) == 2 * len(found)
    for line in found:
        for rank in range(2):
            name = line["strategy"].replace(" ", "_")
            trace = json.loads((tmp_path / "traces" / f"sd3-tiny_{name}_rank_{rank}.json").read_text())
            names = [event["name"] for event in trace["traceEvents"]]
            labels = [name for name in names if re.fullmatch(r"step \d+ [A-Z]+", name)]
            assert [label.split()[2][0] for label in labels] == list(line["plan"])


def test_xdits_own_strategies_are_timed_beside_ours(tmp_path):
    """On two processes; PipeFusion needs a GPU. Two can do half of what four do: one branch, its tokens split."""
    out, strategies = tmp_path / "times.jsonl", ["xdit cfg", "xdit ulysses", "cfg, rank 1, ulysses"]
    flags = ("--steps", 3, "--repeats", 2, "--out", out, "--strategy", *strategies)
    run("--scenario", "sdxl-tiny", "sd3-tiny", *flags, processes=2)
    found = lines(out)
    assert [(line["scenario"], line["strategy"], line["plan"]) for line in found] == [
        ("sdxl-tiny", "xdit cfg", None),
        ("sd3-tiny", "xdit cfg", None),
        ("sd3-tiny", "xdit ulysses", None),
        ("sd3-tiny", "cfg, rank 1, ulysses", "FFF"),
    ]
    assert all(len(line["seconds"]) == 2 and min(line["seconds"]) > 0 for line in found)


def test_from_the_prompt_to_the_picture(tmp_path):
    """With text encoders and VAE, its decoder split too; AsyncDiff's way has no report, but a plan of its own."""
    out, strategies = tmp_path / "times.jsonl", ["cfg, vae", "both branches", "xdit cfg, vae"]
    flags = ("--whole", "--steps", 4, "--repeats", 1, "--blocks", 1, "--out", out, "--strategy", *strategies)
    run("--scenario", "sdxl-tiny", "sd3-tiny", *flags, processes=2)
    found = lines(out)
    assert [(line["scenario"], line["strategy"]) for line in found] == [
        (scenario, strategy) for scenario in ("sdxl-tiny", "sd3-tiny") for strategy in strategies
    ]
    for line in found:
        ((whole,), (loop,), (after,)) = line["seconds"], line["loop"], line["after"]
        assert line["whole"] and 0 < after < whole - loop
        assert (line["plan"] or line["bytes_sent"]) is None or "cfg" in line["strategy"]


def test_nothing_is_decoded_without_a_vae(tmp_path):
    flags = ("--scenario", "sdxl-tiny", "--strategy", "cfg, vae", "--out", tmp_path / "times.jsonl")
    result = run(*flags, processes=2, check=False)
    assert "'cfg, vae': nothing is decoded; add --whole." in result.stderr


def test_xdits_strategies_on_four_processes(tmp_path):
    """Both use xDiT's groups; the second block of ours comes after xDiT's. Ring and PipeFusion need a GPU."""
    out, strategies = tmp_path / "times.jsonl", ["cfg, ulysses", "xdit cfg"]
    flags = ("--steps", 4, "--repeats", 2, "--out", out, "--strategy", *strategies)
    result = run("--scenario", "sdxl-tiny", "sd3-tiny", *flags, processes=4)
    assert "sdxl-tiny: not offered on 4 processes: 'cfg, ulysses', 'xdit cfg'." in result.stderr
    found = lines(out)
    assert [(line["scenario"], line["strategy"], line["plan"]) for line in found] == [
        ("sd3-tiny", "cfg, ulysses", "FFFF"),
        ("sd3-tiny", "xdit cfg", None),
    ]
    assert all(len(line["seconds"]) == 2 for line in found)


def test_axes_that_split_a_branch_multiply(tmp_path):
    """Eight processes: two sequence ranks, and two for the layers, of either branch. A U-Net has no sequence."""
    out = tmp_path / "times.jsonl"
    flags = ("--steps", 6, "--repeats", 1, "--blocks", 1, "--out", out, "--strategy", "cfg, ulysses, stages")
    result = run("--scenario", "sdxl-tiny", "sd3-tiny", *flags, processes=8)
    assert "sdxl-tiny: not offered on 8 processes: 'cfg, ulysses, stages'." in result.stderr
    (line,) = lines(out)
    assert line["scenario"] == "sd3-tiny" and len(line["peak_memory"]) == 8
    # With four stages the first four FULL steps are synchronous, and take twice as long. (The split is not counted.)
    assert line["speedup_bound"] == pytest.approx(6 * 4 / (6 + 4))


def test_one_process_cannot_be_two(tmp_path):
    flags = ("--scenario", "sdxl-tiny", "--strategy", "cfg", "--out", tmp_path / "times.jsonl")
    result = run(*flags, processes=1, check=False)
    assert "One process cannot run 'cfg'" in result.stderr
