"""The adaptive policy on made-up bends: no process, no model."""

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_xdit.schedule.adaptive import LAST_FULL, LONGEST_GROUP, AdaptivePolicy
from hybridiff_xdit.schedule.discrepancy import Bend
from hybridiff_xdit.schedule.plan import FULL, PIPELINED, SKIPPED, Plan
from hybridiff_xdit.schedule.sampler import Sampler

STEPS = (20, 28, 50)
KINDS = ("FPS", "FP", "FS")


def sampler(steps, times=None, gains=None):
    """Equal steps from time 1 to 0, unless told otherwise."""
    gains = gains or [-1 / steps] * steps
    return Sampler(tuple(times or (1 - i / steps for i in range(steps))), tuple(gains), tuple(map(abs, gains)))


def level(step, steps):
    return 1.0


def falling(step, steps):
    return 1.0 + 80 * math.exp(-12 * step / steps)


def rising(step, steps):
    return 0.5 * math.exp(5 * step / steps)


LAWS = {"level": level, "falling": falling, "rising": rising}


def drive(policy, bends, w=5.0):
    """Run a policy as the engine does; ``bends(step)`` is measured where two FULL steps are known. Returns the plan."""
    kinds, full, unread = [], 0, []
    for step in range(policy.num_steps):
        while len(unread) > policy.lag:
            policy.observe(*unread.pop(0))
        kind = policy.kind(step, w(step) if callable(w) else w - 1)
        if kind is FULL:
            if policy.reads_discrepancy(step):
                unread.append((step, 0.1, bends(step) if full > 1 else None))
            full += 1
        kinds.append(kind)
    for late in unread:
        policy.observe(*late)
    return str(Plan(kinds))


def plan_of(steps, law=level, w=5.0, cond=1.0, delta=1.0, run=None, **fields):
    made = AdaptivePolicy(run or sampler(steps), **fields)
    return drive(made, lambda step: Bend(cond * law(step, steps), delta * law(step, steps)), w)


def saved(plan):
    return 0.5 * plan.count("P") + plan.count("S")


def gaps(plan):
    """(step, steps to the next FULL one) of the FULL steps but the last."""
    full = [i for i, kind in enumerate(plan) if kind == "F"]
    return [(a, b - a) for a, b in itertools.pairwise(full)]


# What the bends make of a run.


def test_level_bends_give_level_groups():
    for tolerance, length in ((0.001, 2), (0.003, 3)):
        plan = plan_of(50, tolerance=tolerance)
        assert {gap for step, gap in gaps(plan) if 12 <= step < 36} == {length}, plan


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_smaller_tolerance_never_saves_more(steps, law, kinds):
    counts = [saved(plan_of(steps, LAWS[law], tolerance=0.001 * 3**i, kinds=kinds)) for i in range(-4, 9)]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]


def test_saving_waits_while_the_bends_fall_and_ends_as_they_rise():
    plans = {name: plan_of(50, law, tolerance=0.001) for name, law in LAWS.items()}
    first = {name: len(plan) - len(plan.lstrip("F")) for name, plan in plans.items()}
    last = {name: len(plan.rstrip("F")) for name, plan in plans.items()}
    assert first["falling"] >= first["level"] + 5
    assert last["rising"] <= last["level"] - 5


@pytest.mark.parametrize("law", LAWS)
def test_of_bends_tolerance_and_guidance_only_the_ratio_counts(law):
    plans = {plan_of(50, LAWS[law], cond=c, w=1 + c * 4, tolerance=c * 0.02) for c in (1, 2, 4)}
    assert len(plans) == 1 and saved(*plans) > 0


def test_a_tolerance_lets_the_first_fifth_alone():
    for steps in (20, 50, 100):
        plan = plan_of(steps, lambda step, steps: 1e-6, tolerance=0.01)
        assert plan.index("S") == steps // 5 + 1


def test_a_target_waits_where_bends_are_larger_than_is_usual():
    small, large = (plan_of(50, lambda step, steps, bend=bend: bend, speedup=2.5) for bend in (1.0, 100.0))
    assert small.index("S") == 5 and large.index("S") > 15
    assert saved(small) == saved(large) == 10


def test_a_group_grows_by_one_and_shrinks_at_once():
    def law(step, steps):
        return 100.0 if 30 <= step < 40 else 1e-3

    found = [gap for _, gap in gaps(plan_of(50, law, tolerance=0.05))]
    assert all(later <= gap + 1 for gap, later in itertools.pairwise(found))
    assert any(later == gap + 1 > 3 for gap, later in itertools.pairwise(found))
    assert any(gap > 4 and later == 1 for gap, later in itertools.pairwise(found[:-LAST_FULL]))


def test_guidance_that_grows_ends_a_group():
    plain = plan_of(50, tolerance=0.1)
    at = next(step for step, gap in gaps(plain) if gap == 3) + 1
    for now, kind in ((4.3, "S"), (4.5, "F")):  # priced for 4
        plan = plan_of(50, tolerance=0.1, w=lambda step, now=now: 4.0 if step <= at else now)
        assert plan[: at + 1] == plain[: at + 1] and plan[at + 1] == kind


def test_a_group_that_guidance_ends_gives_its_saving_back():
    plan = plan_of(50, speedup=4.5, w=lambda step: 10.0 if step % 10 == 9 else 5.0)
    assert saved(plan) == saved(plan_of(50, speedup=4.5)) and plan != plan_of(50, speedup=4.5)


def test_only_the_kinds_that_are_allowed():
    for kinds in KINDS:
        assert set(plan_of(50, tolerance=0.05, kinds=kinds)) <= set(kinds)
    assert "P" not in plan_of(50, tolerance=0.05)


def test_conds_bend_does_not_count_for_pipelined_steps():
    one, other = (plan_of(50, cond=cond, tolerance=0.05, kinds="FP") for cond in (1e-6, 1e3))
    assert one == other and "P" in one
    assert "S" not in plan_of(50, cond=1e3, tolerance=0.05, kinds="FPS")
    assert "S" in plan_of(50, cond=1e-6, tolerance=0.05, kinds="FPS")


def test_two_evaluations_at_one_time_are_not_without_error():
    """As Heun's solver makes them."""
    times = [1 - (i + 1) // 2 * 2 / 50 for i in range(50)]
    run = sampler(50, times)
    assert plan_of(50, tolerance=1e-5, run=run) == "F" * 50
    assert saved(plan_of(50, tolerance=0.05, run=run)) > 0


# A target.


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_target_is_reached_to_the_step_or_refused(steps, law, kinds):
    with pytest.raises(ValueError, match=r"--hybrid_speedup.*--num_inference_steps") as error:
        plan_of(steps, speedup=9.0, kinds=kinds)
    best = float(re.search(r"allow 2 to (\d\.\d\d)", str(error.value))[1])
    for target in (2.0, 2.05, 2.2, 2.5, 2.85, best - 0.005):
        if target < best:
            plan = plan_of(steps, LAWS[law], speedup=target, kinds=kinds)
            needed = steps * (1 - 2 / target)
            assert needed - 1e-9 <= saved(plan) < needed + (0.5 if kinds == "FP" else 1), (target, plan)
            assert Plan.parse(plan).speedup_bound() >= target
        else:
            with pytest.raises(ValueError, match="Lower it"):
                plan_of(steps, speedup=target, kinds=kinds)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 28])
def test_a_target_of_two_is_every_step_full(steps):
    assert plan_of(steps, speedup=2.0) == "F" * steps
    if steps < 8:
        assert plan_of(steps, tolerance=1e3) == "F" * steps


def test_less_than_every_step_full_is_refused():
    with pytest.raises(ValueError, match=r"28 steps allow 2 to .* Raise it"):
        plan_of(28, speedup=1.5)


# Whatever is measured.

BENDS = st.floats(1e-3, 100)
BAD = st.sampled_from([0.0, math.nan, math.inf])
FIELDS = st.one_of(
    st.builds(lambda value, kinds: {"tolerance": value, "kinds": kinds}, st.floats(1e-3, 3), st.sampled_from(KINDS)),
    st.builds(lambda value, kinds: {"speedup": value, "kinds": kinds}, st.floats(2, 2.4), st.sampled_from(KINDS)),
)


def tables(bends=BENDS):
    return st.lists(st.builds(Bend, bends, bends), min_size=24, max_size=24)


@settings(deadline=None)
@given(table=tables(st.one_of(BENDS, BAD)), fields=FIELDS, w=st.floats(0.5, 20))
def test_any_measurements_give_a_plan(table, fields, w):
    plan = drive(AdaptivePolicy(sampler(24), **fields), table.__getitem__, w)
    assert plan[0] == "F" and plan[-LAST_FULL:] == "FF" and set(plan) <= set(fields["kinds"])
    assert max(gap for _, gap in gaps(plan)) <= LONGEST_GROUP
    assert all(len(set(plan[step + 1 : step + gap])) <= 1 for step, gap in gaps(plan))  # one kind a group


@settings(deadline=None)
@given(data=st.data(), fields=FIELDS, step=st.integers(0, 23))
def test_decisions_depend_on_the_past_only(data, fields, step):
    first, other = data.draw(tables()), data.draw(tables())
    spliced = first[: step + 1] + other[step + 1 :]
    plans = [drive(AdaptivePolicy(sampler(24), **fields), table.__getitem__) for table in (first, spliced)]
    decided = max(known + gap for known, gap in [*gaps(plans[0]), (23, 1)] if known <= step)
    assert plans[0][:decided] == plans[1][:decided]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("fields", [{"tolerance": 0.1}, {"speedup": 2.5}], ids=str)
def test_bends_of_no_use_leave_every_step_full(bad, fields):
    policy = AdaptivePolicy(sampler(28), **fields)
    assert drive(policy, lambda step: Bend(bad, bad)) == "F" * 28
    assert policy.tau_1 is None and policy.tau_2 is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_discrepancy_that_is_not_finite_is_an_error(bad):
    with pytest.raises(ValueError, match="discrepancy at step 3"):
        AdaptivePolicy(sampler(28), tolerance=0.1).observe(3, bad, Bend(1.0, 1.0))


def test_phases_are_those_of_the_plan():
    policy = AdaptivePolicy(sampler(50), tolerance=0.03)
    plan = drive(policy, lambda step: Bend(*[falling(step, 50)] * 2))
    window = [i for i, kind in enumerate(plan) if kind != "F"]
    assert (policy.tau_1, policy.tau_2) == (window[0], window[-1] + 1)


# The error of a group, and the group that is chosen, against plain loops.


def square_of_the_error(run, step, kind, length, bend, guidance):
    missed = 0.0
    for i in range(step + 1, step + length):
        missed += run.weights[i] * (run.times[step] - run.times[i]) * (run.times[i] - run.times[step + length])
    pays = abs(run.gains[step + length]) >= 0.5 * max(abs(gain) for gain in run.gains[step + 1 : step + length])
    bends = guidance**2 * bend.delta**2 + (bend.cond**2 if kind is SKIPPED else 0.0)
    return bends * missed**2 * (1 if pays else 4)


@given(
    gains=st.lists(st.floats(0.01, 1), min_size=24, max_size=24),
    shares=st.lists(st.floats(0.01, 1), min_size=24, max_size=24),
    bend=st.builds(Bend, BENDS, BENDS),
    step=st.integers(5, 20),
    longest=st.integers(2, LONGEST_GROUP),
    tolerance=st.floats(1e-3, 3),
)
def test_the_best_group_is_the_best_of_all(gains, shares, bend, step, longest, tolerance):
    times = [1.0 - sum(shares[:i]) / sum(shares) for i in range(24)]
    assume_apart = all(a - b > abs(times[-1] - times[0]) / 24 / 4 for a, b in itertools.pairwise(times))
    run = sampler(24, times if assume_apart else None, gains)
    price, nets = 24 / tolerance**2, {(None, 1): 0.0}
    for kind, saves in ((PIPELINED, 0.5), (SKIPPED, 1.0)):
        for n in range(2, min(longest, 22 - step) + 1):
            error = square_of_the_error(run, step, kind, n, bend, 4.0)
            nets[kind, n] = (price * error - saves * (n - 1)) / n
    policy = AdaptivePolicy(run, tolerance=tolerance, kinds="FPS")
    found = policy._best(step, bend, 4.0, price, longest)
    key = (found.kind if found.length > 1 else None, found.length)
    assert nets[key] == pytest.approx(min(nets.values()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("fields", [dict(tolerance=0.03), dict(tolerance=0.03, kinds="FP"), dict(speedup=4.0)], ids=str)
def test_the_error_of_a_run_is_that_of_its_groups(fields):
    """Each counts with the bend of the FULL step that ends it, not with the one that was expected."""
    run, bends = sampler(50), [Bend(1 + step % 3, 2.0 + step % 5) for step in range(50)]
    policy = AdaptivePolicy(run, **fields)
    plan = drive(policy, bends.__getitem__)
    squares = []
    for step, length in gaps(plan):
        end = step + length
        if length > 1 and end < 48:  # the last two are not measured
            kind = SKIPPED if "S" in plan else PIPELINED
            squares.append(square_of_the_error(run, step, kind, length, bends[end], 4.0))
    assert len(squares) > 3
    assert policy.error == pytest.approx(math.sqrt(sum(squares)))


def test_the_error_of_a_run_with_every_step_full_is_none():
    policy = AdaptivePolicy(sampler(50), speedup=2.0)
    assert drive(policy, lambda step: Bend(1.0, 1.0)) == "F" * 50 and policy.error == 0.0


def test_equal_steps_err_as_1_4_10_20():
    policy, run = AdaptivePolicy(sampler(50), tolerance=0.1), sampler(50)
    errors = [square_of_the_error(run, 10, SKIPPED, n, Bend(0.0, 1.0), 1.0) ** 0.5 for n in (2, 3, 4, 5)]
    assert [error / errors[0] for error in errors] == pytest.approx([1, 4, 10, 20])
    assert [policy._lever(10, n) for n in (2, 3, 4, 5)] == pytest.approx(errors)
