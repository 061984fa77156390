"""The last FULL step's distances from cond, and where cond is not evaluated its prediction too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..schedule.sampler import Sampler
from .base import Rule, Streams
from .weights import Guidance


class Known(NamedTuple):
    """A step's predictions, float32 [B, ...]: measured on a FULL step, else estimated.

    Attributes:
        step: its number.
        cond: the prediction of cond.
        deltas: ``cond - s`` of each other stream.
    """

    step: int
    cond: torch.Tensor
    deltas: tuple[torch.Tensor, ...]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Cond, then the distances."""
        return (self.cond, *self.deltas)


class Reuse(Rule):
    """All stages are cond; the guidance is the last one that a FULL step measured. SKIPPED: its cond too."""

    summary = "the guidance of the last FULL step"
    estimates = True
    _memory = 2

    def __init__(self, sampler: Sampler | None = None, guidance: Guidance | None = None) -> None:
        super().__init__(sampler, guidance)
        self._known: list[Known] = []  # of the last FULL steps

    def full(self, step: int, streams: Sequence[torch.Tensor]) -> Streams:
        self._dtype = streams[0].dtype
        self._known = [*self._known, self._measured(step, streams)][-self._memory :]
        return list(streams)

    def pipelined(self, step: int, pred: torch.Tensor) -> Streams:
        return self._use(self._estimate(self._known, step, pred.float()), is_evaluated=True)

    def skipped(self, step: int) -> Streams:
        return self._use(self._estimate(self._known, step), is_evaluated=False)

    def _measured(self, step: int, streams: Sequence[torch.Tensor]) -> Known:
        at = self.guidance.cond
        c = streams[at].float()
        return Known(step, c, tuple(c - stream.float() for k, stream in enumerate(streams) if k != at))

    def _use(self, estimate: Known, is_evaluated: bool) -> Streams:
        """The streams that hand an estimate to the pipeline; ``is_evaluated``: its cond is."""
        streams = [estimate.cond - delta for delta in estimate.deltas]
        streams.insert(self.guidance.cond, estimate.cond)
        return [stream.to(self._dtype) for stream in streams]

    def _estimate(self, known: Sequence[Known], step: int, cond: torch.Tensor | None = None) -> Known:
        """The distances, and cond where it is not given, at ``step`` from FULL steps before it."""
        assert known, "the first step of a run is FULL"
        last = known[-1]
        return Known(step, last.cond if cond is None else cond, last.deltas)
