"""The rule that carries what the last FULL step measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..schedule.discrepancy import Trial
from ..schedule.sampler import Sampler
from .base import Pair, Rule


class _Known(NamedTuple):
    """A step's delta and pred_c, float32 [B, ...]: measured on a FULL step, else estimated."""

    step: int
    delta: torch.Tensor
    pred_c: torch.Tensor


class Reuse(Rule):
    """All stages are cond; the guidance is the last delta that a FULL step measured. SKIPPED: its pred_c too."""

    estimates = True
    _memory = 2

    def __init__(self, sampler: Sampler | None = None) -> None:
        super().__init__(sampler)
        self._known: list[_Known] = []

    def full(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> Pair:
        c = pred_c.float()
        self._dtype = pred_c.dtype
        self._known = [*self._known, _Known(step, c - pred_u.float(), c)][-self._memory :]
        return pred_u, pred_c

    def pipelined(self, step: int, pred: torch.Tensor, guidance: float) -> Pair:
        return self._use(self._estimate(self._known, step, pred.float()), guidance, is_evaluated=True)

    def skipped(self, step: int, guidance: float) -> Pair:
        return self._use(self._estimate(self._known, step), guidance, is_evaluated=False)

    def trials(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> list[Trial]:
        c, u = pred_c.float(), pred_u.float()
        scale = u.abs().mean()
        found = []
        for back in range(min(2, len(self._known))):
            known = self._known[: len(self._known) - back]
            pipelined, skipped = self._estimate(known, step, c), self._estimate(known, step)
            missed = (c - skipped.pred_c) / guidance + c - u - skipped.delta
            errors = [error.abs().mean() / scale for error in (c - u - pipelined.delta, missed)]
            found.append(Trial(step - known[-1].step, *errors))
        return found

    def _use(self, estimate: _Known, guidance: float, is_evaluated: bool) -> Pair:
        """The pair that hands an estimate to the pipeline; ``is_evaluated``: its pred_c is."""
        c = estimate.pred_c
        return (c - estimate.delta).to(self._dtype), c.to(self._dtype)

    def _estimate(self, known: Sequence[_Known], step: int, pred_c: torch.Tensor | None = None) -> _Known:
        """Delta, and pred_c where it is not given, at ``step`` from FULL steps before it."""
        assert known, "the first step of a run is FULL"
        return _Known(step, known[-1].delta, known[-1].pred_c if pred_c is None else pred_c)
