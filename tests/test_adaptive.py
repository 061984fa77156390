"""The adaptive policy on made-up measurements: no process, no model."""

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridiff_xdit.schedule.adaptive import LONGEST_GROUP, AdaptivePolicy, _law
from hybridiff_xdit.schedule.discrepancy import Trial
from hybridiff_xdit.schedule.plan import FULL, Plan
from hybridiff_xdit.schedule.sampler import Sampler

STEPS = (20, 28, 50)
KINDS = ("FPS", "FP", "FS")


def sampler(steps):
    """Equal steps, as flow matching without a shift has."""
    times = tuple(1000 * (1 - i / steps) for i in range(steps))
    return Sampler(times, (-1 / steps,) * steps, (1 / steps,) * steps)


def shape(step, steps):
    return steps / (step * (steps - step))


def level(step, steps):
    """k of a run whose predictions change by the share of the run that has passed or is left."""
    return 0.1 * shape(step, steps)


def falling(step, steps):
    return level(step, steps) * (1 + 40 * math.exp(-12 * step / steps))


def u_shaped(step, steps):
    return level(step, steps) * (1 + 40 * (2 * step / steps - 1) ** 4)


LAWS = {"level": level, "falling": falling, "u_shaped": u_shaped}


def missed(law, step, steps, distance, noise=0.0, skipped=1.5):
    """The trial of a law: ``rho^2 = (k m)^2 + nu^2``; a SKIPPED step misses more than a PIPELINED one."""
    error = math.hypot(law(step, steps) * distance, noise)
    return Trial(distance, error, skipped * error)


def drive(policy, steps, trials, w=5.0):
    """Run a policy as the engine does; ``trials(step, distances)`` measures. Returns the plan."""
    kinds, full, unread = [], [], []
    for step in range(steps):
        while len(unread) > policy.lag:
            policy.observe(*unread.pop(0))
        kind = policy.kind(step, w - 1)
        if kind is FULL:
            if policy.reads_discrepancy(step):
                distances = [step - known for known in reversed(full[-2:])]
                unread.append((step, 0.1, trials(step, distances)))
            full.append(step)
        kinds.append(kind)
    return str(Plan(kinds))


def plan_of(steps, law=level, noise=0.0, w=5.0, **fields):
    def trials(step, distances):
        return [missed(law, step, steps, m, noise) for m in distances]

    return drive(AdaptivePolicy(sampler(steps), **fields), steps, trials, w)


def saved(plan):
    return 0.5 * plan.count("P") + plan.count("S")


def gaps(plan):
    """(step, steps to the next FULL one) of the FULL steps but the last."""
    full = [i for i, kind in enumerate(plan) if kind == "F"]
    return [(a, b - a) for a, b in itertools.pairwise(full)]


def mean_gap(plan, start, end):
    """Over the FULL steps from one share of the run to another."""
    found = [gap for step, gap in gaps(plan) if start * len(plan) <= step < end * len(plan)]
    return sum(found) / len(found)


# What the measurements make of a run.


def test_steps_are_full_while_the_errors_fall_fast():
    fast, slow = (plan_of(50, law, tolerance=0.02) for law in (falling, level))
    first, soonest = (len(plan) - len(plan.lstrip("F")) for plan in (fast, slow))
    assert first >= soonest + 5


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", [28, 50])
def test_the_end_is_denser_than_the_middle(law, steps):
    plan = plan_of(steps, LAWS[law], tolerance=0.05)
    assert mean_gap(plan, 0.8, 1) < mean_gap(plan, 0.4, 0.6)


def test_groups_are_long_where_the_errors_are_small():
    plan = plan_of(50, u_shaped, tolerance=0.1)
    assert mean_gap(plan, 0, 0.2) < mean_gap(plan, 0.2, 0.4) < mean_gap(plan, 0.4, 0.6) > mean_gap(plan, 0.6, 0.8)
    assert mean_gap(plan, 0.6, 0.8) > mean_gap(plan, 0.8, 1)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("steps", STEPS)
def test_a_larger_tolerance_saves_more(steps, law, kinds):
    tolerances = (1e-5, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3)
    plans = [plan_of(steps, LAWS[law], tolerance=value, kinds=kinds) for value in tolerances]
    counts = [saved(plan) for plan in plans]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-2]


@pytest.mark.parametrize("law", LAWS)
def test_stronger_guidance_saves_less(law):
    counts = [saved(plan_of(50, LAWS[law], tolerance=0.03, w=w)) for w in (2, 5, 9, 15)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("law", LAWS)
def test_errors_and_tolerance_twice_as_large_is_the_same_plan(law):
    def twice(step, steps):
        return 2 * LAWS[law](step, steps)

    assert plan_of(50, LAWS[law], tolerance=0.02) == plan_of(50, twice, tolerance=0.04)


@pytest.mark.parametrize("law", LAWS)
def test_guidance_and_tolerance_twice_as_large_is_the_same_plan(law):
    assert plan_of(50, LAWS[law], tolerance=0.02, w=3) == plan_of(50, LAWS[law], tolerance=0.04, w=5)


def test_guidance_that_is_not_there_is_no_error():
    for w in (1.0, 0.5):
        assert set(plan_of(28, tolerance=0.02, w=w)) <= set("FPS")


def test_a_step_that_weighs_much_in_the_sampler_is_full():
    times, gains, weights = sampler(50)
    heavy = [weight * (1 + 50 * (20 <= i < 30)) for i, weight in enumerate(weights)]

    def trials(step, distances):
        return [missed(level, step, 50, m) for m in distances]

    plan = drive(AdaptivePolicy(Sampler(times, gains, tuple(heavy)), tolerance=0.02), 50, trials)
    assert plan[20:30] == "F" * 10
    assert {"S"} <= set(plan[:20]) and {"S"} <= set(plan[30:])


def test_noise_that_does_not_grow_with_the_distance_does_not_prevent_saving():
    """As in low precision: a gap of two steps is no worse than one, so it pays to go further."""
    noisy = plan_of(50, lambda *_: 1e-9, noise=0.01, tolerance=0.02)
    drifting = plan_of(50, lambda *_: 0.01, tolerance=0.02)
    assert saved(noisy) > saved(drifting) > 0


def test_skipped_steps_are_used_where_they_cost_little_more():
    def plan(skipped):
        def trials(step, distances):
            return [missed(level, step, 50, m, skipped=skipped) for m in distances]

        policies = [AdaptivePolicy(sampler(50), tolerance=0.02, **kinds) for kinds in ({"kinds": "FPS"}, {})]
        return [drive(policy, 50, trials) for policy in policies]

    assert all("P" not in found and "S" in found for found in plan(1.0))
    with_pipelined, by_default = plan(20.0)
    assert "S" not in with_pipelined and "P" in with_pipelined
    assert "P" not in by_default and by_default.count("S") < with_pipelined.count("P")


# A target.


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("target", [2.0, 2.05, 2.2, 2.35, 2.5, 2.7, 2.85])
@pytest.mark.parametrize("steps", STEPS)
def test_a_target_is_reached_and_not_passed_by_a_step(steps, target, law, kinds):
    for noise in (0.0, 0.002):
        plan = plan_of(steps, LAWS[law], noise=noise, speedup=target, kinds=kinds)
        needed = steps * (1 - 2 / target)
        assert needed - 1e-9 <= saved(plan) < needed + (0.5 if kinds == "FP" else 1)
        assert Plan.parse(plan).speedup_bound() >= target


def test_a_target_of_two_is_every_step_full():
    for steps in (1, 2, 5, *STEPS):
        assert plan_of(steps, speedup=2.0) == "F" * steps


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (4, {"speedup": 2.1}),
        (6, {"speedup": 2.1}),
        (7, {"speedup": 2.5}),
        (10, {"speedup": 3.5}),
        (20, {"speedup": 6.0}),
        (28, {"speedup": 7.5}),
        (50, {"speedup": 3.3, "kinds": "FP"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("law", LAWS)
def test_a_target_out_of_reach_is_an_error_that_says_what_is_in_reach(steps, fields, law):
    with pytest.raises(ValueError, match=r"--hybrid_speedup.*--num_inference_steps") as error:
        plan_of(steps, **fields)
    best = float(re.search(r"allow 2 to (\d\.\d\d)", str(error.value))[1])
    assert 2 <= best < fields["speedup"]
    reachable = max(2.0, best - 0.005)
    assert Plan.parse(plan_of(steps, LAWS[law], **{**fields, "speedup": reachable})).speedup_bound() >= reachable


# Whatever is measured.


ERRORS = st.floats(1e-4, 10)
BAD = st.sampled_from([0.0, math.nan, math.inf, -math.inf])


def of_table(table):
    """Trials from a table of (pipelined, skipped) pairs: two for each step."""

    def trials(step, distances):
        return [Trial(m, *table[step][i]) for i, m in enumerate(distances)]

    return trials


def tables(steps, errors=ERRORS):
    return st.lists(st.tuples(*[st.tuples(errors, errors)] * 2), min_size=steps, max_size=steps)


FIELDS = st.one_of(
    st.builds(lambda value, kinds: {"tolerance": value, "kinds": kinds}, st.floats(1e-3, 3), st.sampled_from(KINDS)),
    st.builds(lambda value, kinds: {"speedup": value, "kinds": kinds}, st.floats(2, 2.6), st.sampled_from(KINDS)),
)


@settings(deadline=None)
@given(table=tables(24, st.one_of(ERRORS, BAD)), fields=FIELDS, w=st.floats(1, 20))
def test_any_measurements_give_a_plan(table, fields, w):
    plan = drive(AdaptivePolicy(sampler(24), **fields), 24, of_table(table), w)
    assert plan[0] == plan[-1] == "F"
    assert set(plan) <= set(fields["kinds"])
    assert max(gap for _, gap in gaps(plan)) <= LONGEST_GROUP
    assert all(len(set(plan[step + 1 : step + gap])) <= 1 for step, gap in gaps(plan))  # one kind a group
    for (measured, _), (_, gap) in itertools.pairwise(gaps(plan)):  # what a FULL step measures is known at the next
        errors = [error for trial in table[measured] for error in trial]
        if not all(0 < error < math.inf for error in errors):
            assert gap == 1  # nothing to go on


@settings(deadline=None)
@given(data=st.data(), fields=FIELDS, step=st.integers(0, 23))
def test_decisions_depend_on_the_past_only(data, fields, step):
    first, other = data.draw(tables(24)), data.draw(tables(24))
    plans = [
        drive(AdaptivePolicy(sampler(24), **fields), 24, of_table(table))
        for table in (first, first[: step + 1] + other[step + 1 :])
    ]
    decided = max(known + gap for known, gap in [*gaps(plans[0]), (23, 1)] if known <= step)
    assert plans[0][:decided] == plans[1][:decided]


@settings(deadline=None)
@given(table=tables(24), fields=FIELDS)
def test_the_same_measurements_give_the_same_plan(table, fields):
    plans = [drive(AdaptivePolicy(sampler(24), **fields), 24, of_table(table)) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("fields", [{"tolerance": 0.1}, {"speedup": 2.5}], ids=str)
def test_measurements_of_no_use_leave_every_step_full(bad, fields):
    policy = AdaptivePolicy(sampler(28), **fields)
    assert drive(policy, 28, lambda step, distances: [Trial(m, bad, bad) for m in distances]) == "F" * 28
    assert policy.tau_1 is None and policy.tau_2 is None


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_one_bad_measurement_leaves_the_next_full_step_alone_and_is_forgotten(bad):
    def trials(step, distances):
        found = [missed(level, step, 50, m) for m in distances]
        return [trial._replace(pipelined=bad) for trial in found] if step == spoilt else found

    spoilt = None
    plain = drive(AdaptivePolicy(sampler(50), tolerance=0.05), 50, trials)
    pairs = itertools.pairwise(gaps(plain))
    spoilt, alone = next((step, at) for (step, _), (at, gap) in pairs if gap > 2 and step > 15)
    plan = drive(AdaptivePolicy(sampler(50), tolerance=0.05), 50, trials)
    assert plan[: alone + 1] == plain[: alone + 1]
    assert plan[alone + 1] == "F" != plain[alone + 1]
    assert saved(plan) > 0.6 * saved(plain)


def test_phases_are_those_of_the_plan():
    policy = AdaptivePolicy(sampler(50), tolerance=0.02)
    plan = drive(policy, 50, lambda step, distances: [missed(falling, step, 50, m) for m in distances])
    window = [i for i, kind in enumerate(plan) if kind != "F"]
    assert (policy.tau_1, policy.tau_2) == (window[0], window[-1] + 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_very_short_runs_are_full(steps):
    assert plan_of(steps, tolerance=10.0) == "F" * steps


# The law of an estimate's error.


@given(
    k=st.floats(1e-3, 10),
    share=st.floats(0, 1),  # nu / (k m1): beyond 1 the floor of the drift takes over
    m1=st.integers(1, 8),
    gap=st.integers(1, 8),
    s=st.floats(0.01, 2),
)
def test_a_series_made_of_the_law_gives_it_back(k, share, m1, gap, s):
    nu, m2 = share * k * m1, m1 + gap
    law = _law(m1, math.hypot(k * m1, nu), m2, math.hypot(k * m2, nu), s**2)
    assert math.sqrt(law.drift) * s == pytest.approx(k, rel=1e-6)
    assert law.noise * s**2 == pytest.approx(nu**2, rel=1e-5, abs=1e-6 * k**2 * m1**2)


@given(rho1=ERRORS, rho2=ERRORS, m1=st.integers(1, 8), gap=st.integers(1, 8))
def test_the_law_keeps_the_near_error_and_never_takes_all_of_it_for_noise(rho1, rho2, m1, gap):
    law = _law(m1, rho1, m1 + gap, rho2, 1.0)
    assert law.drift * m1**2 + law.noise == pytest.approx(rho1**2)
    assert rho1**2 / 2 <= law.drift * m1**2 * (1 + 1e-9)
    assert law.noise >= -1e-9 * rho1**2
