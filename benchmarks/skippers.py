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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, WanTransformer3DModel
from models import sample
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


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


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The network that a pipeline evaluates on every step."""
    return pipe.unet if _is_unet(pipe) else pipe.transformer


def _is_unet(pipe: DiffusionPipeline) -> bool:
    return getattr(pipe, "unet", None) is not None


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


@dataclass
class Call:
    """One call of the denoiser. Its branch is its place among the calls of its step, counted from 0."""

    step: int
    branch: int
    past: dict[int, Past]  # evaluations of this run, by branch
    given: dict[str, Any]  # the arguments by name
    evaluate: Callable[[slice], Tensor]  # the denoiser's output for a part of the batch


#: The output of a call, and the share of an evaluation that it took. None: evaluate all of it, and keep it in the past.
Rule = Callable[[Call], tuple[Tensor, float] | None]
WHOLE = slice(None)


@contextmanager
def ruled(pipe: DiffusionPipeline, rule: Rule, steps: int, work: Work) -> Iterator[None]:
    """While open, `rule` says for every call of the denoiser what comes out.

    A step is one value of the timestep. So the solver may be of any order, and a pipeline may evaluate the two branches
    of guidance in one call or in two.
    """
    denoiser = denoiser_of(pipe)
    plain, signature = denoiser.forward, inspect.signature(denoiser.forward)
    past: dict[int, Past] = {}
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


@contextmanager
def _taylor(order: int, pipe: DiffusionPipeline, interval: int, steps: int, work: Work) -> Iterator[None]:
    """The first steps and the last are evaluated, and between them every `interval`-th."""
    first = max(3, round(steps / 8))

    def rule(call: Call) -> tuple[Tensor, float] | None:
        past = call.past.get(call.branch, [])
        is_due = call.step < first or call.step == steps - 1 or (call.step - first + 1) % interval == 0
        return None if is_due or len(past) <= order else (extrapolated(past, call.step, order), 0.0)

    with ruled(pipe, rule, steps, work):
        yield


def chebyshev(past: Past, step: int, steps: int, degree: int, ridge: float) -> Tensor:
    """What polynomials of the step, fitted to the evaluations by ridge regression, give at another step."""
    taus = torch.tensor([*(at for at, _ in past), step], dtype=torch.float64) * 2 / steps - 1
    basis = torch.special.chebyshev_polynomial_t(taus[:, None], torch.arange(degree + 1))
    known, new = basis[:-1], basis[-1]
    weights = known @ torch.linalg.solve(known.T @ known + ridge * torch.eye(degree + 1, dtype=taus.dtype), new)
    return sum(weight * value for weight, (_, value) in zip(weights.tolist(), past, strict=True))


@contextmanager
def _spectrum(pipe: DiffusionPipeline, window: int, steps: int, work: Work) -> Iterator[None]:
    """Spectrum (arXiv 2603.01623) with stable-diffusion.cpp's defaults: w, m, lambda, flex, warm-up, stop and memory.

    One of `window` steps is evaluated, and the window grows with each evaluation. An estimate is a mixture of the
    Chebyshev forecast and a linear extrapolation. As in stable-diffusion.cpp, the outputs are forecast. As in the code of
    the authors, which forecasts the features before the last layer, the extrapolation is over the real distance.
    """
    mixture, degree, ridge, flex, first, stop, kept = 0.4, 3, 1.0, 0.5, 4, int(0.9 * steps), 6

    def rule(call: Call) -> tuple[Tensor, float] | None:
        past = call.past.get(call.branch, [])
        if call.step < first or call.step >= stop or len(past) < 2:
            return None
        now = int(window + flex * sum(at >= first for at, _ in past))
        if (call.step - past[-1][0]) % now == 0:
            return None
        fitted = chebyshev(past[-kept:], call.step, steps, degree, ridge)
        return mixture * fitted + (1 - mixture) * extrapolated(past, call.step, 1), 0.0

    with ruled(pipe, rule, steps, work):
        yield


@contextmanager
def _delta_reuse(pipe: DiffusionPipeline, share: float, steps: int, work: Work) -> Iterator[None]:
    """After a share of the run, the branch without the prompt is the one with it less their last difference.

    It is SGLang's `--cfg-gate-step`. A step without that branch counts as half an evaluation. A pipeline of two calls a
    step evaluates the branch with the prompt first; one of a single call puts it second in the batch.
    """

    def rule(call: Call) -> tuple[Tensor, float] | None:
        if call.step < max(1, int(share * steps)):
            return None
        if 1 in call.past:
            if call.branch == 0:
                return None
            last, without = call.past[1][-1]
            prompted = dict(call.past[0])
            return prompted[call.step] - (prompted[last] - without), 0.0
        latents = next(iter(call.given.values()))
        if len(latents) % 2 or not torch.equal(*latents.chunk(2)):
            raise ValueError("the pipeline runs without guidance, so there is no difference to reuse")
        without, prompted = call.past[0][-1][1].chunk(2)
        now = call.evaluate(slice(len(latents) // 2, None))
        return torch.cat([now - (prompted - without), now]), 0.5

    with ruled(pipe, rule, steps, work):
        yield


@contextmanager
def _deepcache(pipe: DiffusionPipeline, interval: int, steps: int, work: Work) -> Iterator[None]:
    """DeepCache (arXiv 2312.00858), uniform: every `interval`-th step is evaluated, from the first on.

    Any other step runs the outermost layers, and takes what comes up from below from the last evaluation. The share is
    that of the floating-point operations.
    """
    unet = pipe.unet
    below: dict[int, Tensor] = {}  # what came up from below, by branch
    flops: dict[str, int] = {}
    branch = 0

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        below[branch] = args[0][:, : -_skip_channels(unet)]

    def counted(name: str, make: Callable[[], Tensor]) -> Tensor:
        if name in flops:
            return make()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            made = make()
        flops[name] = counter.get_total_flops()
        return made

    def rule(call: Call) -> tuple[Tensor, float]:
        nonlocal branch
        branch = call.branch
        if call.step % interval == 0:
            return counted("all", partial(call.evaluate, WHOLE)), 1.0
        made = counted("outer", partial(outer, unet, below[branch], call.given))
        return made, flops["outer"] / flops["all"]

    handle = unet.up_blocks[-1].resnets[-LAYERS].register_forward_pre_hook(keep)
    try:
        with ruled(pipe, rule, steps, work):
            yield
    finally:
        handle.remove()


LAYERS = 2
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def _skip_channels(unet: nn.Module) -> int:
    return unet.conv_in.out_channels if LAYERS == 1 else unet.down_blocks[0].resnets[0].out_channels


def outer(unet: nn.Module, below: Tensor, given: dict[str, Any]) -> Tensor:
    """A U-Net's output where only its outermost layers are run.

    Args:
        unet: a `UNet2DConditionModel`.
        below: what comes up into the last layers, [batch, channels, height, width].
        given: the arguments of its forward, by name.
    """
    text, added = given["encoder_hidden_states"], given.get("added_cond_kwargs")
    time = unet.time_embedding(unet.get_time_embed(given["sample"], given["timestep"]), given.get("timestep_cond"))
    more = unet.get_aug_embed(time, text, added)
    time = time if more is None else time + more
    text = unet.process_encoder_hidden_states(text, added)

    def layer(block: nn.Module, index: int, x: Tensor) -> Tensor:
        x = block.resnets[index](x, time)
        return block.attentions[index](x, text, return_dict=False)[0] if hasattr(block, "attentions") else x

    skips = [unet.conv_in(given["sample"])]
    if LAYERS == 2:
        skips.append(layer(unet.down_blocks[0], 0, skips[0]))
    x = below
    for index in range(-LAYERS, 0):
        x = layer(unet.up_blocks[-1], index, torch.cat([x, skips[-index - 1]], dim=1))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


# ---- methods that leave out blocks of a transformer: code of others ----


@contextmanager
def _blocks_counted(pipe: DiffusionPipeline, work: Work) -> Iterator[None]:
    """Counts the forwards of a transformer's blocks, and those that a plain run makes."""
    names = ("transformer_blocks", "blocks")
    blocks = [block for name in names for block in getattr(pipe.transformer, name, ())]

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
    """cache-dit's cache, behind the first block. It knows itself which pipelines call the network once a branch."""
    cache_dit = import_module("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=8, residual_diff_threshold=threshold
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(
        taylorseer_order=order,
        enable_encoder_calibrator=False,  # SD3's last block has no text to calibrate, and no other model reads it
    )
    with _blocks_counted(pipe, work), _each_run(pipe, steps, lambda: None):
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator if order else None)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)
            vars(pipe.transformer).pop("forward", None)  # which it leaves there


@contextmanager
def _of_diffusers(
    config: Callable[[Any, int, float], Any], pipe: DiffusionPipeline, threshold: float, steps: int, work: Work
) -> Iterator[None]:
    settings = config(pipe, steps, threshold)
    with _blocks_counted(pipe, work), _each_run(pipe, steps, pipe.transformer._reset_stateful_cache):
        pipe.transformer.enable_cache(settings)
        try:
            yield
        finally:
            pipe.transformer.disable_cache()


def _first_block(pipe: DiffusionPipeline, steps: int, threshold: float) -> Any:
    return FirstBlockCacheConfig(threshold=threshold)


def _sea(pipe: DiffusionPipeline, steps: int, threshold: float) -> Any:
    return import_module("diffusers").SeaCacheConfig(threshold=threshold)


def _mag(pipe: DiffusionPipeline, steps: int, threshold: float) -> Any:
    """MagCache's settings, after its own calibration: a run on two prompts of `sample.prompts_of`, from other noise."""
    config = partial(import_module("diffusers").MagCacheConfig, num_inference_steps=steps)
    generator = torch.Generator("cpu").manual_seed(1000)
    pipe.transformer.enable_cache(config(calibrate=True))
    try:
        with redirect_stdout(StringIO()) as printed:
            given = sample.arguments(pipe, sample.prompts_of(pipe)[-2:], guidance=5.0)
            pipe(**given, num_inference_steps=steps, generator=generator)
    finally:
        pipe.transformer.disable_cache()
    branches = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return config(threshold=threshold, mag_ratios=torch.tensor(branches).mean(0))


# ---- all of them ----


def _any(pipe: DiffusionPipeline) -> str:
    return ""


def _no_unet(pipe: DiffusionPipeline) -> str:
    return "" if _is_unet(pipe) else "it is made for U-Nets"


def _no_cache_dit(pipe: DiffusionPipeline) -> str:
    if _is_unet(pipe):
        return "cache-dit caches transformers"
    if not find_spec("cache_dit"):
        return "cache-dit is not installed"
    return "" if import_module("cache_dit").BlockAdapterRegister.is_supported(pipe) else "cache-dit does not know it"


def _no_cache_of_diffusers(name: str, pipe: DiffusionPipeline) -> str:
    if not hasattr(import_module("diffusers"), name):
        return f"this version of diffusers has no {name}"
    if not hasattr(denoiser_of(pipe), "enable_cache"):
        return f"diffusers has no cache for {type(denoiser_of(pipe)).__name__}"
    if name == "SeaCacheConfig" and not isinstance(pipe.transformer, WanTransformer3DModel):
        return "of these pipelines only Wan's tells SeaCache its step and noise level"
    return ""


METHODS = {
    "DBCache": Method("threshold of the first block's change", partial(_dbcache, 0), _no_cache_dit),
    "DBCache + TaylorSeer": Method("threshold of the first block's change", partial(_dbcache, 1), _no_cache_dit),
    "first block": Method(
        "threshold of the first block's change",
        partial(_of_diffusers, _first_block),
        partial(_no_cache_of_diffusers, "FirstBlockCacheConfig"),
    ),
    "MagCache": Method(
        "threshold of the accumulated error",
        partial(_of_diffusers, _mag),
        partial(_no_cache_of_diffusers, "MagCacheConfig"),
    ),
    "SeaCache": Method(
        "threshold of the accumulated change",
        partial(_of_diffusers, _sea),
        partial(_no_cache_of_diffusers, "SeaCacheConfig"),
    ),
    "DeepCache": Method("steps from one evaluation to the next", _deepcache, _no_unet),
    "Taylor 1": Method("steps from one evaluation to the next", partial(_taylor, 1), _any),
    "Taylor 2": Method("steps from one evaluation to the next", partial(_taylor, 2), _any),
    "Spectrum": Method("steps in the first window, of which one is evaluated", _spectrum, _any),
    "delta reuse": Method("share of the run after which one branch is evaluated", _delta_reuse, _any),
}
