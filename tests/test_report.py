"""What a run leaves to read, and that it says what was done: work, bytes, files, progress bar."""

import io
import json
import re

import pytest
import ranks
import tiny
from PIL import Image

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.schedule.plan import Plan

PLAN = "FFPPPFPFFF"
REUSE = {"plan": PLAN, "guidance": "reuse"}
HANDED_OVER = 2  # PIPELINED steps that are followed by another

#: Numbers in each tiny denoiser's tensors for one picture: prediction, boundary that rank 0 sends, and rank 1.
SIZES = {
    "sd3": (16 * 16 * 16, 64 * 32 + tiny.TOKENS * 32, 0),  # image tokens and text tokens
    "sdxl": (4 * 16 * 16, 32 * 4 * 4, 16 * 8 * 8),  # inner result; outer-down features
    "sd15": (4 * 16 * 16, 16 * 8 * 8, 8 * 16 * 16),
}
AGREEMENT = 24 * 8  # what is compared before the first step, of one size whatever it is
HEADER = 16  # of a FULL step's exchange: a checksum and a status
BEGINNING = AGREEMENT + 2 * HEADER  # headers alone, in the first two FULL steps
SPLIT = HEADER  # one header more at the end of the first step, where layers may be split
TRIAL = {"sd3": 4}  # before blocks are split: whether the stages gave what the whole gives


def run(name, fields, **kwargs):
    pipe = apply_hybrid(tiny.pipeline(name, ranks.device()), HybridConfig(balance="flops", **fields))
    try:
        tiny.call(pipe, name, **kwargs)
        return last_report(pipe)
    finally:
        remove_hybrid(pipe)


def run_many(name, fields, count):
    return run(name, fields, count=count)


@pytest.mark.parametrize("fields", [REUSE, {"plan": PLAN}, {"plan": "FFPPPSPSFF"}], ids=str)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_bytes_sent_are_those_counted_by_hand(pair, name, count, fields):
    prediction, *boundaries = (4 * count * numbers for numbers in SIZES[name])
    full, pipelined = fields["plan"].count("F"), fields["plan"].count("P")
    common = BEGINNING + SPLIT + TRIAL.get(name, 0) + full * (HEADER + prediction)
    expected = [common + HANDED_OVER * boundary for boundary in boundaries]
    expected[1] += pipelined * prediction
    for report in pair.run(run_many, name, fields, count):
        assert report["bytes_sent"] == expected


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_all_full_sends_predictions_only(pair, name):
    expected = BEGINNING + 10 * (HEADER + 4 * SIZES[name][0])
    for report in pair.run(run, name, {"policy": "cfg"}):
        assert report["bytes_sent"] == [expected] * 2


def count_calls(name, modules, fields):
    """How often each of the modules is evaluated on this rank."""
    pipe = apply_hybrid(tiny.pipeline(name), HybridConfig(balance="flops", **fields))
    tiny.call(pipe, name)  # the first run counts the FLOPs, and tries the stages, by evaluations of its own
    denoiser, counts = pipe.transformer if name == "sd3" else pipe.unet, dict.fromkeys(modules, 0)

    def hook(module):
        return lambda *_: counts.update({module: counts[module] + 1})

    hooks = [denoiser.get_submodule(module).register_forward_hook(hook(module)) for module in modules]
    try:
        tiny.call(pipe, name)
    finally:
        remove_hybrid(pipe)
        for handle in hooks:
            handle.remove()
    return counts


# On a PIPELINED step rank 0 works only if the next step will read it; rank 1 always makes the prediction. On a SKIPPED
# step neither works.
@pytest.mark.parametrize("plan", [PLAN, "FFPPPSPSFF", "FFSSSFSFFF"])
@pytest.mark.parametrize(
    ("name", "stage_0", "stage_1"),
    [
        ("sd3", ["transformer_blocks.0", "transformer_blocks.1"], ["transformer_blocks.2", "transformer_blocks.3"]),
        ("sdxl", ["down_blocks.2.resnets.0", "mid_block"], ["conv_in", "down_blocks.1.attentions.1", "conv_out"]),
        ("sd15", ["down_blocks.1.resnets.0", "mid_block"], ["conv_in", "down_blocks.0.resnets.0", "conv_out"]),
    ],
)
def test_each_rank_evaluates_its_stage_only_and_only_if_it_is_read(pair, name, stage_0, stage_1, plan):
    full, pipelined = plan.count("F"), plan.count("P")
    first, second = pair.run(count_calls, name, [*stage_0, *stage_1], {"plan": plan})
    handed_over = HANDED_OVER if "P" in plan else 0
    assert first == dict.fromkeys(stage_0, full + handed_over) | dict.fromkeys(stage_1, full)
    assert second == dict.fromkeys(stage_0, full) | dict.fromkeys(stage_1, full + pipelined)


TYPES = {
    "model": str,
    "config": dict,
    "num_steps": int,
    "plan": str,
    "discrepancy": list,
    "bends": list,
    "tau_1": int | None,
    "tau_2": int | None,
    "speedup_bound": float,
    "estimated_error": float | None,
    "bytes_sent": list,
    "world_size": int,
    "sequence_degree": int,
    "versions": dict,
}


@pytest.mark.parametrize(
    "fields",
    [
        dict(plan=PLAN, guidance="reuse"),
        dict(plan="FFPPPSPSFF"),
        dict(policy="cfg"),
        dict(policy="paper", interval=2, tau_cap=5),
        dict(speedup=2.2, kinds="FS"),
    ],
    ids=str,
)
def test_report_files(pair, tmp_path, fields):
    folder = tmp_path / "made" / "here"
    first, second = pair.run(run, "sd3", {**fields, "report": str(folder)})
    assert first == second
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.png"}
    report = json.loads((folder / "report.json").read_text())
    assert report == first
    assert report.keys() == TYPES.keys()
    for key, kind in TYPES.items():
        assert report[key] is None if kind is None else isinstance(report[key], kind), key
    plan = Plan.parse(report["plan"], report["num_steps"])
    assert report["num_steps"] == 10 and report["world_size"] == 2 and report["sequence_degree"] == 1
    assert report["speedup_bound"] == plan.speedup_bound()
    full = [i for i, kind in enumerate(str(plan)) if kind == "F"]
    assert [step for step, _ in report["discrepancy"]] == full
    assert all(isinstance(value, float) and 0 < value < 10 for _, value in report["discrepancy"])
    assert fields.items() <= report["config"].items() and report["config"]["report"] == str(folder)
    assert (report["estimated_error"] is None) == (report["config"]["policy"] != "adaptive")
    assert (report["tau_1"] is None) == (report["config"]["policy"] not in ("paper", "adaptive"))
    if report["tau_1"] is not None:
        window = [i for i, kind in enumerate(str(plan)) if kind != "F"]
        assert (report["tau_1"], report["tau_2"]) == (window[0], window[-1] + 1)
    # A row for each FULL step of an adaptive run that has two before it.
    assert [step for step, *_ in report["bends"]] == (full[2:] if report["config"]["policy"] == "adaptive" else [])
    assert all(0 < value < 1 for _, *values in report["bends"] for value in values)
    assert {"torch", "diffusers", "hybridiff_xdit"} <= report["versions"].keys()
    with Image.open(folder / "report.png") as picture:
        picture.load()
        assert picture.width > 400 and picture.height > 200


def test_no_report_was_asked_for(pair, tmp_path, monkeypatch):
    for report in pair.run(run, "sd3", REUSE):
        assert report["config"]["report"] is None


def progress(config):
    pipe, text = tiny.pipeline("sd3"), io.StringIO()
    pipe.set_progress_bar_config(file=text, mininterval=0)
    try:
        run("sd3", config)
    finally:
        pipe.set_progress_bar_config(disable=True)
    return text.getvalue()


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        (dict(plan="FFPPPSPFFF"), "FFPPPSPFFF"),
        (dict(policy="paper", slope_threshold=1e-9, tau_cap=4, interval=3), "FFFFPPPFFF"),
        (dict(policy="cfg"), "F" * 10),
    ],
)
def test_the_progress_bar_tells_the_kind_of_each_step(pair, config, plan):
    first, second = pair.run(progress, config)
    shown = dict(re.findall(r"(\d+)/10 \[[^\]]*, (\w+)\]", first))
    names = {"F": "FULL", "P": "PIPELINED", "S": "SKIPPED"}
    assert shown == {str(step): names[kind] for step, kind in enumerate(plan, 1)}
    assert second == ""


def test_the_report_is_named_after_the_model_or_as_told(pair):
    for report, told in pair.run(named):
        assert report["model"] == "StableDiffusion3Pipeline"
        assert told["model"] == "my model"


def named():
    pipe = tiny.pipeline("sd3")
    reports = []
    for model in (None, "my model"):
        apply_hybrid(pipe, HybridConfig(policy="cfg"), model=model)
        tiny.call(pipe, "sd3", num_inference_steps=2)
        reports.append(last_report(pipe))
    remove_hybrid(pipe)
    return reports
