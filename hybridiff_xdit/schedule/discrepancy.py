"""Discrepancy between the two branches of classifier-free guidance, and the drift of estimates of it.

Floats in, floats out: this module knows nothing of ranks, pipelines or models, so that every rank that feeds
it the same numbers takes the same decision.
"""

import math
from typing import Any, NamedTuple

import torch


def rel_mae(pred_u: torch.Tensor, pred_c: torch.Tensor) -> torch.Tensor:
    """Discrepancy ``M = mean|pred_c - pred_u| / mean|pred_u|`` (arXiv 2602.21760, Eq. 1).

    Args:
        pred_u: the uncond prediction, any shape and floating dtype.
        pred_c: the cond prediction, same shape and dtype.

    Returns:
        A float32 scalar tensor on the predictions' device (reading it is the caller's decision, since on a GPU
        that waits for the step). It is inf or nan where ``pred_u`` is zero everywhere or not finite.
    """
    # float32 because a half-precision sum over a latent overflows.
    u = pred_u.float()
    return (pred_c.float() - u).abs().mean() / u.abs().mean()


def check_finite(step: int, value: float) -> None:
    """Refuse a discrepancy that no decision can be taken from.

    Raises:
        ValueError: ``value`` is nan or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(
            f"the discrepancy at step {step} is {value}: the predictions are not finite, or the uncond "
            "prediction is zero. Check the model's dtype (bfloat16 or float32 instead of float16) and weights."
        )


class Bend(NamedTuple):
    """How the predictions bend at a FULL step: root mean squares of second divided differences over FULL steps.

    They are taken over it and the two FULL steps before, per square of the sampler's time (`Sampler.times`): half of
    the second derivative, where that is level. float32 scalars, on the device or read from it.

    Attributes:
        cond: of pred_c.
        delta: of its distance from pred_u; of several distances, of their sum, each by the share of its weight in the
            largest one.
    """

    cond: Any
    delta: Any
