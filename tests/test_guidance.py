"""The rules on made-up predictions, and the weights of streams: equations, with no process and no model."""

import numpy as np
import pytest
import torch

from hybridiff_xdit.estimates.rules import RULES
from hybridiff_xdit.estimates.weights import Guidance, Weights, dots, plain, solve
from hybridiff_xdit.schedule.sampler import Sampler

SHAPE = (2, 4, 6, 6)
TIMES = (1000.0, 900.0, 760.0, 640.0, 555.0, 470.0, 390.0, 210.0, 100.0, 30.0)
GAINS = (-1.5, -1.2, -1.0, -0.9, -0.8, -0.9, -1.1, -0.7, -0.8, -0.9)
W = 5.0


def random(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def rule(name="deferred", times=TIMES, gains=GAINS, weights=None):
    guidance = Guidance(weights or Weights(1, 1.0, (W - 1,)))
    return RULES[name](Sampler(times, gains, tuple(map(abs, gains))), guidance)


def run(made, plan, streams, weights):
    """What the rule hands the pipeline on each step, by stream.

    As the engine does it: the weights of the first step are known when the rule begins, those of a later one when it is
    over.

    Args:
        streams: true predictions, by stream and step.
        weights: of each step.
    """
    handed = []
    for i, (kind, column, read) in enumerate(zip(plan, zip(*streams, strict=True), weights, strict=True)):
        if i == 0:
            made.guidance.learn(i, read)
        if kind == "F":
            handed.append(made.full(i, column))
        elif kind == "P":
            handed.append(made.pipelined(i, column[read.cond]))
        else:
            handed.append(made.skipped(i))
        made.guidance.learn(i, read)
    return handed


def follow(made, plan, pred_u, pred_c, w=W):
    """What the rule hands the pipeline on each step: [[pred_u, pred_c]]. ``w`` may be one number a step."""
    ws = [w] * len(plan) if isinstance(w, float) else w
    return run(made, plan, (pred_u, pred_c), [Weights(1, 1.0, (w - 1,)) for w in ws])


def straight(seed):
    """Predictions that lie on a straight line over the times."""
    start, end = random(seed), random(seed + 1)
    return [torch.lerp(start, end, 1 - t / 1000) for t in TIMES]


def wavy(seed):
    """A slow curve, and some noise of each step's own."""
    a, b = random(seed), random(seed + 1)
    return [a * torch.cos(torch.tensor(t / 400)) + b + 0.1 * random(seed + 2 + i) for i, t in enumerate(TIMES)]


def bent(seed):
    """Predictions that lie on a parabola over the times."""
    start, slope, bend = (random(seed + i) for i in range(3))
    return [start + t / 1000 * slope + 4 * (t / 1000) ** 2 * bend for t in TIMES]


def on_lines(plan, predictions):
    """The predictions, but for steps that are not FULL on the straight line between the FULL steps around them."""
    line = list(predictions)
    for i, kind in enumerate(plan):
        if kind != "F":
            a, b = plan.rindex("F", 0, i), plan.index("F", i)
            line[i] = torch.lerp(predictions[a], predictions[b], (TIMES[i] - TIMES[a]) / (TIMES[b] - TIMES[a]))
    return line


def impulse(pairs, w=W):
    """What the guided predictions move the sample by."""
    ws = [w] * len(pairs) if isinstance(w, float) else w
    return sum(gain * (u + w * (c - u)) for gain, w, (u, c) in zip(GAINS, ws, pairs, strict=True))


@pytest.mark.parametrize("plan", ["FFFSFSSFSF", "FFFPFPPFPF", "FFFPSFSPSF"])
def test_straight_lines_are_estimated_without_an_error_and_nothing_is_owed(plan):
    pred_u, pred_c = straight(0), straight(5)
    for i, (u, c) in enumerate(follow(rule(), plan, pred_u, pred_c)):
        torch.testing.assert_close(u, pred_u[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(c, pred_c[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", ["FFFSFSSFSF", "FFFFSSSFSF"])
def test_with_skipped_steps_the_run_moves_as_if_the_curves_had_been_used(plan):
    """Evenly bent predictions are met whatever the gaps, once four FULL steps have shown that they are."""
    pred_u, pred_c = bent(0), bent(20)
    paid = impulse(follow(rule(), plan, pred_u, pred_c))
    true = impulse(list(zip(pred_u, pred_c, strict=True)))
    lines = impulse(list(zip(on_lines(plan, pred_u), on_lines(plan, pred_c), strict=True)))
    torch.testing.assert_close(paid, true, rtol=1e-3, atol=1e-2)
    assert (lines - true).norm() > 100 * (paid - true).norm()


def test_of_predictions_that_are_noise_nothing_is_taken_for_a_bend():
    pred_u, pred_c = ([random(seed + i) for i in range(len(TIMES))] for seed in (0, 20))
    plan = "FFFSFSSFSF"
    paid = impulse(follow(rule(), plan, pred_u, pred_c))
    lines = impulse(list(zip(on_lines(plan, pred_u), on_lines(plan, pred_c), strict=True)))
    torch.testing.assert_close(paid, lines, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("plan", ["FFFSFSSFSF", "FFFPFPPFPF", "FFFPSFSPSF", "FFFFFPPPSF"])
def test_paying_back_comes_closer_to_the_truth_than_the_last_delta(plan):
    pred_u, pred_c = wavy(0), wavy(20)
    true = impulse(list(zip(pred_u, pred_c, strict=True)))
    errors = {name: (impulse(follow(rule(name), plan, pred_u, pred_c)) - true).norm() for name in ("reuse", "deferred")}
    assert errors["deferred"] < 0.5 * errors["reuse"]


@pytest.mark.parametrize("w", [1.5, 15.0])
def test_estimates_do_not_depend_on_w_nor_does_what_a_full_step_is_handed(w):
    pred_u, pred_c, plan = wavy(0), wavy(20), "FFFPFSSFPF"
    for one, other in zip(*(follow(rule(), plan, pred_u, pred_c, value) for value in (5.0, w)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_w_that_changes_is_taken_into_the_debt():
    pred_u, pred_c, plan = bent(0), bent(20), "FFFSFFFFFF"
    w = [5.0, 5.0, 5.0, 9.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]  # steps 4 to 8 pay as if it were 9, and so not enough
    paid = impulse(follow(rule(), plan, pred_u, pred_c, w), w)
    steady = impulse(follow(rule(), plan, pred_u, pred_c), w)  # pays for w = 5 throughout
    expected = impulse(list(zip(pred_u, pred_c, strict=True)), w)
    torch.testing.assert_close(paid, expected, rtol=1e-3, atol=1e-2)
    assert (steady - expected).abs().max() > 0.1


def test_a_full_step_with_a_small_gain_leaves_the_debt_to_the_next():
    pred_u, pred_c = wavy(0), wavy(20)
    gains = (*GAINS[:4], 0.1, *GAINS[5:])
    pairs = follow(rule(gains=gains), "FFFSFF", pred_u[:6], pred_c[:6])
    assert pairs[4][0] is pred_u[4] and pairs[4][1] is pred_c[4]
    owed = follow(rule(), "FFFSF", pred_u[:5], pred_c[:5])[4]
    for i, true in enumerate((pred_u, pred_c)):
        expected = true[5] + (owed[i] - true[4]) * GAINS[4] / GAINS[5]
        torch.testing.assert_close(pairs[5][i], expected, rtol=1e-4, atol=1e-4)
    assert (pairs[5][0] - pred_u[5]).abs().max() > 0.05


def test_a_gain_of_nothing_pays_nothing():
    pred_u, pred_c = wavy(0), wavy(20)
    for u, c in follow(rule(gains=(*GAINS[:4], 0.0, 0.0)), "FFFSFF", pred_u[:6], pred_c[:6]):
        assert u.isfinite().all() and c.isfinite().all()


def test_pictures_are_estimated_one_by_one():
    """Two pictures with histories of different kinds: each as if it were alone."""
    plan = "FFFSFPSFPF"
    pred_u, pred_c = straight(0), wavy(20)
    for i in range(len(plan)):
        pred_u[i][1], pred_c[i][1] = wavy(40)[i][1], straight(60)[i][1]
    together = follow(rule(), plan, pred_u, pred_c)
    for k in range(2):
        alone = follow(rule(), plan, [u[k : k + 1] for u in pred_u], [c[k : k + 1] for c in pred_c])
        for both, one in zip(together, alone, strict=True):
            for a, b in zip(both, one, strict=True):
                torch.testing.assert_close(a[k : k + 1], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reuse", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_handed_on_has_the_dtype_of_the_predictions(name, dtype):
    pred_u, pred_c = ([p.to(dtype) for p in wavy(seed)] for seed in (0, 20))
    for pair in follow(rule(name), "FFFSFPSFPF", pred_u, pred_c):
        assert all(p.dtype == dtype and p.isfinite().all() for p in pair)


def bend_of(steps, predictions):
    """Largest over the pictures of the root mean square of the second divided difference over three steps."""
    (x, y, z), (f, g, h) = (TIMES[i] for i in steps), (predictions[i].double().numpy() for i in steps)
    difference = ((h - g) / (z - y) - (g - f) / (y - x)) / (z - x)
    return max(np.sqrt((picture**2).mean()) for picture in difference)


@pytest.mark.parametrize(("plan", "steps"), [("FF", (0, 1, 2)), ("FFFSF", (2, 4, 6)), ("FFFPPFSF", (5, 7, 9))])
def test_the_bend_is_the_second_divided_difference_of_the_picture_that_bends_most(plan, steps):
    pred_u, pred_c = wavy(0), wavy(20)
    for i in range(len(TIMES)):
        pred_u[i][1] *= 3
    deltas = [c - u for u, c in zip(pred_u, pred_c, strict=True)]
    made, now = rule(), steps[-1]
    follow(made, plan, pred_u[: len(plan)], pred_c[: len(plan)])
    found = made.bend(now, [pred_u[now], pred_c[now]])
    assert found.cond.item() == pytest.approx(bend_of(steps, pred_c), rel=1e-3)
    assert found.delta.item() == pytest.approx(bend_of(steps, deltas), rel=1e-3)


def bends_of(predictions, dtype):
    """Cond's bend on the last step as the rule finds it in a dtype."""
    made = rule()
    for step, prediction in enumerate(predictions):
        streams = [torch.zeros_like(prediction, dtype=dtype), prediction.to(dtype)]
        found = made.bend(step, streams)
        made.full(step, streams)
    return found.cond.item()


@pytest.mark.parametrize("steps", [5, 7, 9])
def test_what_differs_from_evaluation_to_evaluation_is_no_bend_in_bfloat16(steps):
    """Rounding in the network, of which most is not that of its output."""
    size = (2, 64, 64)
    start, slope, bend = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    smooth = [start + t / 1000 * slope + 16 * (t / 1000) ** 2 * bend for t in TIMES[:steps]]
    noise = [torch.randn(size, generator=torch.Generator().manual_seed(9 + step)) for step in range(steps)]
    noisy = [a + 0.15 * b for a, b in zip(smooth, noise, strict=True)]
    true, raw = bends_of(smooth, torch.float32), bends_of(noisy, torch.float32)
    assert raw > 1.15 * true
    assert bends_of(noisy, torch.bfloat16) == pytest.approx(true, rel=0.1)
    assert bends_of(noisy, torch.float16) == pytest.approx(raw, rel=0.01)
    # It may be a model whose predictions do not bend smoothly: most of a bend is laid to rounding, and not all.
    assert bends_of(noise, torch.bfloat16) == pytest.approx(bends_of(noise, torch.float32) / 2, rel=0.02)


def test_there_is_no_bend_before_two_full_steps_at_other_times():
    made = rule(times=(1000.0, 900.0, 900.0, 640.0))
    for step in range(3):
        assert made.bend(step, [random(step), random(9)]) is None
        made.full(step, [random(step), random(9)])
    assert made.bend(3, [random(3), random(9)]).delta > 0


@pytest.mark.parametrize("name", ["mixed", "none", "reuse"])
def test_rules_that_do_not_tell_have_no_bend(name):
    made = rule(name)
    for step in range(3):
        made.full(step, [random(step), random(9)])
    assert made.bend(3, [random(3), random(9)]) is None and not made.tells_bend and rule().tells_bend


def test_two_evaluations_at_one_time_are_no_division_by_zero():
    """As Heun's solver makes them."""
    times = (1000.0, 900.0, 900.0, 640.0, 640.0, 470.0, 470.0, 210.0, 210.0, 30.0)
    for plan in ("FFFSFPSFPF", "FSFPFSFFSF", "FFFFSSSFFF"):
        for pair in follow(rule(times=times), plan, wavy(0), wavy(20)):
            assert all(p.isfinite().all() for p in pair)


# Any number of streams.

THREE = Weights(1, -1.0, (4.0, -2.5))  # -(c + 4 (c - s_0) - 2.5 (c - s_2)), c the second of three


def moved(handed, weights):
    """What the streams' weighted sums move the sample by."""
    total = 0
    for gain, streams, read in zip(GAINS, handed, weights, strict=True):
        cond = streams[read.cond]
        others = [stream for k, stream in enumerate(streams) if k != read.cond]
        distances = zip(read.deltas, others, strict=True)
        total = total + gain * read.kappa * (cond + sum(a * (cond - s) for a, s in distances))
    return total


@pytest.mark.parametrize("weights", [THREE, Weights(0, 1.0, ())], ids=["three streams", "one stream"])
def test_of_each_stream_the_error_is_paid_back(weights):
    streams, plan = [bent(10 * k) for k in range(1 + len(weights.deltas))], "FFFSFSSFSF"
    read = [weights] * len(plan)
    handed = run(rule(weights=plain(len(streams))), plan, streams, read)
    true = list(zip(*streams, strict=True))
    lines = list(zip(*(on_lines(plan, stream) for stream in streams), strict=True))
    torch.testing.assert_close(moved(handed, read), moved(true, read), rtol=1e-3, atol=1e-2)
    assert (moved(lines, read) - moved(true, read)).norm() > 50 * (moved(handed, read) - moved(true, read)).norm()
    for i, kind in enumerate(plan):
        if kind == "S":
            assert all((a - b).abs().max() > 0.01 for a, b in zip(handed[i], true[i], strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_straight_lines_of_any_number_of_streams_are_estimated_without_an_error(count):
    streams, plan = [straight(10 * k) for k in range(count)], "FFFSFSSFSF"
    for i, handed in enumerate(run(rule(weights=plain(count)), plan, streams, [plain(count)] * len(plan))):
        for k, stream in enumerate(handed):
            torch.testing.assert_close(stream, streams[k][i], atol=1e-4, rtol=1e-4)


def test_the_bend_of_three_streams_weighs_each_distance_by_its_largest_weight():
    streams, made = [wavy(10 * k) for k in range(3)], rule(weights=THREE)
    run(made, "FF", [stream[:2] for stream in streams], [THREE] * 2)
    found = made.bend(2, [stream[2] for stream in streams])
    delta = [(c - s) + 2.5 / 4 * (c - t) for s, c, t in zip(*streams, strict=True)]
    assert found.cond.item() == pytest.approx(bend_of((0, 1, 2), streams[1]), rel=1e-3)
    assert found.delta.item() == pytest.approx(bend_of((0, 1, 2), delta), rel=1e-3)


def test_what_a_change_of_w_leaves_unpaid_is_paid_on_the_next_full_step():
    """Step 4 pays for w = 5 and turns out to have w = 9: it has paid twice what it owed, and step 5 takes that back."""
    pred_u, pred_c = bent(0), bent(20)
    ws = [5.0] * 4 + [9.0] * 2
    handed, steady = (follow(rule(), "FFFSFF", pred_u[:6], pred_c[:6], w) for w in (ws, 5.0))
    torch.testing.assert_close(handed[4], steady[4])  # nothing is known of it yet
    assert steady[5][0] is pred_u[5] and steady[5][1] is pred_c[5]
    true = zip(pred_u, pred_c, strict=True)
    paid, in_short = (
        sum(gain * (u + w * (c - u)) for gain, w, (u, c) in zip(GAINS, ws, pairs, strict=False))
        for pairs in (handed, [*handed[:5], (pred_u[5], pred_c[5])])
    )
    curves = sum(gain * (u + w * (c - u)) for gain, w, (u, c) in zip(GAINS, ws, true, strict=False))
    owed = [(1 - 8 / 4) * GAINS[4] * 4 * (d - e) for d, e in [(handed[4][1] - handed[4][0], pred_c[4] - pred_u[4])]]
    given = (handed[5][1] - handed[5][0]) - (pred_c[5] - pred_u[5])
    torch.testing.assert_close(GAINS[5] * 8 * given, owed[0], rtol=1e-3, atol=1e-3)
    assert (paid - curves).norm() < (in_short - curves).norm()


# The weights, from what the scheduler is handed.

SAMPLE, S, T = random(100), random(101), random(102)
U, C = random(103), random(104)


def weighed(output, *streams):
    return solve(dots(output, SAMPLE, streams).numpy())


@pytest.mark.parametrize(
    ("output", "streams", "expected"),
    [
        (U + 5 * (C - U), (U, C), Weights(1, 1.0, (4.0,))),
        (U + 5 * (C - U), (C, U), Weights(0, 1.0, (4.0,))),
        (-(U + 5 * (C - U)), (U, C), Weights(1, -1.0, (4.0,))),
        (C + 3 * (C - U), (C, U), Weights(0, 1.0, (3.0,))),  # w counted from 0
        (C, (U, C), Weights(1, 1.0, (0.0,))),
        (SAMPLE - 0.6 * (U + 5 * (C - U)), (U, C), Weights(1, -0.6, (4.0,))),
        (U + 3 * (C - U) + 7 * (S - U), (S, C, U), Weights(0, 1.0, (-3.0, 9.0))),
        (C + 4 * (C - S) - 2.5 * (C - T), (S, C, T), Weights(1, 1.0, (4.0, -2.5))),
        (-2 * C, (C,), Weights(0, -2.0, ())),
    ],
    ids=["u, c", "c, u", "negated", "w + 1", "cond alone", "with the sample", "two conditions", "three", "one stream"],
)
def test_the_weights_are_those_of_the_formula(output, streams, expected):
    found = weighed(output, *streams)
    assert found.cond == expected.cond
    np.testing.assert_allclose([found.kappa, *found.deltas], [expected.kappa, *expected.deltas], rtol=1e-5, atol=1e-5)


def test_weights_are_read_of_what_low_precision_and_rescaling_leave():
    guided = U + 5 * (C - U)
    for output in ((guided.half() * 0.8).float(), guided.bfloat16()):
        found = weighed(output, U.half(), C.half())
        assert found.cond == 1 and found.deltas == pytest.approx((4.0,), rel=0.01)


def test_a_larger_prediction_is_read_where_the_scheduler_reads_it():
    u, c = (torch.cat([value, random(200 + i)], dim=1) for i, value in enumerate((U, C)))
    assert weighed(U + 5 * (C - U), u, c).deltas == pytest.approx((4.0,))
    assert dots(U, SAMPLE, [U[:1], C[:1]]) is None


def test_weights_that_cannot_be_told_are_none():
    assert weighed(U, U, U.clone()) is None  # equal streams
    assert weighed(C, U, C, C.clone()) is None
    assert weighed(random(300), U, C) is None  # made of something else
    assert weighed(torch.full_like(U, torch.nan), U, C) is None
    assert weighed(torch.zeros_like(U), U, C) is None


def test_weights_hold_until_others_are_read():
    guidance = Guidance(plain(2))
    assert (guidance.at(3), guidance.most) == (Weights(1, 1.0, (1.0,)), 1.0)
    for step, read in ((0, Weights(1, 1.0, (4.0,))), (1, None), (2, Weights(1, 1.0, (-6.0,))), (3, plain(3))):
        guidance.learn(step, read)
    assert [guidance.at(step).deltas for step in range(5)] == [(4.0,), (4.0,), (-6.0,), (-6.0,), (-6.0,)]
    assert guidance.most == 6.0


def test_weights_are_told_from_the_cond_of_the_run():
    """Where another stream weighs more for a while, the sum is the same, and what is owed is owed of the same parts."""
    read = THREE.seen_from(2)
    torch.testing.assert_close(moved([(S, C, T)] * 10, [read] * 10), moved([(S, C, T)] * 10, [THREE] * 10))
    guidance = Guidance(THREE)
    guidance.learn(0, read)
    assert (guidance.cond, guidance.at(0), guidance.largest) == (1, THREE, (4.0, 2.5))
    streams, plan = [bent(0), bent(10), bent(20)], "FFFSFSSFSF"
    steady, told = (run(rule(weights=THREE), plan, streams, [THREE] * 4 + [w] * 6) for w in (THREE, read))
    for one, other in zip(steady, told, strict=True):
        torch.testing.assert_close(one, other)
