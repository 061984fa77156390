"""What once was wrong, with the smallest input that showed it, named after what is right.

Most of it runs on one process that plays both ranks: its branches are evaluated apart, as two ranks would. (The number
in a comment is the fault's, in the list of those found in commit e48ee12.)
"""

import copy
import functools
import gc
import importlib
import inspect
import os
import pickle
import threading
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import accelerate
import pytest
import test_graphs
import tiny
import torch
import torch.distributed as dist
import zoo_batched
import zoo_successive
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from ranks import Ranks

from hybridiff_xdit import HybridConfig, apply_hybrid, hybrid, last_report, remove_hybrid, trees
from hybridiff_xdit.evaluate import graphs
from hybridiff_xdit.evaluate.stages import executor
from hybridiff_xdit.ranks.comm import Comm, Solo, checksum
from hybridiff_xdit.seam import signals
from hybridiff_xdit.seam.checkpoints import resolve

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
        assert type(value) is original or (name == "pipe" and copier is copy.copy)
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


@parametrize(fields={"speedup": dict(speedup=2.2), "plan": dict(plan="FFFSFSFFFF")})
def test_two_pictures_whose_branches_come_in_two_calls_are_those_made_alone(fields):
    build, arguments = zoo_successive.CASES["wan21-euler"]
    pipe = build()
    given = {**arguments(pipe), "num_inference_steps": 10, "return_dict": False}
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


PLAIN = {StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, UNet2DConditionModel, DDIMScheduler}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_hooks_are_taken_off_in_any_order(order):
    pipes = [applied(own("sd15"))]
    pipes.append(applied(related(pipes[0])))
    call(pipes[0])
    for i in order:
        remove_hybrid(pipes[i])
    for part in (*pipes, pipes[0].unet, pipes[0].scheduler):
        assert type(part) in PLAIN and not {"forward", "step", "set_timesteps", "progress_bar"} & vars(part).keys()
    assert gap(call(pipes[0]), call(own("sd15"))) == 0


def test_the_threads_of_two_pipelines_may_share_a_denoiser():
    """With a scheduler each: diffusers recommends it."""
    first, second = own("sd3"), own("sd3")
    second.transformer = first.transformer
    expected = [call(pipe, name="sd3", seed=i) for i, pipe in enumerate((first, second))]
    turns = threading.Barrier(2, timeout=30)

    def in_turn(pipe, step, timestep, tensors):
        turns.wait()
        return {}

    found = {}
    threads = [
        threading.Thread(
            target=lambda i, pipe: found.update({i: call(pipe, name="sd3", seed=i, callback_on_step_end=in_turn)}),
            args=(i, pipe),
        )
        for i, pipe in enumerate((applied(first), second))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(gap(found[i], expected[i]) < ROUNDING for i in range(2))


# 5: what must be the same on every rank.


def lora_weights(pipe, rank, seed=None):
    torch.manual_seed(rank if seed is None else seed)
    targets = ["to_q", "to_v"]
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets), "style")


def adapter_scale(pipe, rank):
    lora_weights(pipe, rank, seed=1)
    pipe.set_adapters("style", 0.5 + rank)


def weight_in_the_middle(pipe, rank):
    pipe.transformer.transformer_blocks[1].ff.net[2].weight.data[3, 4] += 0.1 * rank


def processor(pipe, rank):
    pipe.transformer.transformer_blocks[1].attn.processor.scale = rank


DIFFERENCES = {
    "lora_weights": "model weights or adapters",
    "weight_in_the_middle": "model weights or adapters",
    "adapter_scale": "adapters in use, their scales",
    "processor": "attention processors",
}


def outcome(pipe, **kwargs):
    """(error, latents, seconds) of a call on this rank."""
    started = time.monotonic()
    try:
        found, error = call(pipe, name="sd3", **kwargs), ""
    except Exception as raised:
        found, error = None, f"{type(raised).__name__}: {raised}"
    return error, found, time.monotonic() - started


def differing(what):
    pipe = own("sd3")
    globals()[what](pipe, dist.get_rank())
    return outcome(apply_hybrid(pipe, HybridConfig(**CFG)))


@pytest.mark.parametrize("what", DIFFERENCES)
def test_ranks_that_differ_anywhere_are_told_so_on_every_rank(pair, what):
    for error, *_ in pair.run(differing, what):
        assert "the ranks started with different" in error and DIFFERENCES[what] in error


def reporting(folder):
    pipe = apply_hybrid(own("sd3"), HybridConfig(**CFG, report=f"{folder}/{dist.get_rank()}"))
    return outcome(pipe)


def test_the_folder_of_a_report_is_each_ranks_own_affair(pair, tmp_path):
    assert not any(error for error, *_ in pair.run(reporting, str(tmp_path)))
    assert (tmp_path / "0" / "report.json").exists()


# 6: what a CUDA graph does not see by itself.


def ip_adapter():
    return zoo_batched.CASES["sd15 ip-adapter"].build()


@parametrize(
    change={
        "an IP-Adapter's scale": lambda pipe: pipe.set_ip_adapter_scale(0.25),
        "TF32": lambda pipe: torch.set_float32_matmul_precision("high"),
        "an object in an attention processor": lambda pipe: setattr(
            next(iter(pipe.unet.attn_processors.values())), "masks", SimpleNamespace(of=[1, {"two": (3,)}])
        ),
    }
)
def test_a_graph_is_of_the_state_it_was_captured_in(tape, change):
    pipe = applied(ip_adapter(), {"policy": "cfg"})
    for _ in range(2):
        zoo_batched.call(pipe, "sd15 ip-adapter", num_inference_steps=3)
    captured = len(tape)
    precision = torch.get_float32_matmul_precision()
    try:
        change(pipe)
        zoo_batched.call(pipe, "sd15 ip-adapter", num_inference_steps=3)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert len(tape) > captured


def test_nothing_is_captured_where_attention_processors_keep_something(tape):
    pipe = zoo_batched.CASES["sd15 sag"].build()
    expected = zoo_batched.call(pipe, "sd15 sag")
    applied(pipe)
    assert [gap(zoo_batched.call(pipe, "sd15 sag"), expected) for _ in range(3)] == [0.0] * 3
    assert not tape


# 7: the user's random numbers.


def test_noise_without_a_generator_is_what_the_users_seed_gives(monkeypatch):
    pipe = own("sd15", EulerAncestralDiscreteScheduler)
    torch.manual_seed(5)
    expected = call(pipe, latents=tiny.noise("sd15"), generator=None)
    reseeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    torch.manual_seed(5)
    reseeded.clear()
    found = call(applied(pipe, dict(plan="FFFF", guidance="deferred")), latents=tiny.noise("sd15"), generator=None)
    assert gap(found, expected) < ROUNDING and not reseeded


# 8: guidance that changes.


@functools.cache
def emoji():
    checkpoint = resolve("emoji-sd3")
    pipe = DiffusionPipeline.from_pretrained(checkpoint.source, **dict.fromkeys(checkpoint.absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scales(weights):
    """A callback that sets the guidance scale of the next step."""

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = weights[min(step + 1, len(weights) - 1)]
        return {}

    return callback


def test_a_guidance_scale_that_changes_costs_no_accuracy():
    """Strong in a window, and weak on every fifth step."""
    weights = [1.05 if step % 5 == 4 else 7.5 if 9 <= step < 18 else 2.0 for step in range(28)]
    pipe = emoji()

    def picture():
        generator = torch.Generator().manual_seed(0)
        asked = dict(num_inference_steps=28, guidance_scale=weights[0], output_type="pt", generator=generator)
        return pipe("a red apple", callback_on_step_end=scales(weights), **asked).images

    expected = picture()
    with hybrid(pipe, simulate=True):
        found = picture()
        assert "S" in last_report(pipe)["plan"]
    assert -10 * (found - expected).square().mean().log10() > 45


# 9: attention processors that couple the branches.


class Shared:
    """Lets the samples of a batch see one another."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        hidden_states = (hidden_states + hidden_states.flip(0)) / 2
        return AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


def share_attention(pipe):
    pipe.unet.set_attn_processor(Shared())


def share_later(pipe, step, timestep, tensors):
    if step == 1:
        share_attention(pipe)
    return {}


LAYERS = {"whole": {"policy": "cfg"}, "PIPELINED": {"plan": "FFPF"}, "stages": {"policy": "cfg", "stages": 4}}


@parametrize(fields=LAYERS)
def test_branches_that_see_one_another_are_evaluated_together(fields, caplog):
    pipe = own("sd15")
    share_attention(pipe)
    expected = call(pipe)
    assert gap(call(applied(pipe, fields)), expected) < ROUNDING
    assert "see one another" in caplog.text


@parametrize(fields=LAYERS)
def test_branches_that_come_to_see_one_another_are_evaluated_together(fields, caplog):
    pipe = own("sd15")
    expected = call(pipe, callback_on_step_end=share_later)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert gap(call(applied(pipe, fields), callback_on_step_end=share_later), expected) < ROUNDING


# 11 and 12: the denoiser that the pipeline has now.


def offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_units(pipe):
    weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    accelerate.cpu_offload(pipe.unet, "cpu", state_dict=weights)


@pytest.mark.parametrize("first", ["offload", "apply"])
@parametrize(offload={"model": offload, "sequential": offload_units})
def test_an_offloaded_denoiser_is_evaluated_apart_on_every_call(first, offload, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "device", torch.device("cpu"))  # without a GPU it would be meta
    pipe = own("sd15")
    expected = call(pipe)
    if first == "offload":
        offload(pipe)
    applied(pipe, {"plan": "FFSF"})
    if first == "apply":
        offload(pipe)
    found = [call(pipe) for _ in range(2)]
    assert last_report(pipe)["plan"] == "FFSF"
    assert gap(found[0], found[1]) == 0 < gap(found[0], expected)
    assert hasattr(remove_hybrid(pipe).unet, "_hf_hook")
    assert gap(call(pipe), expected) < ROUNDING


@pytest.mark.parametrize("plan", ["FFSF", "FFPF"])
def test_a_denoiser_that_is_replaced_after_apply_is_the_one_that_runs(plan):
    pipe, other = own("sd15"), tiny.unet(block_out_channels=(8, 16, 16))
    applied(pipe, {"plan": plan})
    call(pipe)
    pipe.unet = other
    found, plain = call(pipe), own("sd15")
    assert last_report(pipe)["plan"] == plan
    plain.unet = copy.deepcopy(other)
    with hybrid(plain, HybridConfig(plan=plan), simulate=True):
        assert gap(found, call(plain)) == 0


@pytest.mark.parametrize("plan", ["FFSF", "FFPF"])
def test_a_denoiser_that_is_replaced_is_let_go(plan):
    pipe = applied(own("sd15"), {"plan": plan})
    call(pipe)
    before, pipe.unet = weakref.ref(pipe.unet), tiny.unet(block_out_channels=(8, 16, 16))
    call(pipe)
    gc.collect()
    assert before() is None


# 13: guidance in an interval.


def test_guidance_that_comes_on_later_is_taken_up(caplog):
    pipe = zoo_successive.CASES["hunyuan-video15-window"].build()
    expected = zoo_successive.call(pipe, "hunyuan-video15-window")
    assert gap(zoo_successive.call(applied(pipe), "hunyuan-video15-window"), expected) < 1e-4
    zoo_successive.call(applied(pipe, {"plan": "FFFFSFFF"}), "hunyuan-video15-window")
    assert last_report(pipe)["plan"] == "FFFFSFFF" and "guidance" not in caplog.text


# 15 is in 11. 16: taking off.


def dying():
    pipe, rank = own("sd3"), dist.get_rank()
    apply_hybrid(pipe, HybridConfig(plan="FFPPPF", balance="flops"))

    def die(pipe, step, timestep, tensors):
        if rank and step == 2:
            os._exit(3)
        return {}

    error, *_ = outcome(pipe, steps=6, callback_on_step_end=die)
    started = time.monotonic()
    remove_hybrid(pipe)
    parts = type(pipe).__name__, type(pipe) is type(own("sd3")), type(pipe.transformer) is type(own("sd3").transformer)
    return error, time.monotonic() - started, parts


def test_taking_off_waits_for_no_dead_rank():
    ranks = Ranks(2, group_timeout=5)
    try:
        error, seconds, parts = ranks.outcomes(dying)[0].value
    finally:
        ranks.close()
    assert "did not answer" in error and seconds < 1 and all(parts)


def state(pipe):
    modules = [pipe, pipe.scheduler, *pipe.transformer.modules()]
    return [(type(part), {key: id(value) for key, value in vars(part).items()}) for part in modules]


@parametrize(
    wrong={
        "report": lambda folder: dict(config=HybridConfig(report=f"{folder}/file/report")),
        "split": lambda folder: dict(sequence=SimpleNamespace(comm=None)),
        "stages": lambda folder: dict(config=HybridConfig(stages=64)),
    }
)
def test_an_apply_that_fails_leaves_nothing_behind(wrong, tmp_path):
    pipe = own("sd3")
    (tmp_path / "file").touch()
    before = state(pipe)
    with pytest.raises(Exception):  # noqa: B017
        apply_hybrid(pipe, simulate=True, **wrong(tmp_path))
        tiny.call(pipe, "sd3")
    remove_hybrid(pipe)
    assert [kind for kind, _ in state(pipe)] == [kind for kind, _ in before]


# 17: many schedulers.


def test_a_scheduler_that_is_replaced_is_let_go():
    pipe, gone = applied(own("sd3")), []
    for _ in range(3):
        call(pipe, 2, name="sd3")
        gone.append(weakref.ref(pipe.scheduler))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# 18: a rank alone stops.


def raises(pipe):
    raise FileNotFoundError("something of its own")


def interrupts(pipe):
    pipe._interrupt = True


def stopping(how, ranks, step, fields):
    """What a request came to in which some ranks stop after a step, and the next one."""
    pipe = apply_hybrid(own("sd3"), HybridConfig(**fields))

    def stop(pipe, i, timestep, tensors):
        if i == step and dist.get_rank() in ranks:
            globals()[how](pipe)
        return {}

    return *outcome(pipe, steps=8, callback_on_step_end=stop), outcome(pipe, steps=8)


STOPS = {"cfg": CFG, "skips": dict(plan="FFSSFSSF"), "pipelined": dict(plan="FFPPPFPF", balance="flops")}


@pytest.mark.parametrize("step", [0, 2, 6])
@parametrize(fields=STOPS)
@pytest.mark.parametrize("how", ["raises", "interrupts"])
def test_a_rank_that_stops_alone_ends_the_request_on_all_and_the_next_is_right(pair, how, fields, step):
    outcomes = pair.run(stopping, how, (1,), step, fields)
    expected = call(applied(own("sd3"), fields), 8, name="sd3")
    for rank, (error, _, seconds, (next_error, found, _)) in enumerate(outcomes):
        assert error.startswith("FileNotFoundError") if how == "raises" and rank else "left the run" in error, error
        assert seconds < 20 and not next_error and gap(found, expected) < ROUNDING


def test_an_interruption_of_all_ranks_is_a_normal_end(pair):
    for error, found, _, (next_error, *_) in pair.run(stopping, "interrupts", (0, 1), 2, CFG):
        assert not error and not next_error and found is not None


# 19: what is called outside a run, and pipelines with other attributes.


def test_a_t2i_adapter_is_taken():
    pipe = zoo_batched.CASES["sd15 t2i-adapter"].build()
    expected = zoo_batched.call(pipe, "sd15 t2i-adapter")
    assert gap(zoo_batched.call(applied(pipe), "sd15 t2i-adapter"), expected) < ROUNDING


def outside():
    """A denoiser called before, and on one rank after the timesteps are set."""
    pipe = apply_hybrid(own("sd15"), HybridConfig(**CFG))
    inputs = torch.ones(2, 4, 16, 16), 1, torch.ones(2, tiny.TOKENS, 24)
    with torch.no_grad():
        first = pipe.unet(*inputs).sample
        if dist.get_rank():
            pipe.scheduler.set_timesteps(4)
            pipe.unet(*inputs)
    return torch.equal(first, own("sd15").unet(*inputs).sample), call(pipe)


def test_a_denoiser_called_outside_a_run_is_plain(pair):
    expected = call(own("sd15"))
    for is_plain, found in pair.run(outside):
        assert is_plain and gap(found, expected) < ROUNDING


# 20: weights that are not in place when a part of the denoiser is evaluated.


def cast_layers(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def offload_groups(pipe):
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", 1)


@parametrize(weights={"fp8": cast_layers, "groups": offload_groups})
def test_weights_that_come_and_go_are_refused_where_layers_are_split_and_else_taken(weights):
    pipe = own("sd3")
    weights(pipe)
    expected = call(pipe, name="sd3")
    assert gap(call(applied(pipe), name="sd3"), expected) < ROUNDING
    applied(pipe, {"plan": "FFPF", "balance": "flops"})
    with pytest.raises(ValueError, match="--hybrid_kinds FS"):
        call(pipe, name="sd3")


# 21: a scheduler that makes NaN of anything.


def test_zero_terminal_snr_with_noise_prediction_is_said_clearly():
    pipe = own("sd15")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="signal-to-noise ratio of zero"):
        call(applied(pipe, {"plan": "FFSF"}))


# 22: noise that no generator= reaches.


def drawing_noise(same):
    pipe = own("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    torch.manual_seed(0 if same else dist.get_rank())
    return outcome(apply_hybrid(pipe, HybridConfig(**CFG)))


def test_ranks_whose_global_generators_differ_are_told_of_them(pair):
    assert all("torch.manual_seed" in error for error, *_ in pair.run(drawing_noise, False))
    assert not any(error for error, *_ in pair.run(drawing_noise, True))


# 23: what users put on.


class Bar:
    """A progress bar with the least that pipelines ask for."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, *_):
        pass


def test_a_progress_bar_of_few_methods_is_enough():
    pipe = own("sd3")
    pipe.progress_bar = lambda iterable=None, total=None: Bar()
    assert gap(call(applied(pipe), name="sd3"), call(own("sd3"), name="sd3")) < ROUNDING


def test_a_wrapper_of_the_users_is_called_and_stays():
    pipe, calls = applied(own("sd3")), []
    forward = pipe.transformer.forward

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    pipe.transformer.forward = wrapper
    call(pipe, name="sd3")
    assert len(calls) == 8  # four steps of two branches
    assert remove_hybrid(pipe).transformer.forward is wrapper


# 24: threads.


def test_one_run_at_a_time():
    pipe, errors = applied(own("sd3")), []
    expected = call(pipe, name="sd3")

    def again(pipe, step, timestep, tensors):
        def run():
            try:
                call(pipe, name="sd3")
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return {}

    assert gap(call(pipe, name="sd3", callback_on_step_end=again), expected) == 0
    assert len(errors) == 4 and all("One run at a time" in error for error in errors)


# 25: what all ranks capture, or none.


def capturing(fails_on):
    """(values of four calls, how often what this rank captured was replayed), where one rank cannot capture."""
    replays = []

    def capture(piece, pool):
        if dist.get_rank() == fails_on:
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = piece()

        def replay():
            replays.append(1)
            outputs.copy_(piece())

        return replay, outputs

    module = torch.nn.Linear(1, 1)
    with (
        mock.patch.object(graphs, "can_capture", lambda device: True),
        mock.patch.object(graphs, "_capture", capture),
        mock.patch.object(torch.cuda, "graph_pool_handle", lambda: None),
        torch.no_grad(),
    ):
        caller, found = graphs.Graphs(module, across=Comm()), []
        for i in range(4):
            caller.begin(torch.device("cpu"))
            caller.look()
            found.append(caller("piece", lambda x: 2 * x, torch.full((1,), float(i))).item())
    return found, len(replays)


@pytest.mark.parametrize(("fails_on", "replays"), [(None, 3), (0, 0), (1, 0)])
def test_ranks_that_split_tokens_all_capture_or_none(pair, fails_on, replays):
    assert pair.run(capturing, fails_on) == [([0.0, 2.0, 4.0, 6.0], replays)] * 2


# 27: what is summed on every step.


def summed():
    """Numbers of the latents and of all other inputs, and of what each checksum of a run was made of."""
    pipe = apply_hybrid(zoo_batched.CASES["sdxl controlnet"].build(), HybridConfig(**CFG))
    counts = []

    def counting(value):
        counts.append(sum(tensor.numel() for tensor in trees.tensors_of(value)))
        return checksum(value)

    with mock.patch.object(signals, "checksum", counting):
        zoo_batched.call(pipe, "sdxl controlnet", num_inference_steps=4)
    return counts


def test_a_step_sums_the_latents_alone(pair):
    for counts in pair.run(summed):
        assert set(counts) == {2 * 4 * 16 * 16} and 4 <= len(counts) <= 5


# 28: whose error it is.


def test_the_error_of_a_missing_rank_says_how_long_one_waits_and_that_nccl_has_none():
    with pytest.raises(RuntimeError, match=r"timeout=.*NCCL"), Solo().guard():
        raise RuntimeError("Connection closed by peer")


# Smaller ones.


@pytest.mark.parametrize("fields", [dict(cuda_graphs=False), dict(balance="flops"), {}], ids=str)
def test_only_time_is_measured_by_capturing_and_only_where_that_is_allowed(monkeypatch, fields):
    captured = []
    monkeypatch.setattr(executor, "can_capture", lambda device: True)
    monkeypatch.setattr(executor, "seconds_between", captured.append)
    call(applied(own("sd3"), dict(plan="FFPF", **fields)), name="sd3")
    assert bool(captured) == (not fields)


def test_compiled_blocks_leave_pytorchs_settings_as_they_are():
    import torch._inductor.config as settings

    from hybridiff_xdit.xdit.groups import compile_blocks

    before = settings.get_config_copy()
    compile_blocks(own("sd3").transformer)
    assert settings.get_config_copy() == before


def test_what_stands_in_for_xfusers_names_is_put_back():
    from hybridiff_xdit.xdit import compat

    compat.import_xfuser()
    compat.restore_xfuser()
    envs = importlib.import_module("xfuser.envs")
    before = envs._is_cuda, envs.get_torch_distributed_backend
    for _ in range(2):
        compat.import_xfuser()
        assert envs.get_torch_distributed_backend() == "gloo"
    compat.restore_xfuser()
    assert (envs._is_cuda, envs.get_torch_distributed_backend) == before
    compat.import_xfuser()


def test_pipelines_of_one_layout_share_its_groups(monkeypatch):
    from hybridiff_xdit.xdit import groups

    made, environment = [], Bar()
    monkeypatch.setattr(groups, "get_cfg_group", lambda: environment)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda ranks: made.append(ranks) or (object(), []))
    assert groups.stage_group(4, 2) is groups.stage_group(4, 2) is not groups.stage_group(8)
    assert len(made) == 2


class Renamed(SD3Transformer2DModel):
    """A user's subclass that adds nothing."""


class HandsOn(SD3Transformer2DModel):
    """One whose forward names no arguments."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@parametrize(kind={"renamed": Renamed, "hands on": HandsOn})
def test_a_users_subclass_of_a_denoiser_is_taken(kind):
    pipe, plain = own("sd3"), own("sd3")
    pipe.transformer = kind.from_config(plain.transformer.config).eval()
    pipe.transformer.load_state_dict(plain.transformer.state_dict())
    for fields in (CFG, dict(plan="FFSF"), dict(plan="FFPF", balance="flops")):
        assert gap(call(applied(pipe, fields), name="sd3"), call(applied(plain, fields), name="sd3")) < ROUNDING


def test_cfg_is_two_evaluations_of_batch_one_bit_for_bit():
    """In half precision another batch size rounds otherwise."""
    pipe, plain = own("sd3").to(torch.bfloat16), own("sd3").to(torch.bfloat16)
    forward = plain.transformer.forward

    def one_by_one(hidden_states, **kwargs):
        parts = [
            {key: value.chunk(2)[i] if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
            for i in range(2)
        ]
        outputs = [forward(x, **part)[0] for x, part in zip(hidden_states.chunk(2), parts, strict=True)]
        return (torch.cat(outputs),)

    plain.transformer.forward = one_by_one
    assert torch.equal(call(applied(pipe), name="sd3"), call(plain, name="sd3"))


# 14: flags.


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("sdxl", ["--max_sequence_length", "77"]),
        ("sdxl", ["--input_images", "cat.png"]),
        ("sd3-medium", ["--input_images", "cat.png"]),
        ("sd3-medium", ["--num_frames", "9"]),
    ],
)
@pytest.mark.parametrize("strategy", ["hybrid-cond", "cfg"])
def test_a_flag_without_effect_is_an_error(model, flags, strategy):
    from hybridiff_xdit.xdit import options

    argv = ["--model", model, "--prompt", "a cat", "--parallel", strategy, "--nproc_per_node", "2"]
    options.prepare(options.build_parser().parse_args(argv), gpus=8)
    with pytest.raises(ValueError, match=f"{flags[0]}: no effect"):
        options.prepare(options.build_parser().parse_args([*argv, *flags]), gpus=8)


def test_the_longest_prompt_of_sd3_is_handed_on(monkeypatch):
    from hybridiff_xdit.xdit import models

    given = {}
    model = object.__new__(models.DiffusersModel)
    model.pipe = SimpleNamespace(_execution_device="cpu")
    model.settings = SimpleNamespace(model_output_type="image")
    model._parameters = inspect.signature(StableDiffusion3Pipeline.__call__).parameters
    model._make = lambda call: given.update(call) or []
    monkeypatch.setattr(models, "get_data_parallel_world_size", lambda: 1)
    asked = dict(prompt=["a cat"], height=32, width=32, num_inference_steps=4, guidance_scale=5.0, seed=0)
    model._run_pipe({**asked, "max_sequence_length": 77})
    assert given["max_sequence_length"] == 77
