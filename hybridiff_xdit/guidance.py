"""The rule that makes (pred_u, pred_c) on a PIPELINED step, where only one prediction is evaluated.

Pipelines compute ``pred_u + w (pred_c - pred_u)``. Handing them ``(pred_c - d, pred_c)``, with ``d`` an estimate of delta,
gives ``pred_c + (w - 1) d`` for every w, and with guidance_rescale, without knowing w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from .sampler import Sampler

Pair = tuple[torch.Tensor, torch.Tensor]


class Mixed:
    """The published code: stage 0 has the uncond and stage 1 the cond embeddings; the one output serves as both.

    The guided prediction is that mixed output, and w has no effect on the step.

    Args:
        sampler: how the scheduler weighs predictions; only `Deferred` reads it.
    """

    stage0_branch: Literal["uncond", "cond"] = "uncond"
    #: Whether stage 1 reads the straight line through its last two boundaries at its own time, or the last one as it is.
    extrapolates_boundary = False
    needs_sampler = False
    #: How far back the rule's estimate is tried out on a FULL step (`drift`): so many distances.
    trials = 0

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

    def drift(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
        """What the estimate would have missed on this FULL step (call it before `full`).

        Returns:
            Per trial (distance in steps from the last FULL step that the estimate knew, error): the error is
            ``mean|delta - d| / mean|pred_u|``, the discrepancy's norm, a float32 scalar on the device.
        """
        return []


class NoGuidance(Mixed):
    """Both stages are cond; the cond prediction is used unguided."""

    stage0_branch = "cond"


class _Known(NamedTuple):
    """A FULL step: delta and pred_c, float32 [B, ...]."""

    step: int
    delta: torch.Tensor
    pred_c: torch.Tensor


class Reuse(NoGuidance):
    """Both stages are cond; the guidance is the last delta that a FULL step measured."""

    trials = 2
    _memory = 2

    def __init__(self, sampler: Sampler | None = None) -> None:
        super().__init__(sampler)
        self._known: list[_Known] = []

    def full(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> Pair:
        c = pred_c.float()
        self._known = [*self._known, _Known(step, c - pred_u.float(), c)][-self._memory :]
        return pred_u, pred_c

    def pipelined(self, step: int, pred: torch.Tensor, guidance: float) -> Pair:
        assert self._known, "a PIPELINED step came before any FULL step"
        return (pred.float() - self._estimate(self._known, step, pred.float())).to(pred.dtype), pred

    def drift(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
        c, u = pred_c.float(), pred_u.float()
        found = []
        for back in range(min(self.trials, len(self._known))):
            known = self._known[: len(self._known) - back]
            error = (c - u - self._estimate(known, step, c)).abs().mean() / u.abs().mean()
            found.append((step - known[-1].step, error))
        return found

    def _estimate(self, known: Sequence[_Known], step: int, pred_c: torch.Tensor) -> torch.Tensor:
        """``d`` at ``step`` from FULL steps before it, and the cond prediction of the step itself; float32 [B, ...]."""
        return known[-1].delta


class Deferred(Reuse):
    r"""Estimates delta from the last FULL steps and from pred_c, and pays each estimate's error back on the next FULL step.

    With FULL steps at :math:`a' < a`, times :math:`t`, and :math:`r_j = (t_j - t_a) / (t_a - t_{a'})`, a PIPELINED step
    :math:`j` uses

    .. math:: d_j = \delta_a + \alpha\, r_j (\delta_a - \delta_{a'}) + \beta\, (c_j - c_a - \alpha\, r_j (c_a - c_{a'})),

    a damped extrapolation, plus what pred_c, which *is* evaluated on the step, tells of the part of delta that no history
    predicts: :math:`\beta = 0` carries the last delta on, :math:`\beta = 1` the last pred_u.

    On the next FULL step :math:`b` the parabola :math:`D` through the last three known deltas replaces the estimates in
    hindsight (likewise :math:`C` for pred_c), and the error of the guidance's impulse is added to delta there,

    .. math:: \hat\delta_b = \delta_b + \sum_{a<j<b} \frac{G_j (w_j - 1)}{G_b (w_b - 1)}
              \left( D(t_j) + \beta\, (c_j - C(t_j)) - d_j \right),

    with the sampler's gains :math:`G` (`Sampler.gains`): for w constant, w need not be known. A step whose gain is too
    small to carry the debt leaves it to the next FULL step.

    :math:`\alpha, \beta \in [0, 1]` are fitted per picture on every FULL step, each as a running mean (weight 0.8 a FULL
    step) of a least-squares coefficient: :math:`\alpha` of :math:`\delta_b - \delta_a` on :math:`r_b (\delta_a -
    \delta_{a'})`, :math:`\beta` of the residual of delta's straight line on that of pred_c. Where low precision or the
    model makes delta noisy, the fit damps itself: nothing is tuned to a model.
    """

    extrapolates_boundary = True
    needs_sampler = True
    _memory = 3
    _forget = 0.8

    def __init__(self, sampler: Sampler | None = None) -> None:
        super().__init__(sampler)
        self._alpha = _Coefficient(self._forget)
        self._beta = _Coefficient(self._forget)
        self._used: list[tuple[float, _Known]] = []  # per PIPELINED step (guidance, with d in place of delta)
        self._debt: torch.Tensor | None = None  # of the guidance's impulse, in units of the final sample

    def full(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> Pair:
        assert self.sampler is not None
        if len(self._known) > 1:
            self._fit(step, pred_u, pred_c)
        super().full(step, pred_u, pred_c, guidance)
        gains = self.sampler.gains
        for weight, used in self._used:
            delta, c = self._line(self._known, used.step)
            missed = delta + self._beta.value * (used.pred_c - c) - used.delta
            missed = missed * (gains[used.step] * weight)
            self._debt = missed if self._debt is None else self._debt + missed
        carries = abs(gains[step]) > 0.1 * max((abs(gains[used.step]) for _, used in self._used), default=0.0)
        self._used.clear()
        if self._debt is None or not carries or gains[step] * guidance == 0:
            return pred_u, pred_c
        owed, self._debt = self._debt / (gains[step] * guidance), None
        return (pred_u.float() - owed).to(pred_u.dtype), pred_c

    def pipelined(self, step: int, pred: torch.Tensor, guidance: float) -> Pair:
        assert self._known, "a PIPELINED step came before any FULL step"
        c = pred.float()
        d = self._estimate(self._known, step, c)
        self._used.append((guidance, _Known(step, d, c)))
        return (c - d).to(pred.dtype), pred

    def _estimate(self, known: Sequence[_Known], step: int, pred_c: torch.Tensor) -> torch.Tensor:
        last = known[-1]
        if len(known) < 2 or not self._alpha.is_known:
            return last.delta
        reach = self._alpha.value * self._reach(known, step)
        delta = last.delta + reach * (last.delta - known[-2].delta)
        return delta + self._beta.value * (pred_c - last.pred_c - reach * (last.pred_c - known[-2].pred_c))

    def _fit(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor) -> None:
        """Take FULL step ``step`` into the coefficients; `_known` holds those before it."""
        before, last = self._known[-2:]
        c = pred_c.float()
        reach = self._reach(self._known, step)
        moved, moved_c = c - pred_u.float() - last.delta, c - last.pred_c
        slope, slope_c = reach * (last.delta - before.delta), reach * (last.pred_c - before.pred_c)
        self._alpha.update(moved, slope)
        self._beta.update(moved - slope, moved_c - slope_c)

    def _reach(self, known: Sequence[_Known], step: int) -> float:
        """``r``: how far ``step`` lies beyond the last known step, in units of the gap before that."""
        assert self.sampler is not None
        before, last, now = (self.sampler.times[i] for i in (known[-2].step, known[-1].step, step))
        return (now - last) / (last - before) if last != before else 0.0

    def _line(self, known: Sequence[_Known], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The parabola through the known deltas at ``step``, and that through pred_c."""
        assert self.sampler is not None
        times = self.sampler.times
        # Solvers of order 2 evaluate twice at one time: the later evaluation counts.
        nodes = list({times[point.step]: point for point in known}.items())
        total: list[torch.Tensor] = []
        for here, point in nodes:
            weight = 1.0
            for other, _ in nodes:
                if other != here:
                    weight *= (times[step] - other) / (here - other)
            parts = [weight * point.delta, weight * point.pred_c]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total[0], total[1]


class _Coefficient:
    """Running mean of a least-squares coefficient per picture, clamped to [0, 1]: [B, 1, ...]."""

    def __init__(self, forget: float) -> None:
        self._forget = forget
        self._sum: torch.Tensor | float = 0.0
        self._weight = 0.0

    @property
    def is_known(self) -> bool:
        return self._weight > 0

    @property
    def value(self) -> torch.Tensor | float:
        return torch.as_tensor(self._sum / self._weight).clamp(0, 1) if self.is_known else 0.0

    def update(self, target: torch.Tensor, regressor: torch.Tensor) -> None:
        dims = tuple(range(1, target.ndim))
        energy = regressor.square().sum(dims, keepdim=True)
        fitted = (target * regressor).sum(dims, keepdim=True) / energy.clamp(min=torch.finfo(energy.dtype).tiny)
        self._sum = fitted.clamp(-1, 2) + self._forget * self._sum
        self._weight = 1 + self._forget * self._weight


#: Guidance rules by name. An instance belongs to one run.
RULES: dict[str, type[Mixed]] = {"mixed": Mixed, "none": NoGuidance, "reuse": Reuse, "deferred": Deferred}
