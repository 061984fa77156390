"""What once was wrong, with the smallest input that showed it, named after what is right.

Most of it runs on one process that plays both ranks: its branches are evaluated apart, as two ranks would. (The number
in a comment is the fault's, in the list of those found in commit e48ee12.)
"""

import copy
import functools
import gc
import pickle
import threading
import time
import weakref
from types import SimpleNamespace

import accelerate
import pytest
import test_graphs
import tiny
import torch
import torch.distributed as dist
import zoo_batched
import zoo_successive
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from ranks import Ranks

from hybridiff_xdit import HybridConfig, apply_hybrid, hybrid, last_report, remove_hybrid

pytestmark = pytest.mark.usefixtures("one_thread")

tape = test_graphs.tape
CFG = {"policy": "cfg"}
ROUNDING = 1e-5  # two evaluations of batch one against one of batch two


def own(name, scheduler=None):
    """A pipeline of this test alone."""
    pipe = tiny.PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def applied(pipe, fields=CFG, **kwargs):
    return apply_hybrid(pipe, HybridConfig(**fields), simulate=True, **kwargs)


def call(pipe, steps=4, name="sd15", **kwargs):
    return tiny.call(pipe, name, num_inference_steps=steps, **kwargs)


def gap(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def parametrize(**cases):
    """A parameter with names for its values."""
    ((argument, values),) = cases.items()
    return pytest.mark.parametrize(argument, list(values.values()), ids=list(values))


def picture():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))


# 1 and 10: copies.


def replace_scheduler(pipe):
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return pipe


COPIES = {
    "of the scheduler": replace_scheduler,
    "of the pipeline": copy.copy,
    "of all": copy.deepcopy,
    "from the components": lambda pipe: type(pipe)(**pipe.components),
}


@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
@parametrize(kind={"DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler})
@parametrize(copied=COPIES)
def test_what_is_copied_runs_as_many_steps_as_it_is_asked_for(copied, kind, called):
    pipe = applied(own("sd15", kind))
    if called:
        call(pipe, 6)
    other = copied(pipe)
    other.set_progress_bar_config(disable=True)
    found = call(other)
    remove_hybrid(pipe)
    expected = call(own("sd15", kind))
    assert gap(found, expected) < ROUNDING
    assert gap(call(other), expected) == 0


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("when", ["before", "during", "after"])
@parametrize(copier={"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": through_pickle})
def test_copies_are_of_the_original_class_and_independent(copier, when):
    pipe = applied(own("sd15"))
    plain = own("sd15")
    made = {}

    def make(pipe, step=2, timestep=None, tensors=None):
        if step == 2 and not made:
            made.update({name: copier(getattr(pipe, name)) for name in ("unet", "scheduler")})
            if when != "during":
                made["pipe"] = copier(pipe)
        return {}

    if when == "before":
        make(pipe)
    call(pipe, **({"callback_on_step_end": make} if when == "during" else {}))
    make(pipe)
    for name, value in made.items():
        original = type(plain) if name == "pipe" else type(getattr(plain, name))
        assert type(value) is original or name == "pipe" and copier is copy.copy
    made["scheduler"].set_timesteps(5)
    assert len(made["scheduler"].timesteps) == 5 and len(pipe.scheduler.timesteps) != 5
    if copier is not copy.copy:  # which shares the weights by definition
        with torch.no_grad():
            pipe.unet.conv_out.bias.add_(1.0)
        inputs = torch.ones(1, 4, 16, 16), 1, torch.ones(1, tiny.TOKENS, 24)
        with torch.no_grad():
            assert torch.equal(made["unet"](*inputs).sample, plain.unet(*inputs).sample)


def test_a_pipeline_that_copies_its_scheduler_is_right():
    pipe = zoo_batched.CASES["ltx2"].build()
    expected = zoo_batched.call(pipe, "ltx2")
    found = zoo_batched.call(applied(pipe), "ltx2")
    assert all(gap(a, b) < 1e-4 for a, b in zip(found, expected, strict=True))


# 2: what a batch is made of.


@pytest.mark.parametrize("name", ["sd15 pag", "sdxl pag", "sd3 pag"])
def test_a_batch_of_other_parts_is_evaluated_whole_and_said_so_once(name, caplog):
    pipe = zoo_batched.CASES[name].build()
    expected = zoo_batched.call(pipe, name, count=2)
    applied(pipe)
    for _ in range(2):
        assert gap(zoo_batched.call(pipe, name, count=2), expected) < ROUNDING
    assert caplog.text.count("evaluated whole on every rank") == 1


# 3: pictures are no branches.


@parametrize(fields={"speedup": dict(speedup=2.2), "plan": dict(plan="FFFSFSFF")})
def test_two_pictures_whose_branches_come_in_two_calls_are_those_made_alone(fields):
    build, arguments = zoo_successive.CASES["wan21-euler"]
    pipe = build()
    given = {**arguments(pipe), "return_dict": False}
    texts = [key for key in given if key.endswith("prompt_embeds")]
    noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    both = {key: torch.cat([given[key], given[key].flip(1)]) for key in texts} | {"latents": noise}
    applied(pipe, fields)
    (found,), plan = pipe(**{**given, **both}), last_report(pipe)["plan"]
    assert "S" in plan
    applied(pipe, {"plan": plan})
    for i in range(2):
        (alone,) = pipe(**{**given, **{key: value[i : i + 1] for key, value in both.items()}})
        assert gap(found[i : i + 1], alone) < 1e-3


# 4: pipelines that share a denoiser.


def related(pipe):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def unguided_after_guided(text, image):
    call(text)
    return dict(guidance_scale=1.0)


@pytest.mark.parametrize("is_applied", [False, True], ids=["plain", "applied"])
@parametrize(
    before={
        "nothing": lambda text, image: {},
        "text to image": lambda text, image: call(text, 6) is None or {},
        "guided": unguided_after_guided,
    }
)
def test_a_run_is_of_the_pipeline_that_runs(before, is_applied):
    text = applied(own("sd15"))
    image = related(text)
    if is_applied:
        applied(image)
    kwargs = dict(image=picture(), strength=0.5, steps=8) | before(text, image)
    found = call(image, **kwargs)
    assert not is_applied or last_report(image)["num_steps"] == 4
    assert gap(found, call(related(own("sd15")), **{**kwargs, "image": picture()})) < ROUNDING


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_hooks_are_taken_off_in_any_order(order):
    pipes = [applied(own("sd15"))]
    pipes.append(applied(related(pipes[0])))
    call(pipes[0])
    for i in order:
        remove_hybrid(pipes[i])
    parts = [*pipes, pipes[0].unet, pipes[0].scheduler]
    for part, plain in zip(parts, [own("sd15"), related(own("sd15")), own("sd15").unet, own("sd15").scheduler]):
        assert type(part) is type(plain) and vars(part).keys() == vars(plain).keys()
    assert gap(call(pipes[0]), call(own("sd15"))) == 0
