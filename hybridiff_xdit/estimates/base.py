"""What a rule is: it makes (pred_u, pred_c) on a step that does not evaluate both.

Pipelines compute ``pred_u + w (pred_c - pred_u)``. Handing them ``(c - d, c)``, with ``c`` the cond prediction,
evaluated (PIPELINED) or estimated (SKIPPED), and ``d`` an estimate of delta, gives ``c + (w - 1) d`` for every w, and
with guidance_rescale, without knowing w.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..schedule.discrepancy import Trial
from ..schedule.sampler import Sampler

Pair = tuple[torch.Tensor, torch.Tensor]


class Rule:
    """Makes a step's two predictions where they are not both evaluated. An instance belongs to one run.

    Args:
        sampler: how the scheduler weighs predictions; only `Deferred` reads it.
    """

    #: Whose embeddings uncond's ranks have in their stages.
    stage0_branch: Literal["uncond", "cond"] = "cond"
    #: Whether the rule can do without an evaluation (SKIPPED steps), and tell what its estimates miss (`trials`).
    estimates = False
    #: Whether a stage reads the straight line through the last two old boundaries at its own time, or the last one.
    extrapolates_boundary = False
    needs_sampler = False

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.sampler = sampler

    def full(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> Pair:
        """Take the true predictions of a FULL step, each [B, ...]; return what to hand the pipeline in their place.

        Args:
            guidance: ``w - 1`` at this step, or 1 where the pipeline does not tell w.
        """
        return pred_u, pred_c

    def pipelined(self, step: int, pred: torch.Tensor, guidance: float) -> Pair:
        """(pred_u, pred_c) from the one prediction of a PIPELINED step, each [B, ...]."""
        return pred, pred

    def skipped(self, step: int, guidance: float) -> Pair:
        """(pred_u, pred_c) of a SKIPPED step, each [B, ...], from FULL steps before it."""
        raise NotImplementedError

    def trials(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> list[Trial]:
        """What the estimates would have missed on this FULL step (call it before `full`), nearest distance first."""
        return []
