"""What a user may ask of a pipeline: each thing asked of two ranks, and of a plain pipeline with the oracle inside it.

An all-FULL plan must agree bit for bit, one with PIPELINED and SKIPPED steps to 1e-5 of the latents' scale.
"""

import logging
from functools import partial
from unittest import mock

import numpy as np
import oracle
import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.evaluate.stages import executor

PLAN = "FFPPFPF"
#: What the rule ``deferred`` is given in place of each plan.
SKIPPING = {
    "FFPPFPF": "FFSFPSF",
    "FPPPFF": "FSFPSF",
    "FFPF": "FFSF",
    "FFPPF": "FSFPF",
    "FFPPFFF": "FFSPFFF",
    "FFFFFPF": "FFSFFSF",
}
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def scale_latents(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * (1 + 0.01 * step)}


def guidance_changes(pipe, step, timestep, tensors):
    pipe._guidance_scale = 5.0 - 1.5 * (step % 3)
    return {}


def guidance_off_at_3(pipe, step, timestep, tensors):
    """The diffusers documentation's example of dynamic guidance."""
    if step == 3:
        pipe._guidance_scale = 0.0
        return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
    return {}


def guidance_off_for_one_step():
    kept = {}

    def callback(pipe, step, timestep, tensors):
        if step == 3:
            kept.update(tensors)
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        if step == 4:
            pipe._guidance_scale = 5.0
            return kept
        return {}

    return callback


SDXL_TENSORS = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
SD3_TENSORS = ["prompt_embeds", "pooled_prompt_embeds"]
ANOTHER = tiny.prompt("sd15", seed=9)["prompt_embeds"]
OTHER_SIZES = dict(original_size=(64, 48), crops_coords_top_left=(4, 2), negative_original_size=(8, 8))

SKIP_LAYERS = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5)

#: Arguments of a call that change what the denoiser is asked: {id: (pipeline, arguments, plan that is run)}.
CALLS = {
    "several prompts": ("sd3", dict(count=3), PLAN),
    "several prompts with several images each": ("sdxl", dict(count=2, num_images_per_prompt=2), PLAN),
    "images per prompt": ("sd15", dict(num_images_per_prompt=2), PLAN),
    "another negative prompt": ("sd15", dict(negative_prompt_embeds=ANOTHER), PLAN),
    "sizes of the negative prompt": ("sdxl", dict(**OTHER_SIZES, negative_target_size=(16, 16)), PLAN),
    "guidance_rescale, sdxl": ("sdxl", dict(guidance_rescale=0.7), PLAN),
    "guidance_rescale, sd15": ("sd15", dict(guidance_rescale=0.7), PLAN),
    "strong guidance, sd3": ("sd3", dict(guidance_scale=15.0), PLAN),
    "strong guidance, sd15": ("sd15", dict(guidance_scale=15.0), PLAN),
    "changing guidance, sd3": ("sd3", dict(callback_on_step_end=guidance_changes), PLAN),
    "changing guidance, sdxl": ("sdxl", dict(callback_on_step_end=guidance_changes), PLAN),
    "eta": ("sdxl", dict(eta=0.5), PLAN),
    "pictures": ("sd3", dict(output_type="np"), PLAN),
    "no multiple of the downsampling": ("sdxl", dict(latents=tiny.noise("sdxl", size=(10, 13))), PLAN),
    "not square": ("sd3", dict(height=20, width=28), PLAN),
    "other steps": ("sd3", dict(num_inference_steps=6), "FPPPFF"),
    "sigmas": ("sd3", dict(sigmas=[1.0, 0.7, 0.5, 0.2]), "FFPF"),
    "denoising_end": ("sdxl", dict(denoising_end=0.5, num_inference_steps=10), "FFPPF"),
    "callback, sd3": ("sd3", dict(callback_on_step_end=scale_latents), PLAN),
    "callback, sdxl": ("sdxl", dict(callback_on_step_end=scale_latents), PLAN),
    # In steps 1 to 3 a second call asks for a third stream. PIPELINED steps are FULL there, and in the next, of which
    # nobody could know that it has two again.
    "skip-layer guidance": ("sd3", SKIP_LAYERS, "FFFFFPF"),
    "guidance off midway, sd3": (
        "sd3",
        dict(callback_on_step_end=guidance_off_at_3, callback_on_step_end_tensor_inputs=SD3_TENSORS),
        "FFPPFFF",
    ),
    "guidance off midway, sdxl": (
        "sdxl",
        dict(callback_on_step_end=guidance_off_at_3, callback_on_step_end_tensor_inputs=SDXL_TENSORS),
        "FFPPFFF",
    ),
}

#: Where a call's denoiser is cut, if not as with the usual size.
CUTS = {"no multiple of the downsampling": ("down_blocks.1.downsamplers.0", "up_blocks.0.resnets.2")}

#: Pipelines made of another's parts, with what they are called with.
RELATIVES = {
    "sd3 img2img": ("sd3", StableDiffusion3Img2ImgPipeline),
    "sd3 inpaint": ("sd3", StableDiffusion3InpaintPipeline),
    "sdxl img2img": ("sdxl", StableDiffusionXLImg2ImgPipeline),
    "sdxl inpaint": ("sdxl", StableDiffusionXLInpaintPipeline),
    "sd15 img2img": ("sd15", StableDiffusionImg2ImgPipeline),
    "sd15 inpaint": ("sd15", StableDiffusionInpaintPipeline),
}

#: {id: (pipeline, scheduler, settings, evaluations in a run of 5)}
SCHEDULERS = {
    "Heun, sdxl": ("sdxl", HeunDiscreteScheduler, {}, 9),
    "Heun, sd3": ("sd3", FlowMatchHeunDiscreteScheduler, {}, 9),
    "Euler": ("sdxl", EulerDiscreteScheduler, {}, 5),
    "ancestral": ("sdxl", EulerAncestralDiscreteScheduler, {}, 5),
    "multistep": ("sd15", DPMSolverMultistepScheduler, {}, 5),
    "multistep, sd3": (
        "sd3",
        DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        5,
    ),
    "UniPC": ("sdxl", UniPCMultistepScheduler, {}, 5),
    "KDPM2": ("sd15", KDPM2DiscreteScheduler, {}, 9),
    "v-prediction": ("sdxl", EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, 5),
}


def compare(pipe, name, fields, plan, kwargs, cut=None, **inside):
    """(output, report, output of a plain pipeline with the oracle in it; None but on rank 0)."""
    kwargs = {"num_inference_steps": len(PLAN), **kwargs}
    apply_hybrid(pipe, HybridConfig(balance="flops", **fields))
    try:
        found, report = tiny.call(pipe, name, **kwargs), last_report(pipe)
    finally:
        remove_hybrid(pipe)
    if dist.get_rank() == 1:
        return cpu(found), report, None
    with oracle.inside(pipe, plan=plan, rule=fields["guidance"], cut=cut or oracle.CUTS[name], **inside):
        return cpu(found), report, cpu(tiny.call(pipe, name, **kwargs))


def cpu(images):
    return images.cpu() if isinstance(images, torch.Tensor) else torch.from_numpy(np.stack(images))


def check(outcomes, plan, tolerance=1e-5):
    """Both ranks returned the same, and what the oracle says."""
    (first, report, expected), (second, *_) = outcomes
    assert report["plan"] == plan
    assert torch.equal(first, second)
    if set(plan) != {"F"}:
        assert ((first - expected).abs().max() / expected.abs().max()).item() < tolerance
    else:
        assert torch.equal(first, expected)


def plans(argument, cases, *kinds):
    """Each case with PIPELINED and SKIPPED steps, and in further kinds; the first of a pipeline also by ``reuse``.

    Args:
        cases: whose values begin with the pipeline's name.
    """
    first = {values[0]: case for case, values in reversed(cases.items())}.values()
    kinds = [(case, kind) for case in cases for kind in ("deferred", *kinds, *["PIPELINED"][: case in first])]
    named = [pytest.param(case, kind, id=f"{case}, {kind}") for case, kind in kinds]
    return pytest.mark.parametrize((argument, "kind"), named)


def fields_for(plan, kind):
    plan = {"PIPELINED": plan, "deferred": SKIPPING.get(plan), "FULL": "F" * len(plan)}[kind]
    return {"plan": plan, "guidance": "deferred" if kind == "deferred" else "reuse"}, plan


def call(case, fields, plan):
    name, kwargs, _ = CALLS[case]
    inside = {"sampler": partial(oracle.closed_form, eta=kwargs.get("eta", 0.0))}
    if layers := kwargs.get("skip_guidance_layers"):
        inside["skipped_layers"] = lambda step: layers if 1 <= step <= 3 else None
    return compare(tiny.pipeline(name, ranks.device()), name, fields, plan, kwargs, CUTS.get(case), **inside)


@plans("case", CALLS, "FULL")
def test_arguments_of_a_call(pair, case, kind):
    fields, plan = fields_for(CALLS[case][2], kind)
    check(pair.run(call, case, fields, plan), plan, TOLERANCE[pair.device])


def relative(case, fields, plan):
    name, kind = RELATIVES[case]
    pipe = kind.from_pipe(tiny.pipeline(name, ranks.device()))
    pipe.set_progress_bar_config(disable=True)
    kwargs = dict(image=picture(1), mask_image=picture(2)[:, :1].round(), strength=0.5, num_inference_steps=10)
    return compare(pipe, name, fields, plan, kwargs)


@plans("case", RELATIVES)
def test_image_to_image_and_inpainting(pair, case, kind):
    fields, plan = fields_for("FFPPF", kind)
    check(pair.run(relative, case, fields, plan), plan, TOLERANCE[pair.device])


def another_scheduler(case, fields, plan, when):
    name, kind, settings, _ = SCHEDULERS[case]
    pipe = tiny.pipeline(name, ranks.device())
    before, after = pipe.scheduler, kind.from_config(pipe.scheduler.config, **settings)
    if when == "before apply":
        pipe.scheduler = after
    apply_hybrid(pipe, HybridConfig(balance="flops", **fields))
    try:
        if when == "after a call":
            tiny.call(pipe, name, num_inference_steps=len(plan))
        pipe.scheduler = after
        found, report = tiny.call(pipe, name, num_inference_steps=5), last_report(pipe)
        remove_hybrid(pipe)
        assert type(after) is kind and type(before) is type(tiny.PIPELINES[name]().scheduler)
        rule, sampler = fields["guidance"], oracle.finite_differences
        with oracle.inside(pipe, plan=plan, rule=rule, cut=oracle.CUTS[name], sampler=sampler):
            return found.cpu(), report, tiny.call(pipe, name, num_inference_steps=5).cpu()
    finally:
        remove_hybrid(pipe)
        pipe.scheduler = before


@plans("case", SCHEDULERS)
def test_schedulers(pair, case, kind):
    plan = {"deferred": "FFSFPSFPF", "PIPELINED": "FFPPFPFFF"}[kind][: SCHEDULERS[case][3]]
    fields = {"plan": plan, "guidance": "deferred" if kind == "deferred" else "reuse"}
    check(pair.run(another_scheduler, case, fields, plan, "before apply"), plan)


@pytest.mark.parametrize("rule", ["reuse", "deferred"])
@pytest.mark.parametrize("case", ["Euler", "Heun, sd3"])
def test_a_scheduler_that_is_replaced_after_apply(pair, case, rule):
    plan = "FPFPFPFPF"[: SCHEDULERS[case][3]]
    fields = {"plan": f"1-{len(plan)}/2", "guidance": rule}
    for when in ("after apply", "after a call"):
        check(pair.run(another_scheduler, case, fields, plan, when), plan)


def lora(name, fields, plan, argument):
    """Half strength, given with the call; and to the oracle's pipeline as the adapter's own weight."""
    from peft import LoraConfig

    pipe = tiny.pipeline(name, ranks.device())
    denoiser = pipe.transformer if name == "sd3" else pipe.unet
    torch.manual_seed(3)
    targets = ["to_q", "to_v", "proj_out"]
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets), "style")
    try:
        kwargs, steps = {argument: {"scale": 0.5}}, {"num_inference_steps": len(plan)}
        plain = tiny.call(pipe, name, **kwargs, **steps)
        without = tiny.call(pipe, name, **{argument: {"scale": 0.0}}, **steps)
        found, report, _ = compare(pipe, name, fields, plan, kwargs)
        denoiser.set_adapters("style", 0.5)
        with oracle.inside(pipe, plan=plan, rule=fields["guidance"], cut=oracle.CUTS[name]):
            return found, report, tiny.call(pipe, name, **steps), plain, without
    finally:
        denoiser.delete_adapters("style")


@pytest.mark.parametrize(
    ("name", "kind"), [("sd3", "FULL"), ("sd3", "PIPELINED"), ("sdxl", "FULL"), ("sdxl", "deferred")]
)
def test_lora_and_its_scale(pair, name, kind):
    argument = {"sd3": "joint_attention_kwargs", "sdxl": "cross_attention_kwargs"}[name]
    fields, plan = fields_for(PLAN, kind)
    outcomes = pair.run(lora, name, fields, plan, argument)
    check([outcome[:3] for outcome in outcomes], plan)
    found, *_, plain, without = outcomes[0]
    assert (plain - without).abs().max() > 0.1  # the adapter does something
    if kind == "FULL":
        assert (found - plain).abs().max() < 1e-4 * plain.abs().max()


# Over several calls.


def repeated(rule):
    """Latents and plans of calls that differ in size, steps and number of prompts, and then of the first again."""
    pipe, calls = tiny.pipeline("sd3"), [{}, dict(height=48), dict(num_inference_steps=7), dict(count=2), {}]
    apply_hybrid(pipe, HybridConfig(plan="2-7/2", guidance=rule))
    try:
        found = [(tiny.call(pipe, "sd3", **kwargs), last_report(pipe)["plan"]) for kwargs in calls]
    finally:
        remove_hybrid(pipe)
    expected = []
    for kwargs, (_, plan) in zip(calls, found, strict=True):
        with oracle.inside(pipe, plan=plan, rule=rule, cut=oracle.CUTS["sd3"]):
            expected.append(tiny.call(pipe, "sd3", **kwargs))
    return found, expected


@pytest.mark.parametrize("rule", ["reuse", "deferred"])
def test_calls_in_a_row(pair, rule):
    (found, expected), _ = pair.run(repeated, rule)
    assert [plan for _, plan in found] == ["FFPFPFPFFF", "FFPFPFPFFF", "FFPFPFP", "FFPFPFPFFF", "FFPFPFPFFF"]
    for (latents, _), reference in zip(found, expected, strict=True):
        assert (latents - reference).abs().max() < 1e-5 * reference.abs().max()
    assert torch.equal(found[0][0], found[-1][0])


def stop_at_4(pipe, step, timestep, tensors):
    pipe._interrupt = step == 4
    return {}


def fail_at_4(pipe, step, timestep, tensors):
    if step == 4:
        raise InterruptedError("by the user")
    return {}


SLOW_START, SLOW_END = (9.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 4.0)  # of the blocks


def timed(measured, cut):
    """(latents of ranks that measured these seconds, of the oracle with this cut)."""
    pipe, fields = tiny.PIPELINES["sd3"](), {"plan": "FFPPPPPPFF", "guidance": "reuse"}  # one that was never timed
    apply_hybrid(pipe, HybridConfig(**fields))
    clock = mock.patch.object(executor, "seconds_between", lambda run: measured[dist.get_rank()])
    with clock, mock.patch.object(executor, "can_capture", lambda device: True):
        found = tiny.call(pipe, "sd3")
    remove_hybrid(pipe)
    with oracle.inside(pipe, plan=fields["plan"], rule="reuse", cut=cut):
        return found, tiny.call(pipe, "sd3")


@pytest.mark.parametrize(
    ("measured", "cut"),
    [((SLOW_START, SLOW_START), 1), ((SLOW_END, SLOW_END), 3), ((SLOW_START, SLOW_END), 1), ((SLOW_START, None), 2)],
    ids=["first block", "last block", "ranks that differ", "a rank that cannot"],
)
def test_stages_are_balanced_by_the_mean_of_the_ranks_times(pair, measured, cut):
    for found, expected in pair.run(timed, measured, cut):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert not torch.equal(expected, pair.run(timed, measured, 2)[0][1]) or cut == 2  # the cut tells


def cut_short(callback, fields):
    """Latents of a call after one that did not come to its end, on a plan that leaves a transfer in flight there."""
    pipe = apply_hybrid(tiny.pipeline("sd3"), HybridConfig(**fields))
    try:
        expected = tiny.call(pipe, "sd3")
        try:
            tiny.call(pipe, "sd3", callback_on_step_end=globals()[callback])
        except InterruptedError:
            assert callback == "fail_at_4"
        report = last_report(pipe)
        return tiny.call(pipe, "sd3"), expected, report
    finally:
        remove_hybrid(pipe)


@pytest.mark.parametrize("fields", [{"plan": "FFPPPPPPFF", "guidance": "reuse"}, {"plan": "FFFPPPSPFF"}], ids=str)
@pytest.mark.parametrize("callback", ["stop_at_4", "fail_at_4"])
def test_a_call_after_one_that_was_cut_short(pair, callback, fields):
    for found, expected, report in pair.run(cut_short, callback, fields):
        assert report is None  # of an unfinished run
        assert torch.equal(found, expected)


def guidance_back_on(rule, asked, plan):
    pipe = tiny.pipeline("sd3")

    def run():
        tensors = dict(callback_on_step_end_tensor_inputs=SD3_TENSORS)
        return tiny.call(pipe, "sd3", callback_on_step_end=guidance_off_for_one_step(), **tensors)

    apply_hybrid(pipe, HybridConfig(plan=asked, guidance=rule))
    try:
        found, report = run(), last_report(pipe)
    finally:
        remove_hybrid(pipe)
    with oracle.inside(pipe, plan=plan, rule=rule, cut=oracle.CUTS["sd3"]):
        return found, report, run()


@pytest.mark.parametrize("rule", ["reuse", "deferred"])
@pytest.mark.parametrize(
    ("asked", "plan"),
    [
        ("FFPPPPPPFF", "FFPPFFPPFF"),
        ("FFSSSSSSFF", "FFSSFFSSFF"),
        ("FFPSSPSPSF", "FFPSFFSPSF"),
        ("FFFPFSPSPF", "FFFPFFPSPF"),
    ],
)
def test_guidance_that_is_off_for_one_step_is_followed_by_a_full_one(pair, rule, asked, plan):
    # Steps 0-3 as planned, 4 without guidance; 5 should not be FULL, but nothing is known to go on from.
    check(pair.run(guidance_back_on, rule, asked, plan), plan)


# Taken off, put on twice, and not in use.


def state(pipe, denoiser):
    """The class, and names of every attribute and hook, that could be left behind."""
    objects = [pipe, pipe.scheduler, *denoiser.modules()]
    return [(type(o), sorted(vars(o)), len(getattr(o, "_forward_hooks", ()))) for o in objects]


def taken_off(name, fields, times):
    pipe = tiny.pipeline(name)
    denoiser = pipe.transformer if name == "sd3" else pipe.unet
    steps = {"num_inference_steps": len(PLAN) if "plan" in fields else 10}  # 7 are too few for a target
    plain, before = tiny.call(pipe, name, **steps), state(pipe, denoiser)
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    for _ in range(times):
        apply_hybrid(pipe, HybridConfig(balance="flops", **fields))
    found = tiny.call(pipe, name, **steps)
    now = state(pipe, denoiser)
    assert now[1:] == before[1:]  # scheduler and denoiser are watched during a call only
    assert now[0][0] is not before[0][0] and now[0][1:] == before[0][1:]
    assert remove_hybrid(pipe) is pipe
    assert state(pipe, denoiser) == before
    assert last_report(pipe) is None
    remove_hybrid(pipe)
    assert all(torch.equal(weights[key], value) for key, value in denoiser.state_dict().items())
    assert torch.equal(tiny.call(pipe, name, **steps), plain)
    return found


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sd3", {"plan": PLAN, "guidance": "reuse"}),
        ("sd3", {"speedup": 2.2}),
        ("sdxl", {"plan": PLAN, "guidance": "reuse"}),
        ("sd15", {"plan": SKIPPING[PLAN]}),
    ],
    ids=str,
)
def test_removal_leaves_nothing_behind_and_applying_twice_is_once(pair, name, fields):
    once, *_ = pair.run(taken_off, name, fields, 1)
    twice, *_ = pair.run(taken_off, name, fields, 2)
    assert torch.equal(once, twice)


def applied_again():
    """A second apply takes the place of the first, whatever was configured there."""
    pipe = apply_hybrid(tiny.pipeline("sd3"), HybridConfig(policy="cfg"))
    plans = []
    for fields in ({"policy": "cfg"}, {"plan": PLAN}):
        apply_hybrid(pipe, HybridConfig(balance="flops", **fields))
        tiny.call(pipe, "sd3", num_inference_steps=len(PLAN))
        plans.append(last_report(pipe)["plan"])
    remove_hybrid(pipe)
    return plans


def test_applying_again_replaces_the_configuration(pair):
    assert pair.run(applied_again) == [["F" * len(PLAN), PLAN]] * 2


class Messages(logging.Handler):
    """What the package logs, while open."""

    def __enter__(self):
        self.texts = []
        logging.getLogger("hybridiff_xdit").addHandler(self)
        return self.texts

    def __exit__(self, *_):
        logging.getLogger("hybridiff_xdit").removeHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


def without_guidance(name, plan):
    """(latents of two calls, of a plain pipeline, of the oracle for the plan that was run, warnings, that plan)"""
    pipe = tiny.pipeline(name)
    unguided = {"guidance_scale": 1.0, "num_inference_steps": len(plan)}
    plain = tiny.call(pipe, name, **unguided)
    apply_hybrid(pipe, HybridConfig(plan=plan))
    try:
        with Messages() as texts:
            found = [tiny.call(pipe, name, **unguided) for _ in range(2)]
        report = last_report(pipe)
    finally:
        remove_hybrid(pipe)
    with oracle.inside(pipe, plan=report["plan"], rule="deferred", cut=oracle.CUTS[name]):
        return found, plain, tiny.call(pipe, name, **unguided), texts, report["plan"]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_without_guidance_nothing_is_pipelined_and_warnings_say_so(pair, name):
    for found, plain, _, texts, plan in pair.run(without_guidance, name, PLAN):
        assert plan == "F" * len(PLAN)
        assert all(torch.equal(latents, plain) for latents in found)
        assert len(texts) == 2 and "asks for 1 stream" in texts[0] and "PIPELINED" in texts[0]
        assert "1 had nothing of its own to evaluate" in texts[1]


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_without_guidance_steps_are_skipped(pair, name):
    asked = "FFSFSSFF"
    for found, plain, expected, texts, plan in pair.run(without_guidance, name, asked):
        assert plan == asked and len(texts) == 1 and "1 had nothing of its own to evaluate" in texts[0]
        assert torch.equal(*found) and not torch.equal(found[0], plain)
        assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_rank_is_the_plain_result_and_one_warning_where_steps_are_pipelined():
    pipe = tiny.pipeline("sd3")
    plain = tiny.call(pipe, "sd3")
    before = state(pipe, pipe.transformer)
    with Messages() as texts:
        assert apply_hybrid(pipe, HybridConfig(plan=PLAN)) is pipe
        assert torch.equal(tiny.call(pipe, "sd3"), plain)
    assert state(pipe, pipe.transformer) == before
    assert len(texts) == 1 and "need 2 ranks" in texts[0]
    assert last_report(pipe) is None


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_one_rank_skips_steps(name):
    """The batch is evaluated as it is, so that all FULL is the plain pipeline bit for bit."""
    pipe, plan = tiny.pipeline(name), "FFSFSSFFSF"
    plain = tiny.call(pipe, name)
    try:
        with Messages() as texts:
            apply_hybrid(pipe, HybridConfig(policy="cfg"))
            assert torch.equal(tiny.call(pipe, name), plain)
            apply_hybrid(pipe, HybridConfig(plan=plan))
            found, report = tiny.call(pipe, name), last_report(pipe)
    finally:
        remove_hybrid(pipe)
    assert report["plan"] == plan and not texts
    assert report["speedup_bound"] == pytest.approx(10 / 6)
    with oracle.inside(pipe, plan=plan, rule="deferred", cut=oracle.CUTS[name]):
        expected = tiny.call(pipe, name)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_compiled_blocks(name):
    """Graphs are traced (dynamo), and run by PyTorch itself; the partition is counted with the blocks as they are."""
    from hybridiff_xdit.xdit.groups import compile_blocks

    pipe = tiny.PIPELINES[name]()  # compiled for good
    pipe.set_progress_bar_config(disable=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks(pipe.unet if name == "sdxl" else pipe.transformer, backend=backend)
    for plan in ("FFPPFSFFPF", "FFFPPFFSFF"):
        apply_hybrid(pipe, HybridConfig(plan=plan, guidance="deferred"), simulate=True)
        found = tiny.call(pipe, name)
        remove_hybrid(pipe)
        expected, _ = oracle.denoise(
            tiny.pipeline(name), tiny.prompt(name), tiny.noise(name), plan=plan, rule="deferred", cut=oracle.CUTS[name]
        )
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert graphs


@pytest.mark.parametrize("how", ["module", "wrapper", "afterwards"])
def test_a_denoiser_compiled_as_a_whole(how, caplog):
    """Whole forwards are the compiled ones; where steps are PIPELINED all is evaluated as it is."""
    torch._dynamo.reset()
    pipe = tiny.PIPELINES["sd3"]()
    pipe.set_progress_bar_config(disable=True)
    graphs, runs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: runs.append(graph) or graph.forward(*args)

    if how == "module":
        pipe.transformer.compile(backend=backend)
    if how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    for plan in ("FFSFSFSSFF", "FFPPFSFFPF"):
        apply_hybrid(pipe, HybridConfig(plan=plan), simulate=True)
        if how == "afterwards" and not graphs:
            pipe.transformer = torch.compile(pipe.transformer, backend=backend)
        before = len(runs)
        found = [tiny.call(pipe, "sd3") for _ in range(2)]
        remove_hybrid(pipe)
        assert graphs and len(runs) - before >= (2 * 2 * plan.count("F") if "P" not in plan else 0)
        assert torch.equal(*found)
        expected, _ = oracle.denoise(
            tiny.pipeline("sd3"), tiny.prompt("sd3"), tiny.noise("sd3"), plan=plan, rule="deferred", cut=2
        )
        assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()
        warned = [record.getMessage() for record in caplog.records if record.name.startswith("hybridiff_xdit")]
        assert len(warned) == ("P" in plan) and all("is compiled as a whole" in text for text in warned)
