"""Two ranks against the oracle: an all-FULL plan bit for bit, any other to 1e-5 of the latents' scale (GPU: 1e-4)."""

import itertools

import oracle
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

#: What is asked for, and the plan that comes of it: one window, interleaved, PIPELINED as early and as late as can be.
PLANS = {"FFFPPPFFFF": "FFFPPPFFFF", "3-9/2": "FFFPFPFPFF", "FPFPPPPFPF": "FPFPPPPFPF", "FFFFFFFPPP": "FFFFFFFPPP"}

#: The same with SKIPPED steps: uneven gaps, S after P and P after S, groups of up to four steps, S as early as can be.
SKIPPING = {
    "3-9/2S": "FFFSFSFSFF",
    "FSFPFSSFPF": "FSFPFSSFPF",
    "FPFSSSFPPF": "FPFSSSFPPF",
    "FFSPFFPSFF": "FFSPFFPSFF",
    "FFPSPFSPPF": "FFPSPFSPPF",
    "FFFFSFFSSS": "FFFFSFFSSS",
}

#: Ways to let the adaptive policy choose.
ADAPTIVE = [
    {"speedup": 2.2},
    {"speedup": 2.1, "kinds": "FP"},
    {"tolerance": 1.0},
    {"tolerance": 1.0, "kinds": "FP"},
    {"tolerance": 1.0, "kinds": "FPS"},
]

RULES = ["mixed", "none", "reuse", "deferred"]


def covering(plans, rules):
    """Every plan with every rule, and every pipeline with every rule and with every plan or nearly: in turn."""
    names = list(tiny.PIPELINES)
    cases = [
        pytest.param(names[(i + j) % len(names)], plan, rule, id=f"{names[(i + j) % len(names)]}-{plan}-{rule}")
        for i, plan in enumerate(plans)
        for j, rule in enumerate(rules)
    ]
    return pytest.mark.parametrize(("name", "plan", "rule"), cases)


#: Largest difference allowed, relative to the largest latent.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


def hybrid(name, fields, simulate=False, **kwargs):
    """(latents, report) of the pipeline ``name`` on this rank, cut where the oracle cuts it."""
    pipe = apply_hybrid(tiny.pipeline(name, ranks.device()), HybridConfig(balance="flops", **fields), simulate=simulate)
    try:
        return tiny.call(pipe, name, **kwargs).cpu(), last_report(pipe)
    finally:
        remove_hybrid(pipe)


def expected(name, plan, rule="reuse"):
    """(latents, discrepancy of the FULL steps) of the oracle, on this rank's device."""
    pipe, noise = tiny.pipeline(name, ranks.device()), tiny.noise(name).to(ranks.device())
    latents, discrepancy = oracle.denoise(pipe, tiny.prompt(name), noise, plan=plan, rule=rule, cut=oracle.CUTS[name])
    return latents.cpu(), discrepancy


def both(name, fields, plan, rule="reuse"):
    """(latents, report, latents of the oracle). The oracle needs one process only."""
    return *hybrid(name, fields), expected(name, plan, rule)[0] if dist.get_rank() == 0 else None


def error(found, latents):
    """Largest difference, relative to the largest latent."""
    return ((found - latents).abs().max() / latents.abs().max()).item()


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_all_full_is_the_two_branches_one_by_one(pair, name):
    (first, report, one_by_one), (second, *_) = pair.run(both, name, {"policy": "cfg"}, "F" * 10)
    assert report["plan"] == "F" * 10
    assert torch.equal(first, one_by_one)
    assert torch.equal(second, one_by_one)


@covering(PLANS, RULES)
def test_a_fixed_plan_is_the_oracle(pair, name, plan, rule):
    (first, report, latents), (second, *_) = pair.run(both, name, {"plan": plan, "guidance": rule}, PLANS[plan], rule)
    assert report["plan"] == PLANS[plan]
    assert torch.equal(first, second)
    assert error(first, latents) < TOLERANCE[pair.device]


@covering(SKIPPING, ["reuse", "deferred"])
def test_a_plan_with_skipped_steps_is_the_oracle(pair, name, plan, rule):
    fields = {"plan": plan, "guidance": rule}
    (first, report, latents), (second, *_) = pair.run(both, name, fields, SKIPPING[plan], rule)
    assert report["plan"] == SKIPPING[plan]
    assert torch.equal(first, second)
    assert error(first, latents) < TOLERANCE[pair.device]


def half(name, dtype, fields):
    """(latents on this rank, of one process that plays both, of two evaluations of one branch each)"""
    pipe = tiny.PIPELINES[name]().to(getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    found = []
    for simulate in (False, True):
        apply_hybrid(pipe, HybridConfig(balance="flops", **fields), simulate=simulate)
        found.append(tiny.call(pipe, name))
        remove_hybrid(pipe)
    with oracle.inside(pipe, plan="F" * 10, rule="reuse", cut=oracle.CUTS[name]):
        return *found, tiny.call(pipe, name)


@pytest.mark.parametrize(("name", "dtype"), [("sd3", "bfloat16"), ("sdxl", "float16"), ("sd15", "bfloat16")])
def test_half_precision(pair, name, dtype):
    """All FULL bit for bit; with estimates, the ranks are one process's bits, and near."""
    for found, alone, full in pair.run(half, name, dtype, {"policy": "cfg"}):
        assert found.dtype == getattr(torch, dtype)
        assert torch.equal(found, alone) and torch.equal(found, full)
    (first, alone, _), (second, *_) = pair.run(half, name, dtype, {"plan": "FFFFSFPFSF"})
    assert torch.equal(first, second) and torch.equal(first, alone)
    assert 0 < error(first.float(), full.float()) < 0.5


def adaptive(name, fields):
    """(latents, report), those of one process that plays both ranks, and the oracle's latents for the plan."""
    found = hybrid(name, fields)
    if dist.get_rank() == 1:
        return *found, None, None
    simulated = hybrid(name, fields, simulate=True)
    return *found, simulated, expected(name, found[1]["plan"], "deferred")[0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [(name, fields) for i, fields in enumerate(ADAPTIVE) for name in ("sd3", ("sdxl", "sd15")[i % 2])],
    ids=str,
)
def test_the_plan_that_adaptive_chose_is_the_oracle(pair, name, fields):
    (first, report, (alone, report_alone), latents), (second, second_report, *_) = pair.run(adaptive, name, fields)
    kinds = fields.get("kinds", "FPS")
    assert {"F"} < set(report["plan"]) <= set(kinds) and report["plan"][-1] == "F"
    assert report["speedup_bound"] >= fields.get("speedup", 2)
    assert torch.equal(first, second) and report == second_report
    assert error(first, latents) < TOLERANCE[pair.device]
    assert report_alone["plan"] == report["plan"]
    assert torch.equal(first, alone)
    assert report_alone["bends"] == report["bends"]
    full = [step for step, kind in enumerate(report["plan"]) if kind == "F"]
    assert [step for step, *_ in report["bends"]] == full[2:]  # the first two have no two before them


# One constant makes the detector fire, the other leaves the cap.
@pytest.mark.parametrize(
    ("name", "threshold", "fires"),
    [("sd3", 1.0, True), ("sd3", 1e-9, False), ("sdxl", 1.0, True), ("sd15", 1e-9, False)],
)
def test_paper_and_mixed_is_the_oracle(pair, name, threshold, fires):
    fields = dict(policy="paper", interval=3, slope_window=1, slope_threshold=threshold, tau_cap=6)
    (_, discrepancy), _ = pair.run(expected, name, "F" * 10)
    falls = [before - after for before, after in itertools.pairwise(discrepancy)]
    tau_1 = min((i + 2 for i, fall in enumerate(falls) if 0 <= fall < threshold), default=6)
    tau_1 = min(tau_1, 6)
    assert (tau_1 < 6) == fires
    plan = "F" * tau_1 + "PPP" + "F" * (7 - tau_1)
    (first, report, latents), (second, *_) = pair.run(both, name, fields, plan, "mixed")
    assert (report["plan"], report["tau_1"], report["tau_2"]) == (plan, tau_1, tau_1 + 3)
    assert torch.equal(first, second)
    assert error(first, latents) < TOLERANCE[pair.device]
    full = [step for step, kind in enumerate(plan) if kind == "F"]
    assert [step for step, _ in report["discrepancy"]] == full
    assert [value for _, value in report["discrepancy"]][:tau_1] == pytest.approx(discrepancy[:tau_1], rel=1e-4)
