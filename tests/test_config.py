import dataclasses

import pytest

from hybridiff_xdit import HybridConfig


def test_defaults_are_the_published_method():
    config = HybridConfig()
    assert (config.policy, config.guidance) == ("paper", "mixed")


def test_a_plan_implies_fixed_and_keeps_the_guidance():
    config = HybridConfig(plan="8-48/2")
    assert (config.policy, config.guidance) == ("fixed", "reuse")
    assert HybridConfig(policy="cfg").guidance == "reuse"


def test_what_the_user_chose_stays():
    config = HybridConfig(policy="paper", guidance="none", interval=3, slope_window=4, slope_threshold=1e-3, tau_cap=9)
    assert config.guidance == "none"
    assert config.paper_constants() == dict(interval=3, slope_window=4, slope_threshold=1e-3, tau_cap=9)


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HybridConfig().policy = "cfg"
    with pytest.raises(TypeError):
        HybridConfig("cfg")


@pytest.mark.parametrize(
    ("fields", "flag", "mend"),
    [
        (dict(policy="fastest"), "--hybrid_policy", "choose one of cfg, paper, fixed"),
        (dict(guidance="stale"), "--hybrid_guidance", "choose one of mixed, none, reuse"),
        (dict(interval=0), "--hybrid_interval", "whole number of steps, 1 or more"),
        (dict(interval=2.5), "--hybrid_interval", "whole number of steps, 1 or more"),
        (dict(slope_window=-1), "--hybrid_slope_window", "whole number of steps, 1 or more"),
        (dict(tau_cap=0), "--hybrid_tau_cap", "whole number of steps, 1 or more"),
        (dict(slope_threshold=0.0), "--hybrid_slope_threshold", "give a positive number"),
        (dict(slope_threshold=-4e-4), "--hybrid_slope_threshold", "give a positive number"),
        (dict(slope_threshold=float("nan")), "--hybrid_slope_threshold", "give a positive number"),
        (dict(slope_threshold=float("inf")), "--hybrid_slope_threshold", "give a positive number"),
        (dict(policy="cfg", interval=5), "--hybrid_interval", "drop it, or use paper"),
        (dict(plan="FP", tau_cap=5), "--hybrid_tau_cap", "drop it, or use paper"),
        (dict(policy="fixed"), "--hybrid_plan", "needs a plan, such as --hybrid_plan 8-48/2"),
        (dict(policy="paper", plan="FP"), "--hybrid_plan", "drop it, or use fixed"),
        (dict(policy="cfg", plan="FP"), "--hybrid_plan", "drop it, or use fixed"),
        (dict(plan="PF"), "--hybrid_plan", "one letter F or P a step"),
        (dict(plan="nonsense"), "--hybrid_plan", "one letter F or P a step"),
        (dict(plan="9-8/2"), "--hybrid_plan", "START-END/GAP"),
        (dict(stages=1), "--hybrid_stages", "drop the flag"),
        (dict(stages=3), "--hybrid_stages", "drop the flag"),
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
