"""Every call pattern of diffusers under `hybrid-cond`: against the pipeline itself, and against a plain loop."""

import copy
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import plain_loop
import pytest
import tiny
import torch
import torch.distributed as dist
import zoo_batched
import zoo_successive
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

W5 = {2: (-4.0, 5.0)}  # [uncond, cond], w = 5
PLAN = "FFFSFSFF"


class Expected(NamedTuple):
    """What is known of a case from what its pipeline documents.

    Attributes:
        forwards: of the denoiser on each of two ranks, with every step FULL.
        shares: weights of the streams in the scheduler's input, by number of streams; None where the pipeline
            normalises, or weighs the streams in another way on every step.
        parts: streams that are one batch.
        plan: with SKIPPED steps, as it is run.
        warns: why the denoiser is evaluated whole on every rank, or a rank evaluates nothing.
        pictures: in a call.
        tokens: of a picture, where the streams of a step have different ones in front of them.
        zoo: the case of the zoo that it varies.
        prepare: what is changed of the pipeline.
        changes: further arguments of the call.
    """

    forwards: tuple[int, int]
    shares: dict[int, tuple[float, ...]] | None = W5
    parts: int = 1
    plan: str = PLAN
    warns: str | None = None
    pictures: int = 1
    tokens: int | None = None
    zoo: str | None = None
    prepare: Callable[[Any], None] = lambda pipe: None
    changes: Callable[[Any], dict] = lambda pipe: {}


def batched(shares: dict | None = W5, forwards: tuple[int, int] = (8, 8), parts: int = 2, **more: Any) -> Expected:
    return Expected(forwards, shares, parts, **more)


def successive(w: float | None, forwards: tuple[int, int] = (9, 9), **more: Any) -> Expected:
    """cond, then uncond; on the first step every rank evaluates both."""
    return Expected(forwards, None if w is None else {2: (w, 1 - w)}, **more)


PAG = "evaluated whole on every rank, since its attention processors (perturbed-attention guidance)"
#: Perturbed-attention and skip-layer guidance beside w = 5.
THREE = {2: (-4.0, 5.0), 3: (-4.0, 5.0 + 3.0, -3.0)}
SKIP = {2: (-4.0, 5.0), 3: (-4.0, 5.0 + 2.8, -2.8)}


def guided_by(*changes: tuple[int, float], texts: tuple[str, ...] = ()) -> Callable[[Any], dict]:
    """A callback that sets w at the end of steps; ``texts`` are cut to cond's where there is no guidance."""

    def arguments(pipe: Any) -> dict:
        kept: dict[str, torch.Tensor] = {}

        def callback(pipe: Any, step: int, time: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if step not in dict(changes):
                return given
            if not kept:
                kept.update(given)
            pipe._guidance_scale = dict(changes)[step]
            return kept if pipe._guidance_scale > 1 else {name: text.chunk(2)[1] for name, text in kept.items()}

        return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[*texts])

    return arguments


def sd3_with(function: Callable[[Any], dict]) -> Callable[[Any], dict]:
    return lambda pipe: dict(skip_guidance_layers=None, **function(pipe))


def heun(pipe: Any) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)


def lora(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))


def offloaded(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload`, which insists on an accelerator."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=torch.device("cpu"))


#: Guidance is off on steps 4 and 5 of ten. FULL steps on which it changes have a debt to pay.
OFF = ((3, 1.0), (5, 5.0))
SD3_TEXTS = ("prompt_embeds", "pooled_prompt_embeds")

CASES: dict[str, Expected] = {
    # One batch.
    "kolors": batched(),
    "cogvideox": batched({2: (-5.0, 6.0)}),
    "cogvideox dpm": batched({2: (-5.0, 6.0)}),
    "pixart": batched({2: (-3.5, 4.5)}),
    "sana": batched(),
    "auraflow": batched(),
    "ltx": batched({2: (-2.0, 3.0)}),
    "stable audio": batched(),
    "z-image": batched({2: (6.0, -5.0)}),  # [cond, uncond], cond + 5 (cond - uncond)
    "z-image truncated": batched({2: (6.0, -5.0)}),
    "sd15 pag": batched(THREE, parts=3, warns=PAG),
    "sdxl pag": batched(THREE, parts=3, warns=PAG),
    "sd3 pag": batched(THREE, parts=3, warns=PAG),
    "instruct pix2pix": batched(
        None,
        parts=3,
        plan="F" * 8,
        warns="evaluated whole on every rank, since its batch is not made of parts that share the latents",
    ),
    "sd15 sag": batched(None, forwards=(16, 16), parts=1, plan="F" * 8, warns="keep something of what they see"),
    "text to video": batched(),
    "animatediff": batched(),
    # [uncond, cond], then a perturbed one and one without the other modality; rescaled by 0.7
    "ltx2": batched(None, forwards=(17, 17)),
    # Steps 1 to 4 have a third stream, rank 0's; it is evaluated for nothing on step 5, and on every rank on step 1.
    "sd3 skip layers": batched(SKIP, forwards=(13, 9)),
    "sdxl controlnet": batched(),
    "sd15 t2i-adapter": batched(),
    "sd15 ip-adapter": batched(),
    "sdxl ip-adapter": batched(),
    "sdxl base": batched(forwards=(4, 4), plan="FFSF"),
    "sdxl refiner": batched(forwards=(4, 4), plan="FFSF"),
    "sd3 img2img": batched(forwards=(6, 6), plan="FFFSFF"),
    "sd3 inpaint": batched(forwards=(6, 6), plan="FFFSFF"),
    # Calls named by a cache context.
    "qwen": successive(None),
    "qwen-edit": successive(None),
    "wan21-unipc": successive(5.0),
    "wan21-euler": successive(5.0),
    "wan22": successive(5.0, forwards=(10, 10)),
    "wan21-i2v": successive(5.0),
    "wan22-i2v": successive(5.0, forwards=(10, 10)),
    "wan22-ti2v": successive(5.0),
    "wan21-vace": successive(5.0),
    "ideogram4": successive(None, tokens=16),  # w changes; its branches are of two sizes
    "hunyuan-video": successive(4.0),
    "cosmos3": successive(6.0),
    "cogview4": successive(5.0),
    "flux-true-cfg": successive(4.0),
    "flux": successive(None, forwards=(8, 8), warns="1 had nothing of its own to evaluate"),
    "flux2-klein": successive(4.0),
    # Calls without a name.
    "lumina2": successive(None),
    "lumina2-truncated": successive(None),
    "krea2": successive(4.0),  # cond + 3 (cond - uncond)
    "kandinsky5": successive(5.0),
    "cosmos2": successive(None),
    # A guider's loop.
    "hunyuan-video15": successive(6.0),
    "hunyuan-video15-window": successive(6.0),
    "hunyuan-image": successive(None),
    "modular-wan": successive(5.0),
    "modular-z-image": successive(4.0),
    # Guidance that changes within a run. (A guider's window is above.) Where it goes off, one evaluation is for
    # nothing, where it comes on, every rank evaluates both once.
    "sd3 off and on": batched(
        zoo="sd3 skip layers",
        forwards=(10, 10),
        plan="FFFSFSFSFF",
        changes=sd3_with(lambda pipe: dict(num_inference_steps=10, **guided_by(*OFF, texts=SD3_TEXTS)(pipe))),
    ),
    "wan off and on": successive(
        5.0,
        zoo="wan21-unipc",
        forwards=(12, 12),
        plan="FFFSFSFSFF",
        changes=lambda pipe: dict(num_inference_steps=10, **guided_by(*OFF)(pipe)),
    ),
    "kandinsky5 off and on": successive(
        5.0,
        zoo="kandinsky5",
        forwards=(12, 12),
        plan="FFFSFSFSFF",
        changes=lambda pipe: dict(num_inference_steps=10, **guided_by(*OFF)(pipe)),
    ),
    "sd3 another w": batched(
        None, zoo="sd3 skip layers", changes=sd3_with(guided_by((3, 8.0), (4, 3.0), texts=SD3_TEXTS))
    ),
    "wan another w": successive(None, zoo="wan21-euler", changes=guided_by((3, 8.0), (4, 3.0))),
    # Two evaluations a timestep but the last.
    "sd3 heun": batched(
        zoo="sd3 skip layers",
        forwards=(9, 9),
        plan="FFFFSFSFF",
        prepare=heun,
        changes=sd3_with(lambda pipe: dict(num_inference_steps=5)),
    ),
    "kandinsky5 heun": successive(
        5.0,
        zoo="kandinsky5",
        forwards=(10, 10),
        plan="FFFFSFSFF",
        prepare=heun,
        changes=lambda pipe: dict(num_inference_steps=5),
    ),
    "two pixart": batched({2: (-3.5, 4.5)}, zoo="pixart", pictures=2),
    "two z-image": batched({2: (6.0, -5.0)}, zoo="z-image", pictures=2),
    "qwen lora": successive(None, zoo="qwen", prepare=lora),
    "sd15 offloaded": batched(zoo="sd15 t2i-adapter", prepare=offloaded),
}


def zoo_of(name: str) -> Any:
    return zoo_batched if name in zoo_batched.CASES else zoo_successive


def flat(latents: Any) -> list[torch.Tensor]:
    return list(latents) if isinstance(latents, tuple) else [latents]


# --- on a rank


def build(name: str) -> tuple[Any, Callable[[], list[torch.Tensor]]]:
    """The pipeline of a case, and what calls it."""
    case = CASES[name]
    zoo, zoo_name = zoo_of(case.zoo or name), case.zoo or name
    pipe = zoo.CASES[zoo_name].build()
    case.prepare(pipe)
    count = {"count": case.pictures} if case.pictures > 1 else {}

    def run() -> list[torch.Tensor]:
        return [latents.clone() for latents in flat(zoo.call(pipe, zoo_name, **count, **case.changes(pipe)))]

    return pipe, run


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    return [part for name in plain_loop.DENOISERS if (part := getattr(pipe, name, None)) is not None]


@contextmanager
def counted(pipe: Any) -> Iterator[list[Any]]:
    """The denoisers' forwards."""
    seen: list[Any] = []
    handles = [part.register_forward_hook(lambda module, *_: seen.append(module)) for part in denoisers(pipe)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Ears(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def hybrid(pipe: Any, run: Callable[[], list[torch.Tensor]], config: dict[str, Any], **kwargs: Any) -> SimpleNamespace:
    """A run under `hybrid-cond`. (Not of a class of this file: it could not be sent from a rank.)"""
    ears, logger = Ears(), logging.getLogger("hybridiff_xdit")
    logger.addHandler(ears)
    apply_hybrid(pipe, HybridConfig(**config), **kwargs)
    try:
        with counted(pipe) as seen:
            latents = run()
        return SimpleNamespace(latents=latents, forwards=len(seen), report=last_report(pipe), logged=ears.heard)
    finally:
        remove_hybrid(pipe)
        logger.removeHandler(ears)


@contextmanager
def alone() -> Iterator[None]:
    """As where there is one process."""
    with mock.patch.object(dist, "is_initialized", lambda: False), mock.patch.dict(os.environ, WORLD_SIZE="1"):
        yield


def traces(pipe: Any) -> dict[str, Any]:
    """What `apply_hybrid` might leave behind."""
    found: dict[str, Any] = {"pipeline": (type(pipe), sorted(vars(pipe)))}
    found["scheduler"] = type(pipe.scheduler), sorted(vars(pipe.scheduler))
    for denoiser in denoisers(pipe):
        for name, module in denoiser.named_modules():
            own = {key: id(value) for key, value in vars(module).items() if not isinstance(value, dict)}
            hooks = [list(value) for key, value in vars(module).items() if key.endswith("hooks")]
            registry = vars(module).get("_diffusers_hook")
            found[f"{id(denoiser)} {name}"] = type(module), own, hooks, registry and list(registry.hooks)
    return found


def explore(name: str) -> dict[str, Any]:
    """All runs of a case. Those that need one process are shared out to the two ranks."""
    case, rank = CASES[name], dist.get_rank()
    pipe, run = build(name)
    with counted(pipe) as seen:
        plain = run()
    found: dict[str, Any] = {"plain": SimpleNamespace(latents=plain, forwards=len(seen))}
    before = traces(pipe)
    found["cfg"] = hybrid(pipe, run, {"policy": "cfg"})
    found["fixed"] = hybrid(pipe, run, {"plan": case.plan})
    found["default"] = hybrid(pipe, run, {})
    found["left"] = [key for key, value in traces(pipe).items() if value != before[key]]
    found["again"] = run()
    if rank == 0:
        with plain_loop.inside(pipe, case.plan, case.shares, case.pictures, case.tokens) as loop:
            found["oracle"] = run()
        found["loop"] = loop.kinds, loop.evaluated, loop.changes
        if case.parts > 1 and not case.warns:
            with plain_loop.forwards(pipe, partial(plain_loop.one_by_one, case.parts)):
                found["one by one"] = run()
        found["simulated"] = hybrid(pipe, run, {"policy": "cfg"}, simulate=True)
    else:
        with alone():
            found["alone"] = hybrid(pipe, run, {"policy": "cfg"})
            found["alone, fixed"] = hybrid(pipe, run, {"plan": case.plan})
    return found


# --- here


@pytest.fixture(scope="module")
def explored(pair) -> Callable[[str], dict[str, Any]]:
    """All runs of a case: rank 0's, with those of rank 1 alone among them, and under "other" all of rank 1's."""
    outcomes = cache(lambda name: pair.outcomes(explore, name))

    def of(name: str) -> dict[str, Any]:
        one, other = outcomes(name)
        assert not (one.error or other.error), one.error or other.error
        return {**other.value, **one.value, "other": other.value}

    return of


def far(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


every_case = pytest.mark.parametrize("name", CASES)


def test_every_case_of_the_zoos_is_here():
    assert {*zoo_batched.CASES, *zoo_successive.CASES} <= {*CASES}


@every_case
def test_with_every_step_full_nothing_is_approximated(explored, name):
    found = explored(name)
    cfg = found["cfg"]
    assert cfg.report["plan"] == "F" * len(CASES[name].plan)
    if CASES[name].parts == 1 or CASES[name].warns:
        assert same(cfg.latents, found["plain"].latents)
    else:
        assert far(cfg.latents, found["plain"].latents) < 1e-5
        assert same(cfg.latents, found["one by one"])
    assert same(cfg.latents, found["simulated"].latents)


@every_case
def test_ranks_have_the_same_picture(explored, name):
    found = explored(name)
    for kind in ("cfg", "fixed", "default"):
        assert same(found[kind].latents, found["other"][kind].latents), kind
        assert found[kind].report["plan"] == found["other"][kind].report["plan"]


@every_case
def test_a_rank_evaluates_its_share_and_says_where_it_cannot(explored, name):
    found, case = explored(name), CASES[name]
    assert (found["cfg"].forwards, found["other"]["cfg"].forwards) == case.forwards
    for rank in (found, found["other"]):
        logged = rank["cfg"].logged
        assert len(logged) == bool(case.warns)
        assert all(case.warns in text for text in logged)


@every_case
def test_skipped_steps_are_those_of_a_plain_loop(explored, name):
    found = explored(name)
    kinds, _, _ = found["loop"]
    assert found["fixed"].report["plan"] == kinds
    assert far(found["fixed"].latents, found["oracle"]) < 1e-5
    if "S" in kinds:
        assert far(found["fixed"].latents, found["plain"].latents) > 1e-4  # else nothing is tested


@every_case
def test_the_default_runs_and_leaves_no_trace(explored, name):
    found, case = explored(name), CASES[name]
    default = found["default"]
    assert len(default.report["plan"]) == default.report["num_steps"] == len(case.plan)
    assert default.forwards <= found["cfg"].forwards
    assert all(latents.isfinite().all() for latents in default.latents)
    for rank in (found, found["other"]):
        assert not rank["left"]
        assert same(rank["again"], rank["plain"].latents)


@every_case
def test_one_process(explored, name):
    found = explored(name)
    kinds, _, changes = found["loop"]
    assert same(found["alone"].latents, found["plain"].latents)
    assert found["plain"].forwards <= found["alone"].forwards <= found["plain"].forwards + changes
    assert not found["alone"].logged
    fixed = found["alone, fixed"]
    assert fixed.report["plan"] == kinds
    assert far(fixed.latents, found["oracle"]) < 1e-5
    if "S" in kinds:
        assert fixed.forwards < found["plain"].forwards


# --- what steps are, and what sees what


class Together(torch.nn.Module):
    """A denoiser that gives all samples something of the first one's text."""

    def forward(self, hidden_states, timestep, text):
        return (torch.sin(hidden_states + text[:, :1, None] + text[:1, :1, None] + timestep / 1000),)


def test_a_denoiser_that_nobody_knows_is_tried():
    pipe = Unlike(Together(), torch.nn.Identity(), FlowMatchEulerDiscreteScheduler())
    plain = pipe(None)
    found = [hybrid(pipe, lambda: [pipe(None)], {"policy": "cfg"}, simulate=True) for _ in range(2)]
    assert all(same(one.latents, [plain]) for one in found)
    assert ["it lets the samples of its batch see one another" in text for text in found[0].logged] == [True]


class Apart(torch.nn.Module):
    def forward(self, hidden_states, timestep, text):
        return (torch.sin(hidden_states + text[:, :1, None] + 2 * text[:, 1:2, None] + timestep / 1000),)


def test_a_batch_may_have_four_streams():
    pipe = Unlike(Apart(), torch.nn.Identity(), FlowMatchEulerDiscreteScheduler())
    found = hybrid(pipe, lambda: [pipe(None, streams=4)], {"plan": PLAN}, simulate=True)
    assert (found.report["plan"], found.logged) == (PLAN, [])
    assert found.report["speedup_bound"] == pytest.approx(2 * len(PLAN) / PLAN.count("F"))
    assert found.forwards == 4 * PLAN.count("F") - 1  # halves on the first step, and those once as a batch
    exact = hybrid(pipe, lambda: [pipe(None, streams=4)], {"policy": "cfg"}, simulate=True)
    assert far(exact.latents, [pipe(None, streams=4)]) < 1e-5


def test_a_pipeline_that_steps_a_copy_of_its_scheduler_is_left_alone():
    pipe = Unlike(Apart(), torch.nn.Identity(), FlowMatchEulerDiscreteScheduler())
    for steps, warnings in ((8, 0), (70, 1)):
        found = hybrid(pipe, lambda n=steps: [pipe(None, steps=n, copies=True)], {}, simulate=True)
        assert same(found.latents, [pipe(None, steps=steps)]) and found.forwards == steps + 2
        assert ["does not step its scheduler" in text for text in found.logged] == [True] * warnings


class Counting:
    """An attention processor that counts its calls, as prompt-to-prompt's do."""

    def __init__(self):
        self.controller = SimpleNamespace(calls=0)

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.controller.calls += 1
        return (1 + 0.1 * (self.controller.calls % 7)) * AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("how", [{"simulate": True}, {}], ids=["two ranks", "one process"])
def test_a_processor_that_counts_sees_the_calls_of_the_pipeline_alone(how):
    def run():
        pipe.unet.set_attn_processor(Counting())
        return [tiny.call(pipe, "sd15")]

    pipe = tiny.sd15()
    pipe.set_progress_bar_config(disable=True)
    plain = run()
    found = hybrid(pipe, run, {"plan": "FFFFSFSFFF"}, **how)
    assert same(found.latents, plain) and found.report["plan"] == "F" * 10
    assert ["keep something" in text for text in found.logged] == [True]


@pytest.mark.parametrize(("views", "plan"), [(1, PLAN), (2, "F")])
def test_a_scheduler_that_steps_once_a_view_ends_the_run(views, plan):
    pipe = StableDiffusionPanoramaPipeline.from_pipe(tiny.sd15())
    pipe.vae_scale_factor = 8  # its views are 64 latents wide
    pipe.set_progress_bar_config(disable=True)
    text = tiny.prompt("sd15")

    def run():
        generator = torch.Generator().manual_seed(0)
        settings = dict(height=64, width=448 + 64 * views, num_inference_steps=8, guidance_scale=5.0)
        return [pipe(**text, **settings, generator=generator, output_type="latent").images]

    plain = run()
    found = hybrid(pipe, run, {"plan": PLAN}, simulate=True)
    assert found.report["plan"] == plan
    assert (far(found.latents, plain) < 1e-5) == (views == 2)
    assert ["several times at timestep" in text for text in found.logged] == [True] * (views == 2)


# --- branches of two sizes


class Mixer(torch.nn.Module):
    """A denoiser whose tokens see one another."""

    def forward(self, hidden_states, timestep):
        mixed = hidden_states.cumsum(1) / hidden_states.shape[1] + 0.1 * torch.arange(hidden_states.shape[1])[:, None]
        return (torch.sin(mixed + timestep / 1000),)


class Unlike(DiffusionPipeline):
    """Its cond has places for the text in front, and these are what it weighs, or the picture's; or a batch (None)."""

    def __init__(self, transformer, unconditional_transformer, scheduler):
        super().__init__()
        modules = dict(transformer=transformer, unconditional_transformer=unconditional_transformer)
        self.register_modules(**modules, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, places, streams=2, steps=8, copies=False):
        latents = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
        self.scheduler.set_timesteps(steps)
        scheduler = copy.deepcopy(self.scheduler) if copies else self.scheduler
        for time in self.scheduler.timesteps:
            if places is None:
                batch = self.transformer(torch.cat([latents] * streams), time, torch.eye(streams))[0]
                uncond, cond, *others = batch.chunk(streams)
                uncond = uncond - sum(0.3 * (cond - other) for other in others)
            else:
                cond = self.transformer(torch.cat([torch.zeros(1, 12, 4), latents], dim=1), time)[0][:, places]
                uncond = self.unconditional_transformer(latents, time)[0]
            latents = scheduler.step(uncond + 5 * (cond - uncond), time, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize(("places", "plan"), [(slice(12, None), PLAN), (slice(16), "F" * 8)], ids=["last", "first"])
def test_the_tokens_that_are_estimated_are_those_that_the_pipeline_weighs(places, plan):
    pipe = Unlike(Mixer(), Mixer(), FlowMatchEulerDiscreteScheduler())
    plain = pipe(places)
    found = hybrid(pipe, lambda: [pipe(places)], {"plan": PLAN}, simulate=True)
    assert found.report["plan"] == plan
    assert same(found.latents, [plain]) == (plan == "F" * 8)
    assert far(found.latents, [plain]) < 0.05
    assert any("does not weigh the last tokens" in text for text in found.logged) == (plan == "F" * 8)


# --- what comes and goes around a run


def offload_while_applied() -> tuple[bool, bool]:
    """On a rank: weights that are moved in and out from after `apply_hybrid` to before `remove_hybrid`."""
    pipe = tiny.pipeline("sd15")
    plain = tiny.call(pipe, "sd15")
    apply_hybrid(pipe, HybridConfig(policy="cfg"))
    offloaded(pipe)
    try:
        within = tiny.call(pipe, "sd15")
    finally:
        for part in (pipe.unet, pipe.vae):
            remove_hook_from_module(part, recurse=True)
        remove_hybrid(pipe)
    return far([within], [plain]) < 1e-5, same([tiny.call(pipe, "sd15")], [plain])


def relatives(first_off: int) -> list[Any]:
    """On a rank: two pipelines of the same parts; which of their runs have evaluated half, and the bits of plain."""
    pipe = tiny.sd15()
    pipes = [pipe, StableDiffusionPipeline.from_pipe(pipe)]
    batches: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))

    def halves() -> list[bool]:
        found = []
        for one in pipes:
            one.set_progress_bar_config(disable=True)
            batches.clear()
            tiny.call(one, "sd15", num_inference_steps=3)
            found.append({*batches} == {1})
        return found

    plain = tiny.call(pipe, "sd15", num_inference_steps=3)
    seen = [halves()]
    for one in pipes:
        apply_hybrid(one, HybridConfig(policy="cfg"))
        seen.append(halves())
    for one in (pipes[first_off], pipes[1 - first_off]):
        remove_hybrid(one)
        seen.append(halves())
    handle.remove()
    return [seen, same([tiny.call(pipes[1], "sd15", num_inference_steps=3)], [plain])]


def test_weights_may_be_offloaded_after_it_was_applied(pair):
    assert pair.run(offload_while_applied) == [(True, True)] * 2


@pytest.mark.parametrize("first_off", [0, 1])
def test_it_holds_for_one_pipeline_of_several_that_share_their_parts(pair, first_off):
    off = [first_off == 1, first_off == 0]  # which are left on
    expected = [[False, False], [True, False], [True, True], off, [False, False]]
    assert pair.run(relatives, first_off) == [[expected, True]] * 2


def test_many_runs_leave_nothing_behind(one_thread, caplog):
    """Calls of several sizes, lengths and w on one pipeline."""
    caplog.set_level(logging.ERROR, "diffusers")  # it keeps what the pipeline says without guidance
    pipe, _ = build("qwen")
    apply_hybrid(pipe, HybridConfig(plan="FFS"))
    counts = []
    gc.collect()
    gc.freeze()  # what other tests have left is not counted
    for i in range(240):
        settings = dict(num_inference_steps=3, true_cfg_scale=(1.0, 3.0, 4.0)[i % 3])
        zoo_successive.call(pipe, "qwen", seed=i, height=(32, 64)[i % 2], width=(64, 32, 48, 80)[i % 4], **settings)
        if i % 60 == 59:
            gc.collect()
            held = gc.get_objects()
            tensors = [one for one in held if isinstance(one, torch.Tensor)]
            counts.append((len(tensors), sum(tensor.nbytes for tensor in tensors), len(held)))
            del held, tensors
    gc.unfreeze()
    remove_hybrid(pipe)
    assert counts[1][:2] == counts[3][:2]
    assert counts[3][2] < counts[1][2] + 100
