"""More than two stages: half of the ranks are a branch's, on FULL steps too. Against the oracle with as many stages."""

import itertools
import random
import time

import oracle
import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import Ranks, waiting_at_once
from test_features import SD3_TENSORS
from test_parity import covering
from test_partition import call, inputs
from test_simulate import off_for_a_step

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.evaluate.stages.families import read
from hybridiff_xdit.ranks.comm import Comm
from hybridiff_xdit.schedule.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")

#: P after a FULL step that waits, after one that does not, after P and after S; FULL after P and after S; windows of
#: one to four.
PLANS = ["FFFFFPPPFFPF", "FPFPPPPFPFFPPF", "FFFSPFFPPSFFPF", "FSFPPSSFFPPFFSFP", "FFFFFFFFFF", "FFFFSFPPSPFF"]
AGREEMENT, HEADER = 24 * 8, 16  # bytes
TRIAL = {"sd3": 4, "sdxl": 0}  # bytes: whether the stages of blocks gave what the whole gives
TOLERANCE = 1e-5  # of the largest latent


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def eight():
    ranks = Ranks(8)
    yield ranks
    ranks.close()


def hybrid(name, fields, simulate=False, **kwargs):
    """(latents, report) on this rank."""
    pipe = apply_hybrid(tiny.pipeline(name), HybridConfig(**fields), simulate=simulate)
    steps = {"num_inference_steps": len(fields["plan"])} if "plan" in fields else {}
    try:
        return tiny.call(pipe, name, **{**steps, **kwargs}), last_report(pipe)
    finally:
        remove_hybrid(pipe)


def called(name, fields, kwargs):
    return hybrid(name, fields, **kwargs)


def simulated(name, fields, **kwargs):
    return hybrid(name, fields, simulate=True, **kwargs)


def expected(name, stages, plan, rule):
    cut = oracle.STAGE_CUTS[name, stages]
    return oracle.denoise(tiny.pipeline(name), tiny.prompt(name), tiny.noise(name), plan=plan, rule=rule, cut=cut)[0]


def check(ranks, name, fields, **kwargs):
    """All ranks have the bits of one process that plays them, which are the oracle's but for rounding; the report."""
    fields = {**fields, "stages": ranks.size}
    outcomes = ranks.run(called, name, fields, kwargs)
    alone, report = simulated(name, fields, **kwargs)
    assert all(torch.equal(latents, alone) for latents, _ in outcomes)
    assert all(found == outcomes[0][1] for _, found in outcomes)
    assert outcomes[0][1]["plan"] == report["plan"] and outcomes[0][1]["world_size"] == ranks.size
    latents = expected(name, ranks.size, report["plan"], report["config"]["guidance"])
    assert ((alone - latents).abs().max() / latents.abs().max()).item() < TOLERANCE
    return report


@covering(PLANS, ["reuse", "deferred"])
def test_four_ranks_are_the_oracle(four, name, plan, rule):
    assert check(four, name, {"plan": plan, "guidance": rule})["plan"] == plan


@pytest.mark.parametrize(("name", "rule"), [("sd3", "mixed"), ("sdxl", "none"), ("sd15", "mixed")])
def test_four_ranks_with_the_other_rules(four, name, rule):
    check(four, name, {"plan": "FFFFFPPPFFPF", "guidance": rule})


@pytest.mark.parametrize(
    ("name", "fields"),
    [("deep sd3", {"plan": "FFPPSFFFPPF"}), ("sdxl", {"plan": "FFFFFPPPFFPF", "guidance": "reuse"})],
)
def test_eight_ranks_are_the_oracle(eight, name, fields):
    check(eight, name, fields)


@pytest.mark.parametrize("kinds", ["FPS", "FP"])
def test_adaptive_reaches_its_target_over_one_gpu(four, kinds):
    report = check(four, "sd3", {"speedup": 3.5, "kinds": kinds}, num_inference_steps=16)
    assert set(report["plan"]) > {"F"} and report["speedup_bound"] >= 3.5


def test_a_target_that_is_none_is_refused():
    for speedup, mend in ((2.5, "allow 2.86 to .* Raise it"), (9.0, "Lower it")):
        with pytest.raises(ValueError, match=rf"--hybrid_speedup.*{mend}"):
            simulated("sd3", {"speedup": speedup, "stages": 4})


@pytest.mark.parametrize("stages", [4, 8])
@pytest.mark.parametrize("name", ["deep sd3", "sdxl"])
def test_the_first_full_steps_are_exact(name, stages):
    two = simulated(name, {"policy": "cfg"}, num_inference_steps=4)[0]
    assert torch.equal(simulated(name, {"policy": "cfg", "stages": stages}, num_inference_steps=4)[0], two)
    two = simulated(name, {"policy": "cfg"}, num_inference_steps=5)[0]
    assert not torch.equal(simulated(name, {"policy": "cfg", "stages": stages}, num_inference_steps=5)[0], two)


def test_guidance_off_for_a_step():
    pipe = tiny.pipeline("sd3")
    arguments = dict(num_inference_steps=12, callback_on_step_end_tensor_inputs=SD3_TENSORS)
    found = simulated("sd3", {"plan": "FFFFPPFPFPFF", "stages": 4}, callback_on_step_end=off_for_a_step(8), **arguments)
    assert found[1]["plan"] == "FFFFPPFPFFFF"
    with oracle.inside(pipe, plan=found[1]["plan"], rule="deferred", cut=oracle.STAGE_CUTS["sd3", 4]):
        latents = tiny.call(pipe, "sd3", callback_on_step_end=off_for_a_step(8), **arguments)
    assert ((found[0] - latents).abs().max() / latents.abs().max()).item() < TOLERANCE


def test_steps_with_a_further_stream_are_evaluated_whole(four):
    """Skip-layer guidance on steps 2 and 3: four ranks have stages before, and again when the streams are two."""
    arguments = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.15, skip_layer_guidance_stop=0.4)
    fields = {"plan": "FFFFFFPPSF", "stages": 4}
    (latents, report), *others = four.run(called, "sd3", fields, arguments)
    alone, _ = simulated("sd3", fields, **arguments)
    assert report["plan"] == fields["plan"]
    assert all(torch.equal(found, alone) for found, _ in [(latents, report), *others])
    # Of eight steps the last three have stages again, and are among the first four that read nothing old.
    arguments["num_inference_steps"] = 8
    exact, _ = simulated("sd3", {"policy": "cfg"}, **arguments)
    assert torch.equal(simulated("sd3", {"policy": "cfg", "stages": 4}, **arguments)[0], exact)


# What is done and sent.


@pytest.mark.parametrize(("plan", "handed_over"), [("FFFFPPPFFPF", 2), ("FFFFFFFFFF", 0)])
@pytest.mark.parametrize(
    ("name", "prediction", "into"),
    [
        # Into stages 1, 2, 3 at age 1, and downwards into 0, 1, 2 at age 0.
        ("sd3", 16 * 16 * 16, [(64 + tiny.TOKENS) * 32] * 3 + [0] * 3),
        ("sdxl", 4 * 16 * 16, [32 * 4 * 4, 32 * 4 * 4, 16 * 8 * 8, 32 * 4 * 4, 16 * 8 * 8, 16 * 8 * 8]),
    ],
)
def test_bytes_sent_are_those_counted_by_hand(four, name, prediction, into, plan, handed_over):
    first, second, third, inner, middle, outer = (4 * numbers for numbers in into)
    full, pipelined = plan.count("F"), plan.count("P")
    # To three others; one header more when the first step has been learnt.
    common = 3 * (AGREEMENT + (full + 1) * HEADER + TRIAL[name])
    shared = 3 * 4 * prediction
    counts = [
        full * second + handed_over * first,  # FULL: stages 0 and 1; PIPELINED: 0
        full * (middle + shared) + handed_over * (third + middle),  # FULL: stages 2 and 3; PIPELINED: 2
        full * second + handed_over * (second + inner),  # FULL: stages 0 and 1; PIPELINED: 1
        full * (middle + shared) + handed_over * outer + pipelined * shared,  # FULL: stages 2 and 3; PIPELINED: 3
    ]
    for _, report in four.run(hybrid, name, {"plan": plan, "stages": 4}):
        assert report["bytes_sent"] == [common + count for count in counts]


def calls(plan):
    """How often each of SD3's blocks is evaluated on this rank."""
    pipe, counts, hooks = tiny.pipeline("sd3"), [0] * 4, []
    blocks = pipe.transformer.transformer_blocks
    apply_hybrid(pipe, HybridConfig(plan=plan, stages=4))
    steps = {"num_inference_steps": len(plan)}
    tiny.call(pipe, "sd3", **steps)  # the first run counts the FLOPs, and tries the stages, by evaluations of its own
    for i, block in enumerate(blocks):

        def hook(module, args, output, i=i):
            counts[i] += 1

        hooks.append(block.register_forward_hook(hook))
    try:
        tiny.call(pipe, "sd3", **steps)
    finally:
        remove_hybrid(pipe)
        for handle in hooks:
            handle.remove()
    return counts


def test_nothing_is_evaluated_twice(four):
    full, pipelined, handed_over = 7, 4, 2
    assert four.run(calls, "FFFFPPPFFPF") == [
        [full + handed_over, full, 0, 0],
        [0, 0, full + handed_over, full],
        [full, full + handed_over, 0, 0],
        [0, 0, full, full + pipelined],
    ]


@pytest.mark.parametrize("plan", ["F" * 10, "FFFPPPSFFF"])
def test_bound_and_grid(plan):
    plan = Plan.parse(plan)
    waits, half = 4, 2
    forwards = waits + (plan.count("F") - waits) / half + plan.count("P") / (2 * half)
    assert plan.speedup_bound(4) == pytest.approx(20 / forwards)
    assert Plan.from_grid(plan.grid(4)) == plan
    works = {"F": ["uncond", "uncond", "cond", "cond"], "S": ["-"] * 4}
    for row, after in zip(plan.rows(4), [*plan[1:], None], strict=True):
        pipelined = ["stage0", "stage2", "stage1", "stage3"] if after == "P" else ["-", "-", "-", "stage3"]
        assert list(row.work) == works.get(row.kind.value, pipelined)


def test_report_files(tmp_path):
    simulated("sd3", {"plan": "FFFFFPPFPF", "stages": 4, "report": tmp_path})
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png"}


def blocking(name, fields):
    """(latents, seconds that a send to a late receiver took), where each transfer is waited for at once."""
    dist.barrier()  # else a rank that starts late finds the other one waiting
    start = time.monotonic()
    if dist.get_rank() == 0:
        Comm().send(torch.zeros(1), 1).wait()
    elif dist.get_rank() == 1:
        time.sleep(0.7)  # a rank may leave the barrier a little later than the other
        Comm().receive(torch.empty(1), 0)
    seconds = time.monotonic() - start
    with waiting_at_once():
        return hybrid(name, fields)[0], seconds


@pytest.mark.parametrize("plan", ["FFFFFPPPFFPF", "FPPPSFFFFSPP"])
@pytest.mark.parametrize("name", ["deep sd3", "sdxl"])
def test_nothing_waits_in_a_circle(eight, name, plan):
    fields = {"plan": plan, "stages": 8}
    outcomes = eight.run(blocking, name, fields, timeout=120)
    assert outcomes[0][1] > 0.4
    alone, _ = simulated(name, fields)
    assert all(torch.equal(latents, alone) for latents, _ in outcomes)


@pytest.mark.parametrize("plan", ["FFFPPPFFPF", "FPPPSFFSPP"])
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_nothing_waits_in_a_circle_with_two_stages(pair, name, plan):
    outcomes = pair.run(blocking, name, {"plan": plan}, timeout=120)
    assert outcomes[0][1] > 0.4
    alone, _ = simulated(name, {"plan": plan})
    assert all(torch.equal(latents, alone) for latents, _ in outcomes)


# Where the cuts lie.


@pytest.mark.parametrize(("name", "stages"), oracle.STAGE_CUTS)
def test_the_tiny_denoisers_are_cut_where_the_oracle_cuts_them(name, stages):
    pipe = tiny.pipeline(name)
    anatomy = read(pipe.transformer if "sd3" in name else pipe.unet)
    asked = call(anatomy.denoiser, inputs(anatomy.denoiser))
    segments = anatomy.partition(asked, stages).segments
    units, cuts = anatomy.names(asked), oracle.STAGE_CUTS[name, stages]
    if "sd3" in name:
        assert [segment.start for segment in segments[1:]] == cuts
        assert [(segment.stage, segment.age) for segment in segments] == [(k, int(k > 0)) for k in range(stages)]
        return
    assert [(s.stage, s.age) for s in segments] == [
        *((stage, 0) for stage in reversed(range(stages))),
        *((stage, 1) for stage in range(1, stages)),
    ]
    nested = zip(reversed(segments[1:stages]), segments[stages - 1 :], strict=False)
    assert [(units[down.start], units[up.stop - 1]) for down, up in nested] == cuts


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_no_other_cuts_are_better_balanced(name, stages):
    """Every way to nest the regions, for costs at random."""
    pipe = tiny.pipeline(name)
    anatomy = read(pipe.transformer if name == "sd3" else pipe.unet)
    counted = anatomy.counted(call(anatomy.denoiser, inputs(anatomy.denoiser)))
    regions, shapes = list(anatomy._regions(counted)), counted.shapes
    whole = (0, len(shapes))

    def size(nest):
        return sum(shape.numel() for region in nest for end in region if end for shape, _ in shapes[end - 1])

    for seed in range(3):
        costs = random.Random(seed).choices(range(1, 9), k=len(shapes))

        def largest(nest, costs=costs):
            totals = [sum(costs[start:stop]) for start, stop in (*nest, whole)]
            return max(after - before for before, after in itertools.pairwise([0, *totals]))

        nests = [[region] for region in regions]
        for _ in range(stages - 2):
            nests = [
                [*nest, region]
                for nest in nests
                for region in regions
                if region.stop > nest[-1].stop and (region.start < nest[-1].start or region.start == 0)
            ]
        best = min((largest(nest), size(nest)) for nest in nests)
        *found, last = anatomy.nest(counted, stages, costs, None)
        assert last == whole
        assert (largest(found), size(found)) == best


# What goes wrong is one error on every rank.


def fails(name, fields, **kwargs):
    try:
        hybrid(name, fields, **kwargs)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def test_too_shallow_a_denoiser(eight):
    for message in eight.run(fails, "sd3", {"policy": "cfg", "stages": 8}):
        assert "stages=8 (--hybrid_stages)" in message and "too shallow" in message


@pytest.mark.parametrize("fields", [{"stages": 2, "plan": "FFPF"}, {"stages": 6, "policy": "cfg"}])
def test_stages_that_are_not_the_ranks(four, fields):
    for message in four.run(fails, "sdxl", fields):
        assert f"--hybrid_stages {fields['stages']}" in message and "the group has 4" in message


def drifting(name, fields, who, after):
    def drift(pipe, step, timestep, tensors):
        # One rank lags behind: the others end the run, and drop the pipeline, before it has received what they sent.
        time.sleep(0.5 * (step > 6 and dist.get_rank() == 1))
        return {"latents": tensors["latents"] + (0.1 if step == after and dist.get_rank() == who else 0)}

    return fails(name, fields, callback_on_step_end=drift)


@pytest.mark.parametrize(("who", "after", "found"), [(0, 3, 4), (1, 5, 7), (2, 5, 7), (3, 8, 9)])
def test_ranks_that_drift_apart(four, who, after, found):
    for message in four.run(drifting, "sd3", {"plan": "FFFFFPPFPF", "stages": 4}, who, after):
        assert f"at step {found} the ranks' latents are no longer the same" in message


def leaving(plan, who, after):
    """(error of a call in which one rank's callback raises, latents of a call after it, of one before it)."""
    pipe = tiny.pipeline("sd3")
    apply_hybrid(pipe, HybridConfig(plan=plan, stages=4, balance="flops"))

    def callback(pipe, step, timestep, tensors):
        if step == after and dist.get_rank() == who:
            raise InterruptedError("by the user")
        return {}

    expected, found = tiny.call(pipe, "sd3"), "none"
    try:
        tiny.call(pipe, "sd3", callback_on_step_end=callback)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, tiny.call(pipe, "sd3"), expected


@pytest.mark.parametrize(
    ("plan", "who", "after"), [("F" * 10, 1, 2), ("FFFFFPPFPF", 3, 4), ("FFFFFPFSPF", 0, 6), ("FFFFFSFSFS", 2, 8)]
)
def test_a_rank_that_leaves_ends_the_run_on_all(four, plan, who, after):
    for rank, (error, latents, expected) in enumerate(four.run(leaving, plan, who, after)):
        assert error == "InterruptedError: by the user" if rank == who else f"rank {who} left the run" in error
        assert torch.equal(latents, expected)
