"""One process that plays both ranks: the adaptive policy and the rule ``deferred`` on what users do with a pipeline.

That the ranks give the same is test_parity's; here each run's own plan goes through the oracle.
"""

import functools
import itertools

import oracle
import pytest
import test_features
import tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

pytestmark = pytest.mark.usefixtures("one_thread")


def simulated(pipe, name, fields, **kwargs):
    """(output, report)"""
    apply_hybrid(pipe, HybridConfig(**fields), simulate=True)
    try:
        return tiny.call(pipe, name, **kwargs), last_report(pipe)
    finally:
        remove_hybrid(pipe)


def check(pipe, name, fields, sampler=oracle.closed_form, tolerance=1e-5, **kwargs):
    """The run is the oracle's for the plan that the report names; returns that."""
    found, report = simulated(pipe, name, fields, **kwargs)
    rule = report["config"]["guidance"]
    with oracle.inside(pipe, plan=report["plan"], rule=rule, cut=oracle.CUTS[name], sampler=sampler):
        expected = tiny.call(pipe, name, **kwargs)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance
    assert set(report["plan"]) > {"F"}
    return report["plan"]


@pytest.mark.parametrize(
    ("name", "fields"), [("sd3", {"policy": "cfg"}), ("sdxl", {"plan": "FFSPFFPPSF"}), ("sd15", {"policy": "cfg"})]
)
def test_one_process_is_the_two_ranks_bit_for_bit(pair, name, fields):
    alone = simulated(tiny.pipeline(name), name, fields)[0]
    assert all(torch.equal(found, alone) for found in pair.run(on_rank, name, fields))


def on_rank(name, fields):
    pipe = apply_hybrid(tiny.pipeline(name), HybridConfig(**fields))
    try:
        return tiny.call(pipe, name)
    finally:
        remove_hybrid(pipe)


CALLS = {
    "strong guidance": ("sd3", dict(guidance_scale=15.0)),
    "weak guidance": ("sdxl", dict(guidance_scale=1.2)),
    "changing guidance": ("sd15", dict(callback_on_step_end=test_features.guidance_changes)),
    "several prompts": ("sdxl", dict(count=3)),
    "guidance_rescale": ("sd15", dict(guidance_rescale=0.7)),
    "negative prompt": ("sd15", dict(negative_prompt_embeds=test_features.ANOTHER)),
}


@pytest.mark.parametrize(("case", "kinds"), list(zip(CALLS, itertools.cycle(["FP", "FS"]), strict=False)))
def test_arguments_of_a_call(case, kinds):
    name, kwargs = CALLS[case]
    check(tiny.pipeline(name), name, {"speedup": 2.2, "kinds": kinds}, num_inference_steps=12, **kwargs)


@pytest.mark.parametrize("case", ["sd3 img2img", "sdxl inpaint", "sd15 img2img"])
def test_image_to_image_and_inpainting(case):
    name, kind = test_features.RELATIVES[case]
    pipe = kind.from_pipe(tiny.pipeline(name))
    pipe.set_progress_bar_config(disable=True)
    image, mask = test_features.picture(1), test_features.picture(2)[:, :1].round()
    plan = check(*(pipe, name, {"speedup": 2.3}), image=image, mask_image=mask, strength=0.5, num_inference_steps=20)
    assert len(plan) == 10


SCHEDULERS = {
    "Heun, sd3": ("sd3", FlowMatchHeunDiscreteScheduler, {}),
    "Heun, sd15": ("sd15", HeunDiscreteScheduler, {}),
    "2M": ("sdxl", DPMSolverMultistepScheduler, {}),
    "2M, sd3": ("sd3", DPMSolverMultistepScheduler, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    "ancestral": ("sdxl", EulerAncestralDiscreteScheduler, {}),
    "SDE": ("sd15", DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_schedulers(case):
    name, kind, settings = SCHEDULERS[case]
    pipe = tiny.pipeline(name)
    before, pipe.scheduler = pipe.scheduler, kind.from_config(pipe.scheduler.config, **settings)
    try:
        check(pipe, name, {"speedup": 2.3}, oracle.finite_differences, num_inference_steps=12)
    finally:
        pipe.scheduler = before


# Paying back in the right direction: closer to all FULL than what pays nothing back. With the sign turned round the
# shares are 0.7 and more, for sd3's rough random velocity 1.1 and more.
@pytest.mark.parametrize(
    ("case", "share", "letter"),
    [
        ("Heun, sd3", 0.25, "S"),
        ("Heun, sd15", 0.25, "P"),
        ("2M", 0.25, "S"),
        ("2M, sd3", 0.9, "P"),
        ("first, sd3", 0.9, "S"),
        ("first, sd3", 0.9, "P"),
        ("first, sdxl", 0.25, "P"),
        ("first, sd15", 0.25, "S"),
    ],
)
def test_deferred_is_closer_to_all_full_than_reuse(case, share, letter):
    name, kind, settings = SCHEDULERS.get(case, (case.removeprefix("first, "), None, {}))
    pipe = tiny.pipeline(name)
    before = pipe.scheduler
    pipe.scheduler = kind.from_config(before.config, **settings) if kind else before
    # Of Heun's two evaluations at one time the second would know the first's delta.
    plan, steps = ("FFFFFFFSFSFSFSFSFFF", 10) if "Heun" in case else ("FFFFFFSFSFSFSFSFSFFF", 20)
    plan = plan.replace("S", letter)
    try:
        run = functools.partial(simulated, pipe, name, num_inference_steps=steps)
        full, _ = run({"policy": "cfg"})
        reuse, deferred = (run({"plan": plan, "guidance": rule})[0] for rule in ("reuse", "deferred"))
    finally:
        pipe.scheduler = before
    assert (deferred - full).norm() < share * (reuse - full).norm()


@pytest.mark.parametrize(("name", "steps"), [("sd3", 8), ("sdxl", 6), ("sd15", 4)])
def test_few_steps_at_the_default_tolerance_are_all_full(name, steps):
    pipe = tiny.pipeline(name)
    found, report = simulated(pipe, name, {}, num_inference_steps=steps)
    assert report["plan"] == "F" * steps
    assert torch.equal(found, simulated(pipe, name, {"policy": "cfg"}, num_inference_steps=steps)[0])


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_two_prompts_in_one_call_are_two_calls(name):
    """The estimates are fitted a picture; of what a plan depends on, only `adaptive`'s choice belongs to the call."""
    pipe, fields = tiny.pipeline(name), {"plan": "FFFSFPSFPF"}
    both, noise = tiny.prompt(name, 2), tiny.noise(name, 2)
    together, _ = simulated(pipe, name, fields, latents=noise, **both)
    for i in range(2):
        one = {key: value[i : i + 1] for key, value in both.items()}
        alone, _ = simulated(pipe, name, fields, latents=noise[i : i + 1], **one)
        assert ((together[i] - alone[0]).abs().max() / alone.abs().max()).item() < 1e-5


def off_for_a_step(step):
    kept = {}

    def callback(pipe, i, timestep, tensors):
        if i == step - 1:
            kept.update(tensors)
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        if i == step:
            pipe._guidance_scale = 5.0
            return kept
        return {}

    return callback


@pytest.mark.parametrize("kinds", ["FP", "FS"])
@pytest.mark.parametrize("off", [3, 7, 9])
def test_adaptive_goes_on_with_a_full_step_where_the_guidance_was_off(off, kinds):
    arguments = dict(callback_on_step_end=off_for_a_step(off), num_inference_steps=16)
    arguments["callback_on_step_end_tensor_inputs"] = test_features.SD3_TENSORS
    pipe, fields = tiny.pipeline("sd3"), {"speedup": 2.4, "kinds": kinds}
    found, report = simulated(pipe, "sd3", fields, **arguments)
    assert report["plan"][off : off + 2] == "FF"
    arguments["callback_on_step_end"] = off_for_a_step(off)
    with oracle.inside(pipe, plan=report["plan"], rule="deferred", cut=oracle.CUTS["sd3"]):
        expected = tiny.call(pipe, "sd3", **arguments)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_bfloat16(name):
    """No further from all FULL in bfloat16 than float32's estimates are, and bfloat16's rounding."""
    pipe, plan = tiny.PIPELINES[name](), "FFFFSFPFSF"
    pipe.set_progress_bar_config(disable=True)
    exact, _ = simulated(pipe, name, {"policy": "cfg"})
    estimated, _ = simulated(pipe, name, {"plan": plan})
    pipe.to(torch.bfloat16)
    prompt = {key: value.bfloat16() for key, value in tiny.prompt(name).items()}
    found, report = simulated(pipe, name, {"plan": plan}, **prompt)
    rounded, _ = simulated(pipe, name, {"policy": "cfg"}, **prompt)
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and report["plan"] == plan
    allowed = 1.5 * ((estimated - exact).norm() + (rounded.float() - exact).norm())
    assert (found.float() - exact).norm() < allowed
    adaptive, report = simulated(pipe, name, {"speedup": 2.2}, **prompt)
    assert adaptive.isfinite().all() and report["speedup_bound"] >= 2.2


def test_nothing_is_sent_and_the_report_says_one_process():
    _, report = simulated(tiny.pipeline("sd3"), "sd3", {"plan": "FFFSFPSFPF"})
    assert report["world_size"] == 1 and report["bytes_sent"] == [0]


def test_predictions_that_are_not_finite_are_an_error():
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.proj_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"discrepancy at step 0 is nan.*dtype"):
        simulated(pipe, "sd3", {"tolerance": 1.0})


def test_eta_is_taken_into_the_gains():
    """It is known with the scheduler's first step only. Each picture's noise is many times what the gains change."""
    pipe, plan = tiny.pipeline("sdxl"), "FFSFSFPFFF"
    arguments = dict(eta=1.0, guidance_scale=15.0)
    found, _ = simulated(pipe, "sdxl", {"plan": plan}, **arguments)
    errors = []
    for eta in (1.0, 0.0):
        sampler = functools.partial(oracle.closed_form, eta=eta)
        with oracle.inside(pipe, plan=plan, rule="deferred", cut=oracle.CUTS["sdxl"], sampler=sampler):
            expected = tiny.call(pipe, "sdxl", **arguments)
        errors.append(((found - expected).abs().max() / expected.abs().max()).item())
    assert errors[0] < 1e-6 < 5e-6 < errors[1]


def test_what_cannot_be_split_runs_where_nothing_is_pipelined():
    pipe = tiny.sdxl()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    assert "S" in check(pipe, "sdxl", {"speedup": 2.3}, num_inference_steps=12)
    with pytest.raises(ValueError, match=r"FreeU.*--hybrid_kinds FS"):
        simulated(pipe, "sdxl", {"speedup": 2.3, "kinds": "FPS"}, num_inference_steps=12)
