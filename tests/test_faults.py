"""What goes wrong is one clear error on every rank, in seconds.

All cases share their ranks, but those in which a rank dies. A case has pipelines of its own.
"""

import itertools
import os
import time

import pytest
import test_seam
import tiny
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, PNDMScheduler
from ranks import Ranks, device
from torch._subclasses.fake_tensor import FakeTensor

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report

PLAN = "FFFPPPFPFF"


@pytest.fixture(scope="module")
def trio():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def own(name):
    """A pipeline of this case alone, on this rank."""
    pipe = tiny.PIPELINES[name]().to(device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Evaluations:
    """Counts a denoiser's evaluations on this rank."""

    def __init__(self, pipe) -> None:
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        module = denoiser.pos_embed if hasattr(denoiser, "pos_embed") else denoiser.conv_in
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *_) -> None:
        self.count += 1


def caught(pipe, name, *, fields=None, **kwargs):
    """(kind of error, message, evaluations before it, seconds) of a call."""
    apply_hybrid(pipe, HybridConfig(balance="flops", **(fields or {"plan": PLAN})))
    evaluations, started, found = Evaluations(pipe), time.monotonic(), (None, "no error")
    try:
        tiny.call(pipe, name, **kwargs)
    except Exception as error:
        found = type(error).__name__, str(error)
    return *found, evaluations.count, time.monotonic() - started


# The ranks differ before the first step.


def differ(what):
    """A call in which rank 1 has something else than rank 0."""
    rank, name, kwargs = dist.get_rank(), "sdxl" if what == "scheduler" else "sd3", {}
    pipe = own(name)
    if what == "noise":
        kwargs = dict(seed=rank)
    elif what == "prompts":
        kwargs = tiny.prompt(name, seed=rank)
    elif what == "negative prompts":
        kwargs = {k: v for k, v in tiny.prompt(name, seed=5 + rank).items() if k.startswith("negative_prompt")}
    elif what == "number of prompts":
        kwargs = dict(count=1 + rank)
    elif what == "resolution":
        kwargs = dict(height=32 + 16 * rank)
    elif what == "steps":
        kwargs = dict(num_inference_steps=10 + rank)
    elif what == "guidance":
        kwargs = dict(guidance_scale=1.0 if rank else 5.0)
    elif what == "guidance scale":
        kwargs = dict(guidance_scale=4.0 if rank else 5.0)
    elif what == "plan":
        kwargs = dict(fields={"plan": "FPFFFFFFFF" if rank else PLAN})
    elif what == "dtype" and rank:
        pipe.to(torch.bfloat16)
        kwargs = {key: value.bfloat16() for key, value in tiny.prompt(name).items()}
    elif what == "weights" and rank:
        pipe.transformer.proj_out.bias.data += 0.1
    elif what == "scheduler" and rank:
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    elif what == "prediction type of the scheduler" and rank:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return caught(pipe, name, **kwargs)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("noise", "initial noise (give every rank a generator with the same seed: --seed)"),
        ("prompts", "prompts (--prompt, --negative_prompt)"),
        ("negative prompts", "prompts (--prompt, --negative_prompt)"),
        ("number of prompts", "number of prompts, pictures, or the resolution"),
        ("resolution", "number of prompts, pictures, or the resolution"),
        ("steps", "number of steps (--num_inference_steps)"),
        ("guidance", "guidance (--guidance_scale)"),
        ("guidance scale", "guidance (--guidance_scale)"),
        ("plan", "strategy (--hybrid_* flags)"),
        ("dtype", "dtypes"),
        ("weights", "model weights or adapters (--model)"),
        ("scheduler", "scheduler"),
    ],
)
def test_ranks_that_differ_are_told_in_what_before_the_first_step(pair, what, says):
    for kind, message, evaluations, seconds in pair.run(differ, what):
        assert kind == "RuntimeError"
        assert says in message.removeprefix("hybrid-cond: the ranks started with different ").split(".")[0].split("; ")
        assert "same arguments" in message
        assert evaluations == 0
        assert seconds < 30


def differ_then_agree():
    pipe = own("sd3")
    first = caught(pipe, "sd3", seed=dist.get_rank())
    return first[0], tiny.call(pipe, "sd3")


def test_a_call_after_such_an_error_is_right(pair):
    (kind, first), (_, second) = pair.run(differ_then_agree)
    assert kind == "RuntimeError"
    assert torch.equal(first, second)


def leaves_before_the_first_step(what):
    """(error, seconds, latents of a call after it, of one before it). Rank 1 asks for what the pipeline refuses."""
    pipe = own("sd3")
    apply_hybrid(pipe, HybridConfig(balance="flops", plan=PLAN))
    expected = tiny.call(pipe, "sd3")
    wrong = {"check": {"height": 33}, "noise": {"generator": [torch.Generator()] * 3}}[what]
    started = time.monotonic()
    try:
        tiny.call(pipe, "sd3", **(wrong if dist.get_rank() else {}))
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.monotonic() - started, tiny.call(pipe, "sd3"), expected


@pytest.mark.parametrize("what", ["check", "noise"])
def test_an_error_of_one_rank_before_the_first_step_ends_the_other_too(pair, what):
    outcomes = pair.run(leaves_before_the_first_step, what)
    assert "another rank ended its call with an error before the first step" in outcomes[0][0]
    assert outcomes[1][0].startswith("ValueError: ")
    for _, seconds, after, expected in outcomes:
        assert seconds < 30
        assert torch.equal(after, expected)


# The ranks part during the run.


def drift(step, fields):
    """Rank 1 alone changes its latents after a step; then a call in which it does not."""

    def callback(pipe, i, timestep, tensors):
        return {"latents": tensors["latents"] * 1.001} if i == step and dist.get_rank() == 1 else {}

    pipe = own("sd3")
    found = caught(pipe, "sd3", fields=fields, callback_on_step_end=callback)
    return *found, tiny.call(pipe, "sd3").cpu()


@pytest.mark.parametrize(
    ("step", "fields", "noticed"),
    [
        (1, {"policy": "cfg"}, 2),
        (1, {"plan": PLAN}, 2),
        (3, {"plan": PLAN}, 6),  # FULL again
        (6, {"plan": PLAN}, 8),
        (8, {"plan": PLAN}, 9),  # the last step
        (3, {"policy": "paper", "interval": 3, "tau_cap": 3}, 6),
        (3, {"plan": PLAN, "guidance": "reuse"}, 6),
        (3, {"plan": "FFFSSSFPFF"}, 6),
        (4, {"plan": "FFFPSSSPFF"}, 8),
        (1, {"speedup": 2.2}, 2),
    ],
    ids=str,
)
def test_drift_is_found_at_the_next_full_step(pair, step, fields, noticed):
    outcomes = pair.run(drift, step, fields)
    for kind, message, *_ in outcomes:
        assert kind == "RunOver"
        assert f"at step {noticed} the ranks' latents are no longer the same" in message
        assert "seed" in message
    assert torch.equal(outcomes[0][-1], outcomes[1][-1])


# A rank dies, or leaves the run.


def die(rank, step, how, pipe=None):
    def callback(pipe, i, timestep, tensors):
        if i == step and dist.get_rank() == rank:
            if how == "dies":
                os._exit(3)
            if how == "raises":
                raise FileNotFoundError("something of its own")
            pipe._interrupt = True
        return {}

    return caught(pipe or own("sd3"), "sd3", callback_on_step_end=callback)


def leaves(rank, step, how):
    """(what `die` came to, latents of a call after it, of one before it)"""
    pipe = own("sd3")
    apply_hybrid(pipe, HybridConfig(balance="flops", plan=PLAN))
    expected = tiny.call(pipe, "sd3")
    return die(rank, step, how, pipe), tiny.call(pipe, "sd3"), expected


@pytest.mark.parametrize(("rank", "step"), [(0, 1), (0, 4), (1, 1), (1, 4)])
def test_a_rank_that_dies_ends_the_other_with_its_number(rank, step):
    ranks = Ranks(2, group_timeout=4)
    try:
        outcomes = ranks.outcomes(die, rank, step, "dies")
    finally:
        ranks.close()
    kind, message, _, seconds = outcomes[1 - rank].value
    assert kind == "RuntimeError" and seconds < 30
    assert f"rank {rank} did not answer rank {1 - rank}" in message
    assert outcomes[rank].error == "ProcessDied: with exit code 3"


@pytest.mark.parametrize("how", ["raises", "is interrupted"])
@pytest.mark.parametrize(("rank", "step"), [(0, 0), (0, 1), (0, 2), (0, 4), (1, 2), (1, 5), (1, 8)])
def test_a_rank_that_leaves_tells_the_other(pair, rank, step, how):
    """At their next exchange, and not by a time-out. The ranks can go on with another call."""
    outcomes = pair.run(leaves, rank, step, how)
    kind, message, *_ = outcomes[1 - rank][0]
    assert kind == "RunOver" and f"rank {rank} left the run before step" in message
    kind, message, *_ = outcomes[rank][0]
    if how == "raises":
        assert (kind, message) == ("FileNotFoundError", "something of its own")
    else:
        assert kind == "RuntimeError" and "this rank left the run after step" in message and "interrupted" in message
    for (*_, seconds), after, expected in outcomes:
        assert seconds < 30
        assert torch.equal(after, expected)


def fails(name, number, fields):
    """(error, seconds, latents of a call after it) of a call in which rank 1's denoiser fails at an evaluation."""
    pipe, run = test_seam.build(name)
    apply_hybrid(pipe, HybridConfig(**fields))
    numbers = itertools.count(1)

    def fail(module, args, kwargs):
        if not isinstance(kwargs["hidden_states"], FakeTensor) and next(numbers) == number and dist.get_rank() == 1:
            raise MemoryError("of its own")

    pipe.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    started, error = time.monotonic(), None
    try:
        run()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return error, time.monotonic() - started, run()


#: (Case of `test_seam`, configuration, evaluations at which a rank fails.) Those are of the first step, whose calls
#: are learnt, of the trial of the stages, of FULL and of PIPELINED steps, the last one among them, and of calls that a
#: step has beside what was foretold.
FAILURES = [
    ("wan21-euler", {"policy": "cfg"}, (1, 2, 3, 9)),
    ("wan21-euler", {"plan": "FFPPPFPF", "balance": "flops"}, (2, 4, 7, 8, 11)),
    ("sd3 skip layers", {"policy": "cfg"}, (2, 3)),
    ("sd3 skip layers", {"plan": "FFPPPFPF", "balance": "flops"}, (1, 7, 12, 13)),
    ("kandinsky5 off and on", {}, (6, 8, 9)),
]


@pytest.mark.parametrize(("name", "fields", "numbers"), FAILURES, ids=str)
def test_a_rank_whose_denoiser_fails_tells_the_other(pair, name, fields, numbers):
    for number in numbers:
        check_failure(pair.run(fails, name, number, fields))


def test_a_rank_whose_stage_fails_tells_the_other_three():
    ranks = Ranks(4)
    try:
        for number in (2, 8, 9, 11, 16):
            check_failure(ranks.run(fails, "sd3 skip layers", number, {"policy": "cfg", "stages": 4}))
    finally:
        ranks.close()


def check_failure(outcomes):
    """Rank 1's own error, the others' of it, in seconds; and then a call of all."""
    for rank, (error, seconds, after) in enumerate(outcomes):
        if rank == 1:
            assert error == "MemoryError: of its own"
        else:
            assert "rank 1 left the run before step" in error or "rank 1 failed while the stages" in error
        assert seconds < 30
        assert all(map(torch.equal, after, outcomes[0][2]))


# What does not fit.


def refused(fields):
    pipe = own("sd3")
    try:
        apply_hybrid(pipe, HybridConfig(**fields))
        tiny.call(pipe, "sd3")
    except ValueError as error:
        return str(error)
    return "no error"


def taken(fields):
    pipe = own("sd3")
    plain = tiny.call(pipe, "sd3")
    apply_hybrid(pipe, HybridConfig(**fields))
    return tiny.call(pipe, "sd3"), plain


@pytest.mark.parametrize("fields", [{"plan": PLAN}, {"kinds": "FPS"}, {"policy": "paper"}], ids=str)
def test_three_ranks_are_refused_where_steps_are_pipelined(trio, fields):
    for message in trio.run(refused, fields):
        assert "--hybrid_stages 2 (HybridConfig.stages) runs on 2 ranks, but the group has 3" in message
        assert "--nproc_per_node 2" in message


def test_three_ranks_are_taken_where_nothing_is(trio):
    """The third has no stream of its own."""
    (first, plain), *others = trio.run(taken, {"policy": "cfg"})
    assert all(torch.equal(latents, first) for latents, _ in others)
    assert (first - plain).abs().max() < 1e-5 * plain.abs().max()


def does_not_fit(name, fields, steps):
    return caught(own(name), name, fields=fields, num_inference_steps=steps)


@pytest.mark.parametrize(
    ("fields", "steps", "flags"),
    [
        ({"policy": "paper"}, 2, ("--hybrid_tau_cap", "--hybrid_interval", "--num_inference_steps")),
        ({"policy": "paper", "interval": 7}, 10, ("--hybrid_tau_cap", "--hybrid_interval", "--num_inference_steps")),
        ({"plan": PLAN}, 9, ("--hybrid_plan", "10 letters", "9 steps")),
        ({"plan": "2-12/2"}, 10, ("--hybrid_plan", "END is 12", "10 steps")),
        ({"plan": "2-12/2S"}, 10, ("--hybrid_plan", "END is 12", "10 steps")),
        ({"speedup": 5.0}, 6, ("--hybrid_speedup", "--num_inference_steps", "6 steps")),
        ({"speedup": 4.5, "kinds": "FP"}, 10, ("--hybrid_speedup", "--num_inference_steps", "10 steps")),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_the_run(pair, fields, steps, flags):
    for kind, message, evaluations, _ in pair.run(does_not_fit, "sd3", fields, steps):
        assert kind == "ValueError"
        assert all(flag in message for flag in flags)
        assert evaluations == 0


def not_linear(fields, flag):
    pipe = own("sdxl")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **{flag: True})
    return caught(pipe, "sdxl", fields=fields)


@pytest.mark.parametrize("fields", [{}, {"plan": PLAN}], ids=str)
@pytest.mark.parametrize("flag", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused_where_its_gains_are_needed(pair, fields, flag):
    for kind, message, evaluations, _ in pair.run(not_linear, fields or {"policy": "adaptive"}, flag):
        assert kind == "ValueError"
        assert all(words in message for words in ("DDIMScheduler", flag, f"{flag}=False", "--hybrid_guidance reuse"))
        assert evaluations == 0


@pytest.mark.parametrize("fields", [{"plan": PLAN, "guidance": "reuse"}, {"policy": "cfg"}], ids=str)
def test_a_scheduler_that_clips_is_taken_where_they_are_not(pair, fields):
    for kind, *_ in pair.run(not_linear, fields, "clip_sample"):
        assert kind is None


def test_processes_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_process_group"):
        apply_hybrid(tiny.pipeline("sd3"), HybridConfig())


class Pipe:
    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_denoiser_that_is_not_understood_is_refused_where_it_is_split(part):
    pipe = Pipe(scheduler=DDIMScheduler(), **{part: torch.nn.Linear(2, 2)})
    before = dict(vars(pipe))
    with pytest.raises(ValueError, match=r"structure of Linear.*--hybrid_kinds FS"):
        apply_hybrid(pipe, HybridConfig(plan=PLAN), simulate=True)
    assert vars(pipe) == before and type(pipe) is Pipe
    assert last_report(pipe) is None


@pytest.mark.parametrize(
    "parts", [{"unet": torch.nn.Linear(2, 2)}, {"prior": None, "scheduler": DDIMScheduler()}], ids=["no scheduler", ""]
)
def test_a_pipeline_without_scheduler_or_denoiser_is_refused(parts):
    with pytest.raises(ValueError, match="needs a pipeline with a scheduler of diffusers' and a denoiser"):
        apply_hybrid(Pipe(**parts), HybridConfig())
