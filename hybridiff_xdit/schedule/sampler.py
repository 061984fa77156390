"""What a scheduler makes of each prediction of a run, read off the scheduler itself.

A scheduler's update is linear in the sample and in the predictions that it is given (multistep and two-stage solvers
included, noise being added apart). So one pass of a copy of it over the run's timesteps with unit impulses in place of
predictions, one impulse a step, tells how much each prediction moves the result. Nothing is derived per class.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

LEAST_GAIN = 0.5  # of the largest among the steps whose error a step pays back


class Sampler(NamedTuple):
    """A run as the scheduler sees it, one number a step (a step is one evaluation of the denoiser).

    Attributes:
        times: the timesteps handed to the denoiser: the abscissa in which predictions are smooth.
        gains: change of the final sample per unit of the prediction, the other predictions unchanged. For Euler with
            flow matching it is ``sigma_{i+1} - sigma_i``, for noise prediction with DDIM proportional to the step in
            ``sqrt((1 - abar) / abar)``; 0 for a prediction that only finds an intermediate point.
        weights: the size of the gain in units of the denoiser's input, whose scale is about one with every scheduler:
            by how much the input of a step would have to change to change the final sample as much; or that of the next
            prediction, if it is larger.
    """

    times: tuple[float, ...]
    gains: tuple[float, ...]
    weights: tuple[float, ...]

    def carries(self, step: int, owing: Iterable[int]) -> bool:
        """Whether the prediction of ``step`` moves the result enough to make good what those of other steps missed.

        One that moves it much less would have to be changed much more.
        """
        return abs(self.gains[step]) >= LEAST_GAIN * max((abs(self.gains[i]) for i in owing), default=0.0)


def read_sampler(scheduler: Any, start: int, num_steps: int, **extra: Any) -> Sampler:
    """Read a scheduler whose timesteps are set and that has not stepped yet. It is not changed.

    Args:
        scheduler: a diffusers scheduler.
        start: number of the first timestep of the run (image-to-image starts within the list).
        num_steps: denoiser evaluations in the run.
        extra: further arguments of its ``step``, such as ``eta``.

    Raises:
        ValueError: its update is not linear (clipping, thresholding), or it cannot be run on a copy.
    """
    # set_begin_index and the like are state: two calls may differ in it alone.
    state = tuple((name, _content(value)) for name, value in vars(scheduler).items() if not callable(value))
    run = tuple(scheduler.timesteps.tolist()[start : start + num_steps])
    return _read(_Key((type(scheduler), state, run, str(extra)), scheduler, extra))


def _content(value: Any) -> Any:
    """All of a value. (What PyTorch prints of a tensor leaves out its middle, and takes milliseconds.)"""
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.asarray(torch.as_tensor(value).cpu())
        return array.dtype.str, array.shape, array.tobytes()
    return str(value)


class _Key:
    """Equal where schedulers are in an equal state; carries the scheduler past the cache."""

    def __init__(self, identity: tuple[Any, ...], scheduler: Any, extra: dict[str, Any]) -> None:
        self.identity, self.scheduler, self.extra = identity, scheduler, extra

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.identity == other.identity


@lru_cache(maxsize=16)
def _read(key: _Key) -> Sampler:
    scheduler, run = key.scheduler, key.identity[2]
    name = type(scheduler).__name__
    mend = "Use --hybrid_guidance reuse with --hybrid_policy fixed or paper, or another scheduler."
    try:
        silent, silent_inputs = _respond(scheduler, run, 0.0, 0.0, key.extra)
        unit, _ = _respond(scheduler, run, 1.0, 0.0, key.extra)
        large, _ = _respond(scheduler, run, 1e3, 0.0, key.extra)
        coasted, coasted_inputs = _respond(scheduler, run, 0.0, 1.0, key.extra)
    except Exception as error:
        raise ValueError(f"hybrid-cond: {name} could not be run on a copy ({error}). {mend}") from error
    finally:
        key.scheduler = None  # the cache keeps the key
    gains = unit - silent
    if not torch.isfinite(gains).all():
        raise ValueError(
            f"hybrid-cond: {name} makes numbers of a finite prediction that are not finite (noise prediction from a "
            f"signal-to-noise ratio of zero?), and so would the pipeline without us. {mend}"
        )
    if not torch.allclose((large - silent) / 1e3, gains, rtol=1e-2, atol=1e-3 * float(gains.abs().max())):
        raise ValueError(
            f"hybrid-cond: what {name} does is not linear in the predictions (clip_sample or thresholding), so the "
            f"weight of a prediction is not known in advance. Set clip_sample=False and thresholding=False. {mend}"
        )
    kept = (coasted - silent) / (coasted_inputs - silent_inputs)  # of a change of an input, in the final sample
    weights = torch.where(kept == 0, gains, gains / kept).abs()
    # A prediction that only finds an intermediate point has no gain, and does as much as the one that it is found for.
    weights = torch.maximum(weights, torch.cat([weights[1:], weights[-1:]]))
    return Sampler(run, tuple(gains.tolist()), tuple(weights.tolist()))


@torch.no_grad()
def _respond(
    scheduler: Any, run: tuple[float, ...], impulse: float, start: float, extra: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a copy over ``run`` on as many samples as steps; the i-th is predicted ``impulse`` at step i, else 0.

    Args:
        start: where all samples start from.

    Returns:
        The final samples, and of the i-th the denoiser's input at step i; float64, [T] each.
    """
    copied = copy.deepcopy(scheduler)
    for name, value in list(vars(copied).items()):
        if isinstance(value, torch.Tensor):
            setattr(copied, name, value.cpu())
        elif callable(value) and hasattr(type(copied), name):
            delattr(copied, name)  # a function put before the class's would step the original
    accepted = inspect.signature(copied.step).parameters
    count = len(run)
    sample = torch.full((count, 1, 1, 1), start, dtype=torch.float64)
    inputs = torch.zeros(count, dtype=torch.float64)
    before: torch.Tensor | None = None
    # Beside the prediction such a denoiser gives a variance, of as many channels.
    channels = 2 if str(copied.config.get("variance_type")).startswith("learned") else 1
    dtype = copied.timesteps.dtype
    with torch.random.fork_rng(devices=[]):  # noise without a generator comes from the global one
        torch.default_generator.manual_seed(0)  # the CPU's alone: torch.manual_seed would reseed every GPU's too
        given = {**extra, **({"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {})}
        for i, time in enumerate(run):
            at = torch.tensor(time, dtype=dtype)
            inputs[i] = _scaled(copied, sample, at)[i].item()
            prediction = torch.zeros(count, channels, 1, 1, dtype=sample.dtype)
            prediction[i, 0] = impulse
            if "old_pred_original_sample" in accepted:  # CogVideoX's DPM solver keeps its history in its caller
                given |= {"old_pred_original_sample": before, "timestep_back": torch.tensor(run[i - 1]) if i else None}
            stepped = copied.step(model_output=prediction, timestep=at, sample=sample, return_dict=False, **given)
            sample, before = stepped[0], stepped[-1]
    return sample.double().flatten(), inputs


def _scaled(scheduler: Any, sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The denoiser's input. Asked for before every step, as the pipelines do: some schedulers count on it."""
    return scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample
