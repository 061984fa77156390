import dataclasses

import pytest

from hybridiff_xdit import HybridConfig
from hybridiff_xdit.config import TOLERANCE


def test_defaults_are_the_adaptive_policy_at_its_tolerance():
    config = HybridConfig()
    assert (config.policy, config.guidance, config.tolerance) == ("adaptive", "deferred", TOLERANCE)
    assert config.speedup is None and config.kinds is None
    assert config == HybridConfig(policy="adaptive", tolerance=TOLERANCE)


def test_the_published_method_is_as_published():
    config = HybridConfig(policy="paper")
    assert (config.policy, config.guidance, config.tolerance) == ("paper", "mixed", None)


def test_a_target_takes_the_place_of_the_tolerance():
    config = HybridConfig(speedup=2.5)
    assert (config.policy, config.speedup, config.tolerance) == ("adaptive", 2.5, None)


def test_a_plan_implies_fixed_and_deferred():
    config = HybridConfig(plan="8-48/2")
    assert (config.policy, config.guidance, config.tolerance) == ("fixed", "deferred", None)
    assert HybridConfig(policy="cfg").guidance == "deferred"


@pytest.mark.parametrize("guidance", ["reuse", "deferred"])
@pytest.mark.parametrize("fields", [dict(plan="FSPF"), dict(plan="8-48/2S")], ids=str)
def test_rules_that_estimate_can_do_without_an_evaluation(fields, guidance):
    assert HybridConfig(**fields, guidance=guidance).guidance == guidance


@pytest.mark.parametrize("guidance", ["mixed", "none"])
def test_rules_that_estimate_nothing_can_still_pipeline(guidance):
    assert HybridConfig(plan="8-48/2", guidance=guidance).guidance == guidance


def test_what_the_user_chose_stays():
    config = HybridConfig(policy="paper", guidance="none", interval=3, slope_window=4, slope_threshold=1e-3, tau_cap=9)
    assert config.guidance == "none"
    chosen = dict(interval=3, slope_window=4, slope_threshold=1e-3, tau_cap=9, level=None)
    assert vars(config.constants("unet", 50)) == vars(config.constants("blocks", 50)) == chosen


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HybridConfig().policy = "cfg"
    with pytest.raises(TypeError):
        HybridConfig("cfg")


@pytest.mark.parametrize(
    ("fields", "flag", "mend"),
    [
        (dict(balance="memory"), "--hybrid_balance", "give time or flops"),
        (dict(cuda_graphs="on"), "--hybrid_cuda_graphs", "give True"),
        (dict(policy="fastest"), "--hybrid_policy", "choose one of adaptive, cfg, paper, fixed"),
        (dict(guidance="stale"), "--hybrid_guidance", "choose one of mixed, none, reuse, deferred"),
        (dict(policy="paper", interval=0), "--hybrid_interval", "whole number of steps, 1 or more"),
        (dict(policy="paper", interval=2.5), "--hybrid_interval", "whole number of steps, 1 or more"),
        (dict(policy="paper", slope_window=-1), "--hybrid_slope_window", "whole number of steps, 1 or more"),
        (dict(policy="paper", tau_cap=0), "--hybrid_tau_cap", "whole number of steps, 1 or more"),
        (dict(policy="paper", slope_threshold=0.0), "--hybrid_slope_threshold", "give a positive number"),
        (dict(policy="paper", slope_threshold=-4e-4), "--hybrid_slope_threshold", "give a positive number"),
        (dict(policy="paper", slope_threshold=float("nan")), "--hybrid_slope_threshold", "give a positive number"),
        (dict(policy="paper", slope_threshold=float("inf")), "--hybrid_slope_threshold", "give a positive number"),
        (dict(policy="cfg", interval=5), "--hybrid_interval", "drop it, or use paper"),
        (dict(plan="FP", tau_cap=5), "--hybrid_tau_cap", "drop it, or use paper"),
        (dict(policy="fixed"), "--hybrid_plan", "needs a plan, such as --hybrid_plan 8-48/2"),
        (dict(policy="paper", plan="FP"), "--hybrid_plan", "drop it, or use fixed"),
        (dict(policy="cfg", plan="FP"), "--hybrid_plan", "drop it, or use fixed"),
        (dict(plan="PF"), "--hybrid_plan", "one letter F, P or S a step"),
        (dict(plan="nonsense"), "--hybrid_plan", "one letter F, P or S a step"),
        (dict(plan="9-8/2"), "--hybrid_plan", "START-END/GAP"),
        (dict(plan="SF"), "--hybrid_plan", "one letter F, P or S a step"),
        (dict(plan="FSF", guidance="mixed"), "--hybrid_guidance", "S in the plan): use deferred or reuse"),
        (dict(plan="8-48/2S", guidance="none"), "--hybrid_guidance", "S in the plan): use deferred or reuse"),
        (dict(guidance="mixed"), "--hybrid_guidance", "bend, by which adaptive decides: use deferred."),
        (dict(speedup=2.5, guidance="reuse"), "--hybrid_guidance", "bend, by which adaptive decides: use deferred."),
        (dict(policy="adaptive", guidance="none"), "--hybrid_guidance", "adaptive decides: use deferred."),
        (dict(tolerance=0.0), "--hybrid_tolerance", "give a positive number"),
        (dict(tolerance=-0.1), "--hybrid_tolerance", "give a positive number"),
        (dict(tolerance=float("nan")), "--hybrid_tolerance", "give a positive number"),
        (dict(tolerance=float("inf")), "--hybrid_tolerance", "give a positive number"),
        (dict(speedup=0.99), "--hybrid_speedup", "from 1 (on two GPUs 2, every step FULL)"),
        (dict(speedup=6.1), "--hybrid_speedup", "to 6"),
        (dict(speedup=float("nan")), "--hybrid_speedup", "give a number from 1"),
        (dict(tolerance=0.1, speedup=2.5), "--hybrid_speedup", "it or --hybrid_tolerance, not both"),
        (dict(kinds="PS"), "--hybrid_kinds", "give FPS, FP (nothing SKIPPED) or FS (nothing PIPELINED)"),
        (dict(kinds="F"), "--hybrid_kinds", "give FPS, FP (nothing SKIPPED) or FS (nothing PIPELINED)"),
        (dict(kinds="fps"), "--hybrid_kinds", "give FPS, FP (nothing SKIPPED) or FS (nothing PIPELINED)"),
        (dict(policy="cfg", tolerance=0.1), "--hybrid_tolerance", "drop it, or use adaptive"),
        (dict(policy="paper", speedup=2.5), "--hybrid_speedup", "drop it, or use adaptive"),
        (dict(plan="FP", kinds="FP"), "--hybrid_kinds", "drop it, or use adaptive"),
        (dict(policy="adaptive", plan="FP"), "--hybrid_plan", "drop it, or use fixed"),
        (dict(policy="adaptive", interval=5), "--hybrid_interval", "drop it, or use paper"),
        (dict(tau_cap=5), "--hybrid_tau_cap", "drop it, or use paper"),
        (dict(stages=1), "--hybrid_stages", "even number"),
        (dict(stages=3), "--hybrid_stages", "even number"),
    ],
    ids=str,
)
def test_a_bad_field_names_its_value_flag_and_mend(fields, flag, mend):
    with pytest.raises(ValueError) as error:
        HybridConfig(**fields)
    assert flag in str(error.value)
    assert mend in str(error.value)
    field = flag.removeprefix("--hybrid_")
    assert f"{field}={fields.get(field)!r}" in str(error.value)
