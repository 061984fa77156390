"""Stages of models of many classes, all lists of blocks: the ranks, and one process that plays them, are the oracle.

Two calls a step and one batch, [uncond, cond] and [cond, uncond], texts of one length and of two, double and single
blocks, lists of samples, a forward that reads values on the host, and two predictions (video and audio).
"""

import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import cut_oracle
import pytest
import torch
import torch.distributed as dist
import zoo_batched
import zoo_successive
from ranks import Ranks

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

pytestmark = pytest.mark.usefixtures("one_thread")

#: PIPELINED after FULL, PIPELINED and SKIPPED; the first from the third step on, when every pipeline's calls are known.
PLAN = "FFPPFPSPFF"
DEEP_PLAN = "FFFFFPPFFPSF"
TOLERANCE = 1e-5  # of the largest latent


class Case(NamedTuple):
    zoo: ModuleType
    name: str
    depth: dict[str, int]
    #: Blocks that end the stages but the last, by the number of stages.
    cuts: dict[int, list[str]]
    cond: int
    #: Of plain guidance, for the rule ``deferred``.
    w: float = 0.0
    changes: dict = {}


def blocks(name: str, *numbers: int) -> list[str]:
    return [f"{name}.{number}" for number in numbers]


FOUR = {2: blocks("transformer_blocks", 1), 4: blocks("transformer_blocks", 0, 1, 2)}
TWICE = blocks("transformer_blocks", 0, 1)
LAYERS = {"num_layers": 4}
LISTS = {"num_layers": 2, "num_single_layers": 2}
TWO_LISTS = {2: TWICE[1:], 4: [*TWICE, "single_transformer_blocks.0"]}
CASES = {
    "wan": Case(zoo_successive, "wan21-unipc", LAYERS, {2: ["blocks.1"], 4: blocks("blocks", 0, 1, 2)}, cond=0),
    # Blocks read hints that others have made before all of them: these are evaluated by both stages.
    "wan-vace": Case(*(zoo_successive, "wan21-vace", {**LAYERS, "vace_layers": [0, 2, 3]}, {2: ["blocks.1"]}), cond=0),
    "qwen": Case(zoo_successive, "qwen", LAYERS, FOUR, cond=0),
    "flux": Case(zoo_successive, "flux-true-cfg", LISTS, TWO_LISTS, cond=0, w=4.0),
    "hunyuan-video": Case(zoo_successive, "hunyuan-video", LISTS, TWO_LISTS, cond=0),
    "hunyuan-video15": Case(zoo_successive, "hunyuan-video15", LAYERS, FOUR, cond=0),
    "z-image": Case(
        *(zoo_batched, "z-image", {"n_layers": 7}, {2: ["layers.2"], 4: blocks("layers", 0, 2, 4)}), cond=0
    ),
    "cogvideox": Case(zoo_batched, "cogvideox", LAYERS, FOUR, cond=1),
    "pixart": Case(zoo_batched, "pixart", LAYERS, FOUR, cond=1),
    "sd3": Case(zoo_batched, "sd3 img2img", LAYERS, FOUR, cond=1, w=5.0, changes={"strength": 1.0}),
    "ltx2": Case(
        *(zoo_batched, "ltx2", LAYERS, FOUR),
        cond=1,
        # Without the two further streams of its guidance.
        changes={"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0},
    ),
}


@cache
def pipeline(name):
    """With as many blocks as four stages need."""
    case = CASES[name]
    pipe = case.zoo.CASES[case.name].build()
    kind, config = type(pipe.transformer), dict(pipe.transformer.config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    pipe.transformer = zoo_successive._model(kind, **{**config, **case.depth})
    return pipe


def call(name, steps, **changes):
    case = CASES[name]
    return case.zoo.call(pipeline(name), case.name, num_inference_steps=steps, **{**case.changes, **changes})


def hybrid(name, fields, **how):
    """(latents, report) on this rank."""
    pipe = apply_hybrid(pipeline(name), HybridConfig(**fields), **how)
    try:
        return call(name, len(fields["plan"])), last_report(pipe)
    finally:
        remove_hybrid(pipe)


def expected(name, stages, plan, rule):
    case = CASES[name]
    is_batched = case.zoo is zoo_batched
    settings = dict(cuts=case.cuts[stages], cond=case.cond, w=case.w, is_batched=is_batched)
    pipe = pipeline(name)
    with cut_oracle.inside(pipe.transformer, pipe.scheduler, plan=plan, rule=rule, **settings):
        return call(name, len(plan))


def difference(found, wanted):
    """The largest, over what it is a difference of; of several predictions the largest."""
    pairs = zip(*((value,) if isinstance(value, torch.Tensor) else value for value in (found, wanted)), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def same(found, other):
    return difference(found, other) == 0


def check(name, stages, plan, rule, ranks=None):
    fields = {"plan": plan, "guidance": rule, "stages": stages}
    alone, report = hybrid(name, fields, simulate=True)
    assert report["plan"] == plan
    for latents, found in ranks.run(hybrid, name, fields) if ranks else ():
        assert same(latents, alone) and found["plan"] == plan
    assert difference(alone, expected(name, stages, plan, rule)) < TOLERANCE
    assert difference(alone, expected(name, stages, "F" * len(plan), rule)) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("name", CASES)
def test_two_stages_are_the_oracle(pair, name):
    check(name, 2, PLAN, "reuse", pair)


# Texts of two lengths cannot be in one evaluation: qwen and z-image are not among them.
@pytest.mark.parametrize("name", sorted(set(CASES) - {"qwen", "z-image"}))
def test_the_published_rule(name):
    check(name, 2, PLAN.replace("S", "F"), "mixed")


@pytest.mark.parametrize(("stages", "plan"), [(2, PLAN), (4, DEEP_PLAN)])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_estimates_and_the_straight_line_of_boundaries(name, stages, plan):
    check(name, stages, plan, "deferred")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 4 in case.cuts])
def test_four_stages_are_the_oracle(four, name):
    check(name, 4, DEEP_PLAN, "reuse", four)


def test_a_run_over_two_denoisers():
    """Wan 2.2 has another from the fifth step on: all begins anew with it."""
    pipe = zoo_successive.CASES["wan22"].build()
    apply_hybrid(pipe, HybridConfig(plan="FFPPPFPF", guidance="reuse"), simulate=True)
    found = zoo_successive.call(pipe, "wan22")
    assert last_report(pipe)["plan"] == "FFPPFFPF"
    remove_hybrid(pipe)
    how = dict(rule="reuse", cuts=["blocks.0"], cond=0)
    high = cut_oracle.inside(pipe.transformer, pipe.scheduler, plan="FFPP", **how)
    low = cut_oracle.inside(pipe.transformer_2, pipe.scheduler, plan="FFPF", **how)
    with high as first, low as second:
        wanted = zoo_successive.call(pipe, "wan22")
    assert (first.steps, second.steps) == (4, 4) and difference(found, wanted) < TOLERANCE


def leaving(stages, who, after):
    """(error of a call in which one rank's callback raises, latents of a call after it, of one before it)."""
    plan = DEEP_PLAN if stages == 4 else PLAN

    def callback(pipe, step, timestep, tensors):
        if step == after and dist.get_rank() == who:
            raise InterruptedError("by the user")
        return {}

    pipe = apply_hybrid(pipeline("wan"), HybridConfig(plan=plan, guidance="reuse", stages=stages))
    try:
        before, found = call("wan", len(plan)), "none"
        try:
            call("wan", len(plan), callback_on_step_end=callback)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        return found, call("wan", len(plan)), before
    finally:
        remove_hybrid(pipe)


@pytest.mark.parametrize(("who", "after"), [(0, 0), (1, 2), (0, 5)])
def test_a_rank_that_leaves_ends_a_run_of_two_calls_a_step(pair, who, after):
    has_left(pair.run(leaving, 2, who, after), who)


@pytest.mark.parametrize(("who", "after"), [(0, 0), (3, 6)])
def test_a_rank_that_leaves_ends_it_with_four_stages(four, who, after):
    has_left(four.run(leaving, 4, who, after), who)


def has_left(outcomes, who):
    for rank, (error, after, before) in enumerate(outcomes):
        assert error == "InterruptedError: by the user" if rank == who else f"rank {who} left the run" in error
        assert difference(after, before) < TOLERANCE  # the call before it had to learn the calls of a step


# The published policy.


def paper(name, caplog, **fields):
    """(latents, report, warnings) of a run of 20 steps."""
    pipe = apply_hybrid(pipeline(name), HybridConfig(policy="paper", **fields), simulate=True)
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING, "hybridiff_xdit"):
            return call(name, 20), last_report(pipe), [record.message for record in caplog.records]
    finally:
        remove_hybrid(pipe)


@pytest.mark.parametrize(
    ("name", "rule"), [("wan", "mixed"), ("ltx2", "mixed"), ("qwen", "reuse"), ("z-image", "none")]
)
def test_the_published_policy(caplog, name, rule):
    """One window of k = 5 steps of 50, which begins where the discrepancy is flat, or at the latest step for that."""
    latents, report, warnings = paper(name, caplog, guidance=rule)
    plan, tau_1 = report["plan"], report["tau_1"]
    assert plan == "F" * tau_1 + "PP" + "F" * (18 - tau_1) and not warnings
    assert difference(latents, expected(name, 2, plan, rule)) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen", "z-image"])
def test_texts_of_two_lengths_are_not_mixed(caplog, name):
    latents, report, warnings = paper(name, caplog)
    assert report["plan"] == "F" * 20 and report["config"]["guidance"] == "mixed"
    assert len(warnings) == 1 and "texts of different lengths" in warnings[0] and "--hybrid_guidance" in warnings[0]
    assert same(latents, hybrid(name, {"plan": "F" * 20}, simulate=True)[0])


# What cannot be split.


def refused(name, caplog, plan=PLAN):
    """The one warning of a run whose PIPELINED steps are FULL."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hybridiff_xdit"):
        latents, report = hybrid(name, {"plan": plan, "guidance": "reuse"}, simulate=True)
    assert report["plan"] == plan.replace("P", "F")
    assert same(latents, hybrid(name, {"plan": report["plan"], "guidance": "reuse"}, simulate=True)[0])
    (warning,) = [record.message for record in caplog.records]
    return warning


def test_blocks_that_share_state_are_not_split(monkeypatch, caplog):
    """The trial finds what no boundary shows: a block that reads what another one has left in a place of its own."""
    blocks = pipeline("pixart").transformer.transformer_blocks
    first, last = blocks[0].forward, blocks[3].forward

    def leave(hidden, *args, **kwargs):
        blocks.left = hidden.mean()
        return first(hidden, *args, **kwargs)

    def take(hidden, *args, **kwargs):
        return last(hidden + blocks.left, *args, **kwargs)

    monkeypatch.setattr(blocks[0], "forward", leave)
    monkeypatch.setattr(blocks[3], "forward", take)
    assert "do not give bit for bit" in refused("pixart", caplog)


def test_lengths_that_only_a_masks_values_tell_are_not_split(monkeypatch, caplog):
    """Lumina2 takes as many tokens of a text as its mask has: the arguments are of one shape, the boundaries of two."""
    monkeypatch.setitem(CASES, "lumina2", Case(zoo_successive, "lumina2", LAYERS, {}, cond=0))
    assert "the values of its masks" in refused("lumina2", caplog)


def test_a_step_before_the_calls_are_known_is_full(caplog):
    assert "from the second step on" in refused("wan", caplog, "FPFFFFFFFF")
