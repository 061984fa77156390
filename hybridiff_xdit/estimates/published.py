"""The rules of the published code, and the plainest one: cond without guidance."""

from __future__ import annotations

import torch

from .base import Branch, Rule, Streams


class Mixed(Rule):
    """The published code: each rank has its branch's embeddings in its stage; the one output serves as both.

    With two stages, stage 0 has uncond's and stage 1 cond's. The guided prediction is that mixed output, and w has no
    effect on the step.
    """

    summary = "as in the published code, where w has no effect on PIPELINED steps"
    stage0_branch: Branch = "uncond"

    def pipelined(self, step: int, pred: torch.Tensor) -> Streams:
        return [pred, pred]


class NoGuidance(Mixed):
    """All stages are cond; the cond prediction is used unguided."""

    summary = "the conditional prediction, without guidance"
    stage0_branch = "cond"
