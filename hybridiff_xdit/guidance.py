"""The rule that makes (pred_u, pred_c) on a PIPELINED step, where only one prediction is evaluated.

Pipelines compute ``pred_u + w (pred_c - pred_u)``. Handing them ``(pred_c - delta_hat, pred_c)`` gives
``pred_c + (w - 1) delta_hat`` for every w, and with guidance_rescale, without knowing w.
"""

from typing import Literal

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class Mixed:
    """The published code: stage 0 has the uncond and stage 1 the cond embeddings; the one output serves as both.

    The guided prediction is that mixed output, and w has no effect on the step.
    """

    stage0_branch: Literal["uncond", "cond"] = "uncond"

    def observe(self, pred_u: torch.Tensor, pred_c: torch.Tensor) -> None:
        """Take the true predictions of a FULL step, each [B, ...]."""

    def pair(self, pred: torch.Tensor) -> Pair:
        """(pred_u, pred_c) from the one prediction of a PIPELINED step, each [B, ...]."""
        return pred, pred


class NoGuidance(Mixed):
    """Both stages are cond; the cond prediction is used unguided."""

    stage0_branch = "cond"


class Reuse(NoGuidance):
    """Both stages are cond; the guidance is the last delta that a FULL step measured."""

    def __init__(self) -> None:
        self._delta: torch.Tensor | None = None

    def observe(self, pred_u: torch.Tensor, pred_c: torch.Tensor) -> None:
        self._delta = pred_c - pred_u

    def pair(self, pred: torch.Tensor) -> Pair:
        assert self._delta is not None, "a PIPELINED step came before any FULL step"
        return pred - self._delta, pred


#: Guidance rules by name. An instance belongs to one run.
RULES: dict[str, type[Mixed]] = {"mixed": Mixed, "none": NoGuidance, "reuse": Reuse}
