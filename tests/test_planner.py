"""The cost model against numbers worked out by hand, and against what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import predict as predict_script
import pytest
import torch
from scenarios import SCENARIOS

from hybridiff_xdit import HybridConfig, planner
from hybridiff_xdit.planner import Cost, Layout, Link, Machine, Point, Speed, predict
from hybridiff_xdit.planner.denoisers import branch_inputs, build
from hybridiff_xdit.schedule.plan import Plan, StepKind
from hybridiff_xdit.seam.checkpoints import resolve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def lines(pattern):
    """What was measured on two GPUs, of ours and of one GPU."""
    rows = (json.loads(row) for file in sorted(RESULTS.glob(pattern)) for row in file.read_text().splitlines())
    return list(filter(predict_script.is_predicted, rows))


MEASURED = lines("two-ranks_*.jsonl")  # stages balanced by FLOPs, as the model counts bytes

#: 1 GFLOP a millisecond, and of every forward 2 ms that no split of the tokens makes shorter; 1 ms besides a step.
SPEED = Speed(fixed=2e-3, rate=1e12, step=1e-3, skew=1.25)
#: 1 MB takes a millisecond, 10 over the network; an exchange 0.1 ms, or 1.
MACHINE = Machine(node=8, inside=Link("NVLink", 1e9, 1e-4), between=Link("network", 1e8, 1e-3))
#: 2 attentions of width 4 (8 bytes) over 60 image and 40 text tokens; 0.3 MFLOP of attention in 40 GFLOP.
COST = Cost(
    kind="mmdit",
    flops=40e9,
    share=0.6,
    units=10,
    prediction=10_000,
    to_output=100_000,
    from_output=0,
    largest=1_000_000,
    weights=50_000_000,
    image=60,
    text=40,
    attentions=2,
    width=8,
    heads=12,
)
PLAN = Plan.parse("FFFFPPPFFS")  # 6 FULL, 3 PIPELINED, of which 2 hand a boundary over, 1 SKIPPED


def seconds(layout, plan=PLAN, images=1, cost=COST, machine=MACHINE, speed=SPEED):
    return predict(cost, speed, machine, plan, layout, images).seconds


def test_one_gpu():
    # A batch of both branches: 2 + 80 ms, and 1 ms besides.
    assert planner.one_gpu(COST, SPEED, 10) == pytest.approx(10 * 83e-3)


def test_a_pair():
    # A forward is 42 ms; its prediction 0.1 + 0.01 ms; a boundary 0.1 + 0.1; the slower stage 42 * 0.6 * 1.25 = 31.5.
    expected = 6 * (42 + 0.11) + 3 * (31.5 + 0.11) + 2 * 0.2 + 10 * 1
    prediction = predict(COST, SPEED, MACHINE, PLAN, Layout())
    assert prediction.seconds == pytest.approx(expected / 1e3)
    assert prediction.speedup == pytest.approx(830 / expected)
    # Rank 0 sends a prediction a FULL step and two boundaries; rank 1 would send 9 predictions.
    assert prediction.sent == {"branch": pytest.approx(6 * 10_000 + 2 * 100_000)}
    assert prediction.memory == 50e6 + 80e6


def test_a_unet_sends_features_back():
    cost = replace(COST, from_output=200_000)
    # Rank 1, with the prediction: 9 predictions and two features.
    assert predict(cost, SPEED, MACHINE, PLAN, Layout()).sent["branch"] == pytest.approx(90_000 + 400_000)
    assert seconds(Layout(), cost=cost) == seconds(Layout())  # nobody waits for them


def test_a_split_sequence():
    # Of 100 tokens a rank of 4 has 15 + 40 = 55: 22 GFLOP but for the attention, which here is nothing.
    assert COST.flops_of(4) == pytest.approx(22e9)
    # An attention: (4 * 15 + 2 * 40) tokens of 8 bytes = 1120 bytes; and the prediction once. 3/4 of it is sent.
    assert COST.exchange(4, 1).packed == pytest.approx(2 * 1120 + 10_000)
    # 9 exchanges: 0.9 ms + 9180 bytes, 0.00918 ms. Boundaries: 55 of 100 tokens.
    work = 2 + 22 + 0.9 + 0.00918
    expected = 6 * (work + 0.11) + 3 * (work * 0.75 + 0.11) + 2 * (0.1 + 0.055) + 10
    prediction = predict(COST, SPEED, MACHINE, PLAN, Layout(sequence=4))
    assert prediction.seconds == pytest.approx(expected / 1e3)
    assert prediction.sent["sequence"] == pytest.approx((6 + 3 * 0.75) * 9180)
    assert prediction.sent["branch"] == pytest.approx(60_000 + 2 * 55_000)
    assert prediction.memory == pytest.approx(50e6 + 80 * 550e3)


def test_a_ranks_queries_meet_all_keys():
    # Width 40: 4 * 2 * 40 * 100^2 = 3.2 MFLOP of attention; a rank of 4 has 55 of 100 queries, and all keys.
    cost = replace(COST, flops=5e6, width=80)
    assert cost.flops_of(4) == pytest.approx(1.8e6 * 0.55 + 4 * 2 * 40 * 55 * 100)
    assert cost.flops_of(1) == 5e6


def test_what_a_split_sequence_exchanges_is_packed():
    slow = replace(SPEED, packing=1e6)  # 12 240 bytes: 12.24 ms
    more = seconds(Layout(sequence=4), Plan.parse("F"), speed=slow) - seconds(Layout(sequence=4), Plan.parse("F"))
    assert more == pytest.approx(12.24e-3)
    assert seconds(Layout(), speed=slow) == seconds(Layout())


def test_a_split_by_ring_attention():
    # An attention: 3 times the keys and values of 15 tokens of 8 bytes, 240 bytes; 4 outputs of 55 tokens are merged.
    found = COST.exchange(4, 4)
    assert found == pytest.approx((2 * 3 + 1, 2 * 3 * 240 + 7500, 10_000, 2 * 4 * 55 * 8))
    merging = replace(SPEED, merging=1e6)
    work = 2 + 22 + 0.7 + 8940 / 1e6 + 3.52
    expected = work + 0.11 + 1
    assert seconds(Layout(sequence=4, ring=4), Plan.parse("F"), speed=merging) == pytest.approx(expected / 1e3)
    assert Layout(sequence=4, ring=4).flags() == ["--ring_degree", "4"]


def test_a_split_by_both():
    # Two Ulysses ranks hold half of the heads of 30 tokens: 1120 bytes an attention, half of which are sent; then
    # once the keys and values, 240 bytes; two outputs of (15 + 20) tokens' worth.
    assert COST.exchange(4, 2) == pytest.approx((8 + 2 + 1, 1120 + 7500 + 480, 12_240, 2 * 2 * 35 * 8))
    layout = Layout(sequence=4, ring=2)
    assert layout.gpus == 8
    assert layout.flags() == ["--ulysses_degree", "2", "--ring_degree", "2"]


def test_layer_stages():
    # 4 stages: 2 ranks a branch. FULL: 21 ms, the first four 42, a boundary (0.2) and the predictions; PIPELINED:
    # 42 * 1.25 / 4.
    expected = 4 * 42 + 2 * 21 + 6 * (0.2 + 0.11) + 3 * (13.125 + 0.11) + 2 * 0.2 + 10
    prediction = predict(COST, SPEED, MACHINE, PLAN, Layout(stages=4))
    assert prediction.seconds == pytest.approx(expected / 1e3)
    assert prediction.sent["stages"] == pytest.approx(8 * 100_000)


def test_layer_stages_beside_a_split_sequence():
    # A forward of a quarter of the tokens is 24.909 ms, as above; of it a rank runs half, or a quarter of a PIPELINED
    # step's. Boundaries are shards.
    work, boundary = 2 + 22 + 0.9 + 0.00918, 0.1 + 0.055
    expected = 4 * work + 2 * work / 2 + 6 * (boundary + 0.11) + 3 * (work * 1.25 / 4 + 0.11) + 2 * boundary + 10
    prediction = predict(COST, SPEED, replace(MACHINE, node=16), PLAN, Layout(sequence=4, stages=4))
    assert prediction.seconds == pytest.approx(expected / 1e3)
    assert prediction.sent["sequence"] == pytest.approx((6 / 2 + 3 * 1.25 / 4) * 9180)
    assert prediction.sent["stages"] == pytest.approx(8 * 55_000)
    assert prediction.layout.flags() == ["--ulysses_degree", "4", "--hybrid_stages", "4"]


def test_pictures_are_dealt_out():
    run = seconds(Layout())
    assert seconds(Layout(), images=5) == pytest.approx(run)
    assert seconds(Layout(data=2), images=5) == pytest.approx(3 * run / 5)  # one group makes 3 of 5
    assert seconds(Layout(data=5), images=5) == pytest.approx(run / 5)


@pytest.mark.parametrize(
    ("layout", "crossing"),
    [
        (Layout(sequence=4), ()),
        (Layout(sequence=4, data=2), ()),
        (Layout(sequence=8), ("branch",)),
        (Layout(sequence=8, order=("branch", "sequence", "stages", "data")), ("sequence",)),
        (Layout(sequence=4, stages=4), ("branch",)),
        (Layout(sequence=4, stages=8), ("stages", "branch")),
        (Layout(sequence=16), ("sequence", "branch")),
        (Layout(sequence=3), ()),
        (Layout(sequence=3, data=2), ("sequence", "branch")),  # ranks 6 to 8 lie in two nodes
    ],
)
def test_what_crosses_the_network(layout, crossing):
    assert layout.crossing(MACHINE) == crossing


def test_the_network_is_paid_for():
    # 16 GPUs: a rank has 64 / 8 + 36 = 44 of 100 tokens.
    over_branches = Layout(sequence=8)
    over_sequence = replace(over_branches, order=("branch", "sequence", "stages", "data"))
    cost, kernels = replace(COST, image=64, text=36, heads=8), 2 + 40 * 0.44
    sent = 7 / 8 * (2 * (4 * 8 + 2 * 36) * 8 + 10_000)
    full = Plan.parse("F")
    assert seconds(over_branches, full, cost=cost) == pytest.approx(
        (kernels + 0.9 + sent / 1e6 + (1 + 0.1) + 1) / 1e3, rel=1e-6
    )
    assert seconds(over_sequence, full, cost=cost) == pytest.approx(
        (kernels + 9 + sent / 1e5 + (0.1 + 0.01) + 1) / 1e3, rel=1e-6
    )


def test_layouts_of_a_node():
    cost = replace(COST, heads=12, image=64)
    found = {(x.data, x.sequence, x.stages) for x in planner.every_layout(cost, 8, 3, MACHINE)}
    # No 3 ranks a sequence, since 64 tokens cannot be split so. 3 groups are no node's 4, and fit in 6 GPUs.
    one = {(1, 1, 2), (1, 1, 4), (1, 1, 8), (1, 2, 2), (1, 2, 4), (1, 4, 2)}
    assert found == one | {(2, 1, 2), (2, 1, 4), (2, 2, 2), (3, 1, 2)}
    unet = replace(COST, image=0, text=0, heads=1)
    assert {x.sequence for x in planner.every_layout(unet, 8, 1, MACHINE)} == {1}
    assert {x.data for x in planner.every_layout(cost, 8, 1, MACHINE)} == {1}  # groups without a picture help nobody
    assert {x.data for x in planner.every_layout(cost, 64, 5, MACHINE)} == {1, 2, 3, 5}  # 4 have no fewer each than 3


def test_layouts_past_a_node_say_what_crosses():
    cost = replace(COST, image=64, heads=8)
    sixteen = [x for x in planner.every_layout(cost, 16, 1, MACHINE) if (x.sequence, x.stages, x.ring) == (8, 2, 1)]
    assert [x.crossing(MACHINE) for x in sixteen] == [("branch",), ("sequence",)]
    assert [x.is_available for x in sixteen] == [True, False]


def test_the_best_is_the_best_that_runs():
    slow = replace(SPEED, merging=1e6)
    ranked = planner.rank_layouts(replace(COST, image=64, heads=8), slow, MACHINE, PLAN, 8)
    assert [x.seconds for x in ranked] == sorted(x.seconds for x in ranked)
    assert ranked[0].layout.stages > 2  # which is for the user to want
    assert planner.best(ranked).layout == Layout(sequence=4)
    assert planner.best(ranked).layout.flags() == ["--ulysses_degree", "4"]


def test_ring_attention_is_chosen_where_heads_do_not_divide():
    ranked = planner.rank_layouts(replace(COST, image=64, heads=6), SPEED, MACHINE, PLAN, 8)
    assert planner.best(ranked).layout.flags() == ["--ring_degree", "4"]
    assert planner.best(ranked, may_ring=False).layout.flags() == ["--ulysses_degree", "2"]
    assert {(x.layout.sequence, x.layout.ring) for x in ranked} == {(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)}


def test_stages_are_chosen_where_they_may_be(monkeypatch):
    monkeypatch.setattr("hybridiff_xdit.planner.layouts.CHOSEN_STAGES", (2, 4, 8))
    best = planner.best(planner.rank_layouts(COST, SPEED, MACHINE, Plan.parse(10 * str(PLAN)), 8))
    assert best.layout.flags() == ["--hybrid_stages", "8"]


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ({"policy": "cfg"}, (50, 0, 0)),
        ({}, (40, 0, 10)),
        ({"speedup": 4}, (25, 0, 25)),
        ({"speedup": 2}, (50, 0, 0)),
        ({"speedup": 2.5, "kinds": "FP"}, (30, 20, 0)),
        ({"plan": "8-48/4"}, (20, 30, 0)),
        ({"policy": "paper"}, (45, 5, 0)),
        ({"policy": "paper", "interval": 7}, (43, 7, 0)),
    ],
)
def test_expected_plans(config, counts):
    plan = planner.expected_plan(HybridConfig(**config), 50)
    assert tuple(map(plan.count, StepKind)) == counts
    assert str(plan)[0] == "F"
    if "speedup" in config:
        assert plan.speedup_bound() == pytest.approx(config["speedup"])


def test_a_line_through_two_forwards():
    speed = Speed.through(Point(1e12, 0.3), Point(3e12, 0.7))
    assert (speed.fixed, speed.rate) == (pytest.approx(0.1), pytest.approx(5e12))
    # Timings that say the fixed part is negative, or that more is faster: no line, the rate of the larger one.
    for small in (Point(1e12, 0.1), Point(1e12, 0.9)):
        speed = Speed.through(small, Point(3e12, 0.6))
        assert (speed.fixed, speed.rate) == (0, pytest.approx(5e12))


# The model's figures against the real denoisers, and its predictions against what was measured.


@pytest.mark.parametrize("name", ["sdxl-tiny", "sd3-tiny"])
def test_costs_are_those_of_a_real_denoiser(name):
    """By the meta device as with weights; the bytes are worked out."""
    settings = SCENARIOS[name].settings
    with torch.device("meta"):
        empty = build(settings)
    real = build(settings)
    cost = Cost.of(empty, branch_inputs(settings, 16, 16, device="meta"), torch.float16)
    assert cost == Cost.of(real, branch_inputs(settings, 16, 16), torch.float16)
    assert cost.weights == 2 * sum(p.numel() for p in real.parameters())
    if name == "sdxl-tiny":  # both boundaries lie on the lowest of three levels
        assert (cost.prediction, cost.to_output, cost.from_output) == (2 * 4 * 256, 2 * 64 * 16, 2 * 32 * 16)
        assert (cost.image, cost.heads) == (0, 1)
    else:  # 64 patches of the picture
        assert (cost.image, cost.text, cost.width, cost.attentions, cost.heads) == (64, 333, 256, 4, 2)
        assert (cost.to_output, cost.from_output) == ((64 + 333) * 256, 0)
        assert cost.prediction == 2 * 16 * 256


@pytest.mark.parametrize("model", ["sdxl", "sd3-medium"])
def test_the_stored_forwards_are_of_the_counted_flops(model):
    seconds = {"sdxl": (26.4e-3, 102e-3), "sd3-medium": (26.7e-3, 167.5e-3)}[model]
    for side, measured in zip((1024, 2048), seconds, strict=True):
        cost = predict_script._cost(f"{model}-{side}", torch.float16)
        speed, name = planner.speed_of(cost.kind, "NVIDIA H200")
        assert name == "H200"
        assert speed.seconds(cost.flops) == pytest.approx(measured, rel=1e-3)


def test_normed_queries_and_keys_have_figures_of_their_own():
    cost = predict_script._cost("sd3.5-large-1024", torch.float16)
    speed, _ = planner.speed_of(cost.kind, "NVIDIA H100 80GB HBM3")
    assert speed.seconds(cost.flops) == pytest.approx(97.5e-3, rel=0.01)
    assert planner.speed_of("mmdit", "H100")[0].seconds(cost.flops) < 0.9 * speed.seconds(cost.flops)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match=r"no figures of an NVIDIA A100.*--ulysses_degree.*--calibrate.*--device H100"):
        planner.speed_of("unet", "NVIDIA A100-SXM4-80GB")


@pytest.mark.parametrize(
    "line",
    [line for line in lines("speed_*.jsonl") if any(line.get("pieces") or ())],
    ids=lambda x: f"{x['scenario']} {x['strategy']}",
)
def test_predictions_with_cuda_graphs_are_within_a_tenth(line):
    assert predict_script.prediction(line) == pytest.approx(predict_script.seconds(line), rel=0.1)


@pytest.mark.parametrize(
    "line",
    [line for line in MEASURED if line["bytes_sent"]],
    ids=lambda x: f"{x['device']} {x['scenario']} {x['plan']}",
)
def test_predicted_bytes_are_those_sent(line):
    cost = predict_script._cost(line["scenario"], torch.float16)
    sent = predict(cost, SPEED, MACHINE, Plan.parse(line["plan"]), Layout()).sent["branch"]
    # Besides, a checksum a FULL step and the facts that the ranks compare.
    assert sent == pytest.approx(max(line["bytes_sent"]), abs=2000)


def test_the_comparison_is_printed():
    rows = predict_script.table(MEASURED).splitlines()
    assert len(rows) == 2 + len(MEASURED)
    assert [row.count("|") for row in rows] == [8] * len(rows)
    assert all(("not claimed" in row) == ("H200" in row or "| one-gpu |" in row) for row in rows[2:])


def test_calibration_times_two_sizes(monkeypatch):
    times = iter([0.1, 0.3])
    runs = []

    class Timer:
        def __init__(self, statement, globals):
            self.run = lambda: eval(statement, globals)

        def blocked_autorange(self, min_run_time):
            runs.append(self.run())
            return SimpleNamespace(median=next(times))

    monkeypatch.setattr("hybridiff_xdit.planner.cost.Timer", Timer)
    checkpoint = resolve("emoji-sdxl")
    speed = planner.calibrate(checkpoint, 64, 64, torch.device("cpu"))
    assert [run.shape[-1] for run in runs] == [16, 32]
    small, large = (planner.cost_of(checkpoint, side, side).flops for side in (32, 64))
    assert (speed.seconds(small), speed.seconds(large)) == (pytest.approx(0.1), pytest.approx(0.3))
    assert speed.step == planner.SPEEDS["H100"]["unet"].step


def test_calibration_on_a_gpu_times_a_forward_between_two_marks(monkeypatch):
    calls, times = [], iter([0.1, 0.3])

    def built(settings):
        denoiser = build(settings)
        denoiser.register_forward_hook(lambda module, args, output: calls.append(output[0].shape[-1]))
        return denoiser

    def seconds_between(run):
        calls.clear()
        run(lambda: calls.append("mark"))
        (first, size, last), expected = calls, next(times)
        assert (first, size, last) == ("mark", {0.1: 16, 0.3: 32}[expected], "mark")
        return (expected,)

    monkeypatch.setattr("hybridiff_xdit.planner.cost.build", built)
    monkeypatch.setattr("hybridiff_xdit.planner.cost.can_capture", lambda device: True)
    monkeypatch.setattr("hybridiff_xdit.planner.cost.seconds_between", seconds_between)
    checkpoint = resolve("emoji-sdxl")
    speed = planner.calibrate(checkpoint, 64, 64, torch.device("cpu"))
    small, large = (planner.cost_of(checkpoint, side, side).flops for side in (32, 64))
    assert (speed.seconds(small), speed.seconds(large)) == (pytest.approx(0.1), pytest.approx(0.3))
