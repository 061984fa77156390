import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridiff_xdit import HybridConfig
from hybridiff_xdit.schedule.paper import PAPER_PRESETS, PaperConstants, PaperPolicy
from hybridiff_xdit.schedule.plan import FULL, PIPELINED, SKIPPED, Phase, Plan
from hybridiff_xdit.schedule.policies import make_policy

PLANS = st.builds(lambda tail: Plan.parse("F" + tail), st.text("FPS", max_size=60))
SMALL = PaperConstants(slope_window=2, slope_threshold=0.01, interval=3, tau_cap=8)

GRID = """\
step  phase             kind       rank 0  rank 1
   0  WARM_UP           FULL       uncond  cond
   1  WARM_UP           FULL       uncond  cond
   2  PARALLELISM       PIPELINED  stage0  stage1
   3  PARALLELISM       PIPELINED  -       stage1
   4  PARALLELISM       FULL       uncond  cond
   5  PARALLELISM       PIPELINED  -       stage1
   6  FULLY_CONNECTING  FULL       uncond  cond"""

SKIPPING_GRID = """\
step  phase             kind       rank 0  rank 1
   0  WARM_UP           FULL       uncond  cond
   1  PARALLELISM       SKIPPED    -       -
   2  PARALLELISM       FULL       uncond  cond
   3  PARALLELISM       PIPELINED  -       stage1
   4  PARALLELISM       SKIPPED    -       -
   5  FULLY_CONNECTING  FULL       uncond  cond"""


# The plan as text.


@given(PLANS)
def test_letters_round_trip(plan):
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(str(plan), len(plan)) == plan


@given(PLANS)
def test_grid_round_trip(plan):
    assert Plan.from_grid(plan.grid()) == plan


def test_grid_is_this_picture():
    assert Plan.parse("FFPPFPF").grid() == GRID
    assert Plan.parse("FSFPSF").grid() == SKIPPING_GRID


@given(PLANS)
def test_rows_say_who_does_what(plan):
    for i, row in enumerate(plan.rows()):
        next_is_pipelined = str(plan)[i + 1 : i + 2] == "P"
        expected = {
            "F": ("uncond", "cond"),
            "P": ("stage0" if next_is_pipelined else "-", "stage1"),
            "S": ("-", "-"),
        }[str(plan)[i]]
        assert (row.step, row.kind, row.work) == (i, plan[i], expected)


@given(
    start=st.integers(1, 40),
    length=st.integers(1, 40),
    gap=st.integers(2, 12),
    rest=st.integers(0, 10),
    letter=st.sampled_from(["", "P", "S"]),
)
def test_a_pattern_has_every_gapth_step_full(start, length, gap, rest, letter):
    end = start + length
    plan = Plan.parse(f"{start}-{end}/{gap}{letter}", end + rest)
    group = (letter or "P") * (gap - 1) + "F"
    assert str(plan) == "F" * start + (group * length)[:length] + "F" * rest


def test_every_second_step():
    plan = Plan.parse("8-48/2", 50)
    assert str(plan) == "F" * 8 + "PF" * 20 + "FF"
    assert plan.count(PIPELINED) == 20
    assert plan.speedup_bound() == pytest.approx(2.5)


def test_two_of_three_steps():  # method.md writes it "8; 3 x13"
    plan = Plan.parse("8-47/3", 50)
    assert str(plan) == "F" * 8 + "PPF" * 13 + "FFF"
    assert plan.speedup_bound() == pytest.approx(2.703, abs=5e-4)


@pytest.mark.parametrize(("pipelined", "bound"), [(0, 2), (5, 2.105), (10, 2.222), (20, 2.5), (30, 2.857), (50, 4)])
def test_speedup_bound(pipelined, bound):
    plan = Plan([FULL] * (50 - pipelined) + [PIPELINED] * pipelined)
    assert plan.speedup_bound() == pytest.approx(bound, abs=5e-4)


@given(PLANS)
def test_speedup_bound_counts_half_for_pipelined_and_nothing_for_skipped(plan):
    letters = str(plan)
    forwards = sum({"F": 1.0, "P": 0.5, "S": 0.0}[letter] for letter in letters)  # per rank
    assert plan.speedup_bound() == pytest.approx(2 * len(letters) / forwards)


@pytest.mark.parametrize(("text", "skipped", "bound"), [("8-48/2S", 20, 100 / 30), ("10-40/3S", 20, 100 / 30)])
def test_a_skipping_pattern(text, skipped, bound):
    plan = Plan.parse(text, 50)
    assert (plan.count(SKIPPED), plan.count(PIPELINED)) == (skipped, 0)
    assert plan.speedup_bound() == pytest.approx(bound)


@pytest.mark.parametrize("letters", ["FFPFPF", "FFSFSF", "FFPFSF", "FFSFPF"])
def test_phases(letters):
    plan = Plan.parse(letters)
    warm_up, parallelism, connecting = Phase.WARM_UP, Phase.PARALLELISM, Phase.FULLY_CONNECTING
    assert [plan.phase(i) for i in range(6)] == [warm_up] * 2 + [parallelism] * 3 + [connecting]
    assert {Plan.parse("FFF").phase(i) for i in range(3)} == {warm_up}


@pytest.mark.parametrize(
    ("text", "steps", "says"),
    [
        ("", None, "neither letters F, P and S nor a pattern"),
        ("FPX", None, "neither letters F, P and S nor a pattern"),
        ("fp", None, "neither letters F, P and S nor a pattern"),
        ("8-48", 50, "neither letters F, P and S nor a pattern"),
        ("8-48/2 ", 50, "neither letters F, P and S nor a pattern"),
        ("8-48/2F", 50, "neither letters F, P and S nor a pattern"),
        ("8-48/2SP", 50, "neither letters F, P and S nor a pattern"),
        ("PF", None, "first step must be F"),
        ("SF", None, "first step must be F"),
        ("FP", 3, "2 letters, but the run has 3 steps"),
        ("0-8/2", 50, "1 <= START < END"),
        ("8-8/2", 50, "1 <= START < END"),
        ("8-48/1", 50, "GAP >= 2"),
        ("8-48/0", 50, "GAP >= 2"),
        ("8-48/1S", 50, "GAP >= 2"),
        ("8-48/2S", 28, "END is 48, but the run has only 28 steps"),
        ("8-48/2", 28, "END is 48, but the run has only 28 steps"),
    ],
)
def test_a_malformed_plan_says_what_and_how_to_mend_it(text, steps, says):
    with pytest.raises(ValueError) as error:
        Plan.parse(text, steps)
    assert says in str(error.value)
    assert repr(text) in str(error.value)
    assert "--hybrid_plan" in str(error.value)


def test_a_pattern_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="number of steps"):
        Plan.parse("8-48/2")


@pytest.mark.parametrize(
    "text",
    [
        GRID.replace("PIPELINED  -  ", "PIPELINED  stage0"),
        GRID.replace("FULL", "HALF"),
        SKIPPING_GRID.replace("SKIPPED    -       -", "SKIPPED    -       stage1"),
        SKIPPING_GRID.replace("SKIPPED  ", "PIPELINED"),
        GRID.replace("   3", "   4"),
        "step\nnonsense",
    ],
)
def test_a_grid_that_no_plan_prints_is_refused(text):
    with pytest.raises(ValueError, match="not a plan's grid"):
        Plan.from_grid(text)


# The published policy.


def drive(policy, series):
    """Run a policy over a discrepancy series as the engine does; the plan it made."""
    kinds = []
    for step, value in enumerate(series):
        kind = policy.kind(step)
        if kind is FULL and policy.reads_discrepancy(step):
            policy.observe(step, value)
        kinds.append(kind)
    return str(Plan(kinds))


def test_tau_1_is_the_step_after_the_detector_fired():
    series = [1.0, 0.8, 0.6, 0.6, 0.6] + [9.0] * 7  # G = 0 first at i = 4, for L = 2
    policy = PaperPolicy(12, SMALL)
    assert policy.tau_1 is None and policy.tau_2 is None
    assert drive(policy, series) == "FFFFFPPPFFFF"
    assert (policy.tau_1, policy.tau_2) == (5, 8)


@pytest.mark.parametrize(
    "series", [[1 - 0.05 * i for i in range(12)], [0.1 + 0.05 * i for i in range(12)]], ids=["falling", "rising"]
)
def test_a_detector_that_never_fires_leaves_the_cap(series):
    policy = PaperPolicy(12, SMALL)
    assert drive(policy, series) == "FFFFFFFFPPPF"
    assert (policy.tau_1, policy.tau_2) == (8, 11)


def test_firing_at_the_cap_or_after_it_changes_nothing():
    for last_fall in range(5, 10):
        series = [1 - 0.05 * min(i, last_fall) for i in range(12)]
        policy = PaperPolicy(12, SMALL)
        drive(policy, series)
        assert policy.tau_1 == min(last_fall + 3, 8)  # L = 2 flat steps, then the step after


def test_discrepancy_is_read_only_while_it_decides():
    policy = PaperPolicy(12, SMALL)
    assert [policy.reads_discrepancy(i) for i in range(9)] == [True] * 7 + [False] * 2
    policy.observe(0, 1.0), policy.observe(1, 1.0), policy.observe(2, 1.0)
    assert policy.tau_1 == 3
    assert not policy.reads_discrepancy(3)


def test_a_window_at_the_very_end_fits():
    assert drive(PaperPolicy(11, SMALL), [1 - 0.05 * i for i in range(11)]) == "FFFFFFFFPPP"


@pytest.mark.parametrize("family", ["unet", "mmdit"])
def test_presets_are_the_published_figures_at_50_steps(family):
    expected = {"unet": (12, 4e-4, 5, 15), "mmdit": (15, 5e-4, 5, 40)}[family]
    scaled = PAPER_PRESETS[family].scaled(50)
    assert scaled == PAPER_PRESETS[family]
    assert (scaled.slope_window, scaled.slope_threshold, scaled.interval, scaled.tau_cap) == expected


@pytest.mark.parametrize(
    ("family", "steps", "expected"),
    [
        ("unet", 28, (7, 4e-4 * 50 / 28, 3, 8)),
        ("unet", 20, (5, 4e-4 * 50 / 20, 2, 6)),
        ("mmdit", 28, (8, 5e-4 * 50 / 28, 3, 22)),
        ("mmdit", 20, (6, 5e-4 * 50 / 20, 2, 16)),
        ("mmdit", 100, (30, 2.5e-4, 10, 80)),
    ],
)
def test_presets_scale_with_the_run(family, steps, expected):
    scaled = PAPER_PRESETS[family].scaled(steps)
    assert (scaled.slope_window, scaled.interval, scaled.tau_cap) == (expected[0], expected[2], expected[3])
    assert scaled.slope_threshold == pytest.approx(expected[1])


@pytest.mark.parametrize("family", ["unet", "mmdit"])
@pytest.mark.parametrize("steps", [20, 28, 50])
def test_presets_fit_the_usual_runs(family, steps):
    plan = drive(make_policy(HybridConfig(policy="paper"), steps, family), [1 - 0.01 * i for i in range(steps)])
    assert plan.count("P") == PAPER_PRESETS[family].scaled(steps).interval


def test_given_constants_replace_the_preset():
    policy = make_policy(HybridConfig(policy="paper", interval=10, tau_cap=20), 50, "unet")
    assert policy.constants == PaperConstants(slope_window=12, slope_threshold=4e-4, interval=10, tau_cap=20)


@pytest.mark.parametrize(
    ("steps", "constants"), [(1, {}), (2, {}), (50, {"tau_cap": 46}), (50, {"interval": 11})], ids=str
)
def test_a_window_that_does_not_fit_is_an_error(steps, constants):
    with pytest.raises(ValueError, match=r"--hybrid_tau_cap.*--hybrid_interval.*--num_inference_steps"):
        make_policy(HybridConfig(policy="paper", **constants), steps, "mmdit")


def test_cfg_is_all_full_and_fixed_is_what_was_given():
    for fields, plan in (
        ({"policy": "cfg"}, "FFFFFF"),
        ({"policy": "fixed", "plan": "FPPFPF"}, "FPPFPF"),
        ({"plan": "FPSFSF"}, "FPSFSF"),
        ({"plan": "1-5/2S"}, "FSFSFF"),
    ):
        policy = make_policy(HybridConfig(**fields), 6, "unet")
        assert drive(policy, [1.0] * 6) == plan
        assert policy.tau_1 is None and policy.tau_2 is None
