"""Everyone who skips: methods of others that leave out evaluations of the network, each on a stock diffusers pipeline.

`skipping` opens one of `METHODS` on a pipeline and counts what was evaluated.

- `DBCache`, `DBCache + TaylorSeer`, `first block`, `MagCache` and `SeaCache` are the code of cache-dit and diffusers.
  They leave out blocks of a transformer, and the share is that of the blocks' forwards.
- `DeepCache`, `Taylor 1`, `Taylor 2`, `Spectrum` and `delta reuse` are made here after their papers. They share one
  wrapper of the denoiser's forward. A rule says for each of its calls what is evaluated and what is estimated.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import DiffusionPipeline
from models import sample
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hybridiff_xdit.seam.hooks import denoiser_of

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported


@dataclass
class Work:
    """Forwards since `skipping` was opened: of the denoiser, or of its blocks where a method leaves out blocks."""

    done: float = 0.0  # evaluated
    asked: float = 0.0  # that a plain run evaluates

    @property
    def share(self) -> float:
        """Evaluated share of the network's forwards. It is 1 when nothing was skipped, and before the first call."""
        return self.done / self.asked if self.asked else 1.0


@dataclass(frozen=True)
class Method:
    """One way to skip."""

    parameter: str  # what its parameter is
    opened: Callable[[Any, Any, int, Work], AbstractContextManager[None]]  # of a pipeline: parameter, steps
    why_not: Callable[[Any], str]  # why it does not apply to a pipeline; empty where it does

    def applies(self, pipe: DiffusionPipeline) -> bool:
        """Whether the method can run on this pipeline."""
        return not self.why_not(pipe)


@contextmanager
def skipping(pipe: DiffusionPipeline, method: str, parameter: float, steps: int) -> Iterator[Work]:
    """While open, each `pipe(...)` of `steps` steps skips by that method. Afterwards the pipeline is as before.

    Args:
        pipe: a stock pipeline of diffusers.
        method: one of `METHODS`.
        parameter: its parameter, see `METHODS[method].parameter`.
        steps: denoising steps of every call of the pipeline.

    Raises:
        KeyError: there is no such method.
        ValueError: the method does not apply to this pipeline. A call of the pipeline raises it when it makes another
            number of steps.
    """
    if reason := METHODS[method].why_not(pipe):
        raise ValueError(f"{method} does not apply to {type(pipe).__name__}: {reason}")
    work = Work()
    with METHODS[method].opened(pipe, parameter, steps, work):
        yield work


@contextmanager
def _each_run(pipe: DiffusionPipeline, steps: int, begin: Callable[[], None]) -> Iterator[None]:
    """Calls `begin` when a call of the pipeline begins: then it sets the timesteps of its scheduler, and only then."""
    plain = pipe.scheduler.set_timesteps

    @wraps(plain)  # pipelines look at the names of the arguments
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        if (made := len(set(pipe.scheduler.timesteps.tolist()))) != steps:
            raise ValueError(f"skipping was opened for {steps} steps, and the pipeline makes {made}")
        begin()

    with patch.object(pipe.scheduler, "set_timesteps", set_timesteps):
        yield


# ---- methods that estimate the output: one wrapper of the denoiser's forward, and a rule each ----

Past = list[tuple[int, Tensor]]  # steps at which a branch was evaluated, and the outputs
WHOLE = slice(None)


@dataclass
class Call:
    """One call of the denoiser. Its branch is its place among the calls of its step, counted from 0."""

    step: int
    branch: int
    past: dict[int, Past]  # evaluations of this run, by branch
    given: dict[str, Any]  # the arguments by name
    evaluate: Callable[[slice], Tensor]  # the denoiser's output for a part of the batch


#: The output of a call, and the share of an evaluation that it took. None: evaluate it, and keep it in the past.
Rule = Callable[[Call], tuple[Tensor, float] | None]


@contextmanager
def _ruled(
    make: Callable[..., Rule], pipe: DiffusionPipeline, parameter: Any, steps: int, work: Work
) -> Iterator[None]:
    """While open, a rule says for every call of the denoiser what comes out.

    A step is one value of the timestep. So the solver may be of any order, and a pipeline may evaluate the two branches
    of guidance in one call or in two.
    """
    denoiser, rule, past = denoiser_of(pipe), make(pipe, parameter, steps), {}
    plain, signature = denoiser.forward, inspect.signature(denoiser.forward)
    step, branch, timestep, output_type = -1, 0, None, tuple

    def begin() -> None:
        nonlocal step, timestep
        step, timestep = -1, None
        past.clear()

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal step, branch, timestep, output_type
        given = signature.bind(*args, **kwargs).arguments
        size = len(next(iter(given.values())))  # of the batch: the first argument is the latents

        def evaluate(part: slice) -> Tensor:
            nonlocal output_type
            some = tree_map_only(Tensor, lambda x: x[part] if x.ndim and len(x) == size else x, (args, kwargs))
            output = plain(*some[0], **some[1])
            output_type = type(output)
            return output[0]

        before, timestep = timestep, torch.as_tensor(given["timestep"]).flatten()[0].item()
        step, branch = (step, branch + 1) if timestep == before else (step + 1, 0)
        made = rule(Call(step, branch, past, given, evaluate))
        if made is None:
            made = evaluate(WHOLE), 1.0
            past.setdefault(branch, []).append((step, made[0]))
        work.asked += 1
        work.done += made[1]
        return (made[0],) if output_type is tuple else output_type(sample=made[0])

    with _each_run(pipe, steps, begin), patch.object(denoiser, "forward", forward):
        yield


def extrapolated(past: Past, step: int, order: int) -> Tensor:
    """Taylor expansion in the step index about the last evaluation, as TaylorSeer's (arXiv 2503.06923).

    The derivatives are differences of the last `order + 1` evaluations, each divided by the steps between them.
    """
    at, values = zip(*past[-order - 1 :], strict=True)
    total, factor, distance = values[-1], 1.0, step - at[-1]
    for k in range(1, order + 1):
        values = [(b - a) / (t - s) for a, b, s, t in zip(values, values[1:], at, at[1:], strict=False)]
        at, factor = at[1:], factor * distance / k
        total = total + factor * values[-1]
    return total


def _taylor(order: int, pipe: DiffusionPipeline, interval: int, steps: int) -> Rule:
    """The first steps and the last are evaluated, and between them every `interval`-th."""
    first = max(3, round(steps / 8))

    def rule(call: Call) -> tuple[Tensor, float] | None:
        past = call.past.get(call.branch, [])
        is_due = call.step < first or call.step == steps - 1 or (call.step - first + 1) % interval == 0
        return None if is_due or len(past) <= order else (extrapolated(past, call.step, order), 0.0)

    return rule


def _spectrum(pipe: DiffusionPipeline, window: int, steps: int) -> Rule:
    """Spectrum (arXiv 2603.01623) with stable-diffusion.cpp's defaults: w, m, lambda, flex, warm-up, stop and memory.

    One of `window` steps is evaluated, and the window grows with each evaluation. An estimate is a mixture of the
    Chebyshev forecast and a linear extrapolation. As in stable-diffusion.cpp, the outputs are forecast. As in the code
    of the authors, who forecast the features before the last layer, the extrapolation is over the real distance.
    """
    mixture, degree, ridge, flex, first, stop, memory = 0.4, 3, 1.0, 0.5, 4, int(0.9 * steps), 6

    def forecast(past: Past, step: int) -> Tensor:
        """What polynomials of the step, fitted by ridge regression, give at another step."""
        taus = torch.tensor([*(at for at, _ in past), step], dtype=torch.float64) * 2 / steps - 1
        basis = torch.special.chebyshev_polynomial_t(taus[:, None], torch.arange(degree + 1))
        known, new = basis[:-1], basis[-1]
        weights = known @ torch.linalg.solve(known.T @ known + ridge * torch.eye(degree + 1, dtype=taus.dtype), new)
        return sum(weight * value for weight, (_, value) in zip(weights.tolist(), past, strict=True))

    def rule(call: Call) -> tuple[Tensor, float] | None:
        past = call.past.get(call.branch, [])
        if call.step < first or call.step >= stop or len(past) < 2:
            return None
        grown = int(window + flex * sum(at >= first for at, _ in past))
        if (call.step - past[-1][0]) % grown == 0:
            return None
        line = extrapolated(past, call.step, 1)
        return mixture * forecast(past[-memory:], call.step) + (1 - mixture) * line, 0.0

    return rule


def _delta_reuse(pipe: DiffusionPipeline, share: float, steps: int) -> Rule:
    """After a share of the run, the branch without the prompt is the one with it less their last difference.

    It is SGLang's `--cfg-gate-step`. A step without that branch counts as half an evaluation. A pipeline of two calls a
    step evaluates the branch with the prompt first; one of a single call puts it second in the batch.
    """

    def rule(call: Call) -> tuple[Tensor, float] | None:
        if call.step < max(1, int(share * steps)):
            return None
        if 1 in call.past and call.past[1][0][0] == 0:  # two calls on the first step too: one a branch
            if call.branch % 2 == 0 or call.branch not in call.past:
                return None
            last, without = call.past[call.branch][-1]
            prompted = dict(call.past[call.branch - 1])
            return prompted[call.step] - (prompted[last] - without), 0.0
        latents = next(iter(call.given.values()))
        if len(latents) % 2 or not torch.equal(*latents.chunk(2)):
            raise ValueError("the pipeline runs without guidance, so there is no difference to reuse")
        without, prompted = call.past[0][-1][1].chunk(2)
        now = call.evaluate(slice(len(latents) // 2, None))
        return torch.cat([now - (prompted - without), now]), 0.5

    return rule


CPU_ATTENTION = {  # which the counter of operations does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def _deepcache(pipe: DiffusionPipeline, interval: int, steps: int) -> Rule:
    """DeepCache (arXiv 2312.00858), uniform: every `interval`-th step is evaluated, from the first on.

    Any other step runs the outermost layers, and takes what comes up from below from the last evaluation. The share is
    that of the floating-point operations.
    """
    below: dict[int, Tensor] = {}  # by branch
    operations: dict[str, int] = {}  # of an evaluation, and of the outermost layers

    def counted(name: str, make: Callable[[], Tensor]) -> Tensor:
        if name in operations:  # the counter slows a forward down
            return make()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            made = make()
        operations[name] = counter.get_total_flops()
        return made

    def rule(call: Call) -> tuple[Tensor, float]:
        if call.step % interval:
            made = counted("outer", partial(outer_layers, pipe.unet, below[call.branch], call.given))
            return made, operations["outer"] / operations["all"]

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            below[call.branch] = args[0][:, : -pipe.unet.conv_in.out_channels]  # without the skip

        handle = pipe.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(keep)
        try:
            return counted("all", partial(call.evaluate, WHOLE)), 1.0
        finally:
            handle.remove()

    return rule


def outer_layers(unet: nn.Module, below: Tensor, given: dict[str, Any]) -> Tensor:
    """A U-Net's output, of which only the convolution that comes first, the last layer and the end are run.

    That is branch 0, the default of the authors' `DeepCacheSDHelper`. Their branch 1 runs one more layer on either
    side. On our models such a step took twice or three times as much, and the pictures came no closer.

    Args:
        unet: a `UNet2DConditionModel`.
        below: what enters the last layer from below, [batch, channels, height, width].
        given: the arguments of its forward, by name.
    """
    text, added, last = given["encoder_hidden_states"], given.get("added_cond_kwargs"), unet.up_blocks[-1]
    time = unet.time_embedding(unet.get_time_embed(given["sample"], given["timestep"]), given.get("timestep_cond"))
    more = unet.get_aug_embed(time, text, added)
    x = torch.cat([below, unet.conv_in(given["sample"])], dim=1)
    x = last.resnets[-1](x, time if more is None else time + more)
    if hasattr(last, "attentions"):
        x = last.attentions[-1](x, unet.process_encoder_hidden_states(text, added), return_dict=False)[0]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


# ---- methods that leave out blocks of a transformer: code of others ----


@contextmanager
def _blocks_counted(pipe: DiffusionPipeline, work: Work) -> Iterator[None]:
    """Counts the forwards of a transformer's blocks, and those that a plain run makes."""
    blocks = [block for name in ("transformer_blocks", "blocks") for block in getattr(pipe.transformer, name, ())]

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)  # cache-dit looks at the names of the arguments
        def forward(*args: Any, **kwargs: Any) -> Any:
            work.done += 1
            return plain(*args, **kwargs)

        return forward

    def ask(*_: Any) -> None:
        work.asked += len(blocks)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(patch.object(block, "forward", counting(block.forward)))
        stack.callback(pipe.transformer.register_forward_pre_hook(ask).remove)
        yield


@contextmanager
def _dbcache(order: int, pipe: DiffusionPipeline, threshold: float, steps: int, work: Work) -> Iterator[None]:
    """cache-dit's cache behind the first block. It knows itself which pipelines call the network once a branch."""
    cache_dit = import_module("cache_dit")
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 8}
    config = cache_dit.DBCacheConfig(**settings, residual_diff_threshold=threshold)
    # SD3's last block puts out no text, which the calibrator of the text takes for an error; nothing reads it anyway.
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order, enable_encoder_calibrator=False)
    with _blocks_counted(pipe, work), _each_run(pipe, steps, lambda: None):
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator if order else None)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)
            vars(pipe.transformer).pop("forward", None)  # it leaves one there


@contextmanager
def _of_diffusers(name: str, pipe: DiffusionPipeline, threshold: float, steps: int, work: Work) -> Iterator[None]:
    config = partial(getattr(diffusers, name), threshold=threshold)
    if name == "MagCacheConfig":
        config = partial(config, num_inference_steps=steps, mag_ratios=_ratios(pipe, steps))
    with _blocks_counted(pipe, work), _each_run(pipe, steps, pipe.transformer._reset_stateful_cache):
        pipe.transformer.enable_cache(config())
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


def _ratios(pipe: DiffusionPipeline, steps: int) -> Tensor:
    """What MagCache's calibration prints for the last two of the model's prompts and other noise, [steps]."""
    given = sample.arguments(pipe, sample.prompts_of(pipe)[-2:], guidance=5.0)
    generator = torch.Generator("cpu").manual_seed(1000)
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        with redirect_stdout(StringIO()) as printed:
            pipe(**given, num_inference_steps=steps, generator=generator)
    finally:
        pipe.transformer.disable_cache()
    branches = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return torch.tensor(branches).mean(0)


# ---- all of them ----


def _any(pipe: DiffusionPipeline) -> str:
    return ""


def _no_unet(pipe: DiffusionPipeline) -> str:
    return "" if hasattr(pipe, "unet") else "it is made for U-Nets"


def _no_cache_dit(pipe: DiffusionPipeline) -> str:
    if hasattr(pipe, "unet"):
        return "cache-dit caches transformers"
    if not find_spec("cache_dit"):
        return "cache-dit is not installed"
    return "" if import_module("cache_dit").BlockAdapterRegister.is_supported(pipe) else "cache-dit does not know it"


def _no_cache_of_diffusers(name: str, pipe: DiffusionPipeline) -> str:
    if not hasattr(diffusers, name):
        return f"this version of diffusers has no {name}"
    if not hasattr(denoiser_of(pipe), "enable_cache"):
        return f"diffusers has no cache for {type(denoiser_of(pipe)).__name__}"
    if name == "SeaCacheConfig" and not isinstance(pipe.transformer, diffusers.WanTransformer3DModel):
        return "only Wan's pipeline tells SeaCache its step and noise level"
    return ""


def _diffusers(name: str, parameter: str) -> Method:
    return Method(parameter, partial(_of_diffusers, name), partial(_no_cache_of_diffusers, name))


CHANGE, INTERVAL = "threshold of the relative change behind the first block", "steps from one evaluation to the next"
METHODS = {
    "DBCache": Method(CHANGE, partial(_dbcache, 0), _no_cache_dit),
    "DBCache + TaylorSeer": Method(CHANGE, partial(_dbcache, 1), _no_cache_dit),
    "first block": _diffusers("FirstBlockCacheConfig", CHANGE),
    "MagCache": _diffusers("MagCacheConfig", "threshold of the accumulated error"),
    "SeaCache": _diffusers("SeaCacheConfig", "threshold of the accumulated change"),
    "DeepCache": Method(INTERVAL, partial(_ruled, _deepcache), _no_unet),
    "Taylor 1": Method(INTERVAL, partial(_ruled, partial(_taylor, 1)), _any),
    "Taylor 2": Method(INTERVAL, partial(_ruled, partial(_taylor, 2)), _any),
    "Spectrum": Method("steps in the first window, one of them evaluated", partial(_ruled, _spectrum), _any),
    "delta reuse": Method("share of the run from which one branch is evaluated", partial(_ruled, _delta_reuse), _any),
}
