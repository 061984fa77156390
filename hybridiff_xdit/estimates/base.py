"""What a rule is: it makes the streams' predictions on a step that does not evaluate them all.

A rule works on one tensor of a prediction (a denoiser may return several, such as video and audio). A pipeline makes
the guided prediction of the streams itself. So with estimates ``c`` of cond and ``d_k`` of the distances ``c - s_k`` it
is handed ``c`` and ``c - d_k``, which gives ``c + (w - 1) d`` for every w, and whatever else it does to the guided
prediction stays its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..schedule.discrepancy import Bend
from ..schedule.sampler import Sampler
from .weights import Guidance, plain

Streams = list[torch.Tensor]
Branch = Literal["uncond", "cond"]


class Rule:
    """The interface; alone it is for steps that are all FULL.

    Args:
        sampler: how the scheduler weighs predictions; only a rule that ``needs_sampler`` reads it.
        guidance: how the pipeline weighs the streams, as it comes to be known.
    """

    #: What it does, in a line.
    summary = "nothing is estimated"
    #: Whose embeddings uncond's ranks have in their stages.
    stage0_branch: Branch = "cond"
    #: Whether the rule can do without an evaluation (SKIPPED steps).
    estimates = False
    #: Whether `bend` tells anything.
    tells_bend = False
    #: Whether a stage reads the straight line through the last two old boundaries at its own time, or the last one.
    extrapolates_boundary = False
    needs_sampler = False

    def __init__(self, sampler: Sampler | None = None, guidance: Guidance | None = None) -> None:
        self.sampler = sampler
        self.guidance = guidance or Guidance(plain(2))

    def full(self, step: int, streams: Sequence[torch.Tensor]) -> Streams:
        """Take the true predictions of a FULL step, each [B, ...]; return what to hand the pipeline in their place."""
        return list(streams)

    def pipelined(self, step: int, pred: torch.Tensor) -> Streams:
        """Both streams' predictions from the one of a PIPELINED step, [B, ...]."""
        raise NotImplementedError

    def skipped(self, step: int) -> Streams:
        """The streams' predictions of a SKIPPED step, each [B, ...], from FULL steps before it."""
        raise NotImplementedError

    def bend(self, step: int, streams: Sequence[torch.Tensor]) -> Bend | None:
        """How the predictions bend on this FULL step (call it before `full`); None where it cannot be told."""
        return None
