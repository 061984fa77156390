"""Discrepancy between the two branches of classifier-free guidance, and the detector of its plateau.

Floats in, floats out: this module knows nothing of ranks, pipelines or models, so that every rank that feeds
it the same numbers takes the same decision.
"""

import math
from collections import deque

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


class SlopeDetector:
    """Finds the step after which the discrepancy has stopped falling (arXiv 2602.21760, section 4.2).

    ``G_i = (M_{i-L} - M_i) / L`` is the mean fall per step over the last ``L`` steps; the detector fires at the
    first ``i`` with ``0 <= G_i < g``. (The paper's text prints the opposite sign; its condition needs this one.)

    Args:
        window: ``L``, in steps.
        threshold: ``g``, in units of discrepancy per step.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.window = window
        self.threshold = threshold
        self._recent: deque[float] = deque(maxlen=window + 1)

    def update(self, step: int, value: float) -> bool:
        """Take ``M_step``; return whether the detector fires there.

        Raises:
            ValueError: ``value`` is nan or infinite.
        """
        if not math.isfinite(value):
            raise ValueError(
                f"the discrepancy at step {step} is {value}: the predictions are not finite, or the uncond "
                "prediction is zero. Check the model's dtype (bfloat16 or float32 instead of float16) and weights."
            )
        self._recent.append(value)
        if len(self._recent) <= self.window:
            return False
        slope = (self._recent[0] - value) / self.window
        return 0.0 <= slope < self.threshold
