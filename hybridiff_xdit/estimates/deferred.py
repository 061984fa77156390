"""The rule that extrapolates, and pays the error of its estimates back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from ..schedule.sampler import Sampler
from .base import Pair
from .reuse import Reuse, _Known


class Deferred(Reuse):
    r"""Estimates from the last two FULL steps, and pays each estimate's error back on the next FULL step.

    With FULL steps at :math:`a' < a`, times :math:`t`, and :math:`r_j = (t_j - t_a) / (t_a - t_{a'})`, a SKIPPED step
    :math:`j` uses

    .. math:: \hat c_j = c_a + \gamma\, r_j (c_a - c_{a'}), \qquad
              d_j = \delta_a + \alpha\, r_j (\delta_a - \delta_{a'}),

    damped extrapolations, and a PIPELINED one, where :math:`c_j` is evaluated,

    .. math:: d_j = \delta_a + \alpha\, r_j (\delta_a - \delta_{a'})
              + \beta\, (c_j - c_a - \alpha\, r_j (c_a - c_{a'})):

    what pred_c tells of the part of delta that no history predicts (:math:`\beta = 0` carries the last delta on,
    :math:`\beta = 1` the last pred_u).

    On the next FULL step :math:`b` curves :math:`D, C` from :math:`a` to :math:`b` replace the estimates in hindsight:
    straight lines, and of what the parabolas through :math:`a'` add to these, a share :math:`\kappa` and
    :math:`\mu`. The errors of the steps' impulses are added there,

    .. math:: \hat\delta_b = \delta_b + \sum_{a<j<b} \frac{G_j (w_j - 1)}{G_b (w_b - 1)} \left( D(t_j) - d_j \right),
              \qquad c_b + \sum_{a<j<b} \frac{G_j}{G_b} \left( C(t_j) - \hat c_j \right),

    with the sampler's gains :math:`G` (`Sampler.gains`): for w constant, w need not be known. (By straight lines the
    impulse of a group would be a trapezoid sum: where predictions bend one way for many groups, its errors add up.) On
    PIPELINED steps pred_c owes nothing, and :math:`D(t_j)` has :math:`\beta\, (c_j - C(t_j))` added. A FULL step whose
    gain is too small to carry the debt (`Sampler.carries`) leaves it to the next.

    :math:`\alpha, \beta, \gamma, \kappa, \mu \in [0, 1]` are fitted per picture on every FULL step, each as a running
    mean (weight 0.8 a FULL step) of a least-squares coefficient, each within [-1, 2]: :math:`\alpha` of
    :math:`\delta_b - \delta_a` on :math:`r_b (\delta_a - \delta_{a'})`, :math:`\gamma` likewise of pred_c,
    :math:`\beta` of the residual of delta's straight line on that of pred_c, :math:`\kappa` and :math:`\mu` of what
    FULL step :math:`a` lies off the line from :math:`a'` to :math:`b` on what the parabola through the one before
    says. Where low precision or the model makes delta noisy, the fit damps itself: nothing is tuned to a model.
    """

    extrapolates_boundary = True
    needs_sampler = True
    _memory = 4  # three for the curves, and one more for the fit of their bends
    _forget = 0.8

    def __init__(self, sampler: Sampler | None = None) -> None:
        super().__init__(sampler)
        self._alpha, self._beta, self._gamma, self._kappa, self._mu = (_Coefficient(self._forget) for _ in range(5))
        self._used: list[_Used] = []  # since the last FULL step
        self._owing: list[int] = []  # steps whose error is not paid back yet
        self._debt: tuple[torch.Tensor, torch.Tensor] | None = None  # of delta's impulse, times w - 1, and of pred_c's

    def full(self, step: int, pred_u: torch.Tensor, pred_c: torch.Tensor, guidance: float) -> Pair:
        assert self.sampler is not None
        gains = self.sampler.gains
        super().full(step, pred_u, pred_c, guidance)
        if len(self._known) > 2:
            self._fit()
        if self._used:
            bend, bend_c = self._bends(self._known[-3:])
            bends = self._kappa.value * bend, self._mu.value * bend_c
        for used in self._used:
            hindsight, gain = self._hindsight(used, bends), gains[used.estimate.step]
            delta = gain * used.guidance * (hindsight.delta - used.estimate.delta)
            c = gain * (hindsight.pred_c - used.estimate.pred_c)
            self._debt = (delta, c) if self._debt is None else (self._debt[0] + delta, self._debt[1] + c)
            self._owing.append(used.estimate.step)
        self._used.clear()
        if self._debt is None or not self.sampler.carries(step, self._owing) or gains[step] * guidance == 0:
            return pred_u, pred_c
        (delta, c), self._debt = self._debt, None
        self._owing.clear()
        owed_c = c / gains[step]
        owed_u = owed_c - delta / (gains[step] * guidance)
        return (pred_u.float() + owed_u).to(pred_u.dtype), (pred_c.float() + owed_c).to(pred_c.dtype)

    def _use(self, estimate: _Known, guidance: float, is_evaluated: bool) -> Pair:
        self._used.append(_Used(estimate, guidance, is_evaluated))
        return super()._use(estimate, guidance, is_evaluated)

    def _estimate(self, known: Sequence[_Known], step: int, pred_c: torch.Tensor | None = None) -> _Known:
        last = known[-1]
        if len(known) < 2 or not self._alpha.is_known:
            return super()._estimate(known, step, pred_c)
        before, reach = known[-2], self._reach(known, step)
        slope, slope_c = reach * (last.delta - before.delta), reach * (last.pred_c - before.pred_c)
        delta = last.delta + self._alpha.value * slope
        if pred_c is None:
            return _Known(step, delta, last.pred_c + self._gamma.value * slope_c)
        unforeseen = pred_c - last.pred_c - self._alpha.value * slope_c
        return _Known(step, delta + self._beta.value * unforeseen, pred_c)

    def _hindsight(self, used: _Used, bends: Pair) -> _Known:
        """What stands for the step's delta and pred_c now that the FULL step after it is known.

        Args:
            bends: of delta and of pred_c, [B, ...]: how their curves bend (second divided differences).
        """
        step, c = used.estimate.step, used.estimate.pred_c
        line, line_c, lever = self._line(self._known[-2:], step)
        delta, curve_c = torch.add(line, bends[0], alpha=lever), torch.add(line_c, bends[1], alpha=lever)
        if not used.is_evaluated:
            return _Known(step, delta, curve_c)
        return _Known(step, delta + self._beta.value * (c - curve_c), c)

    def _line(self, ends: Sequence[_Known], step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Delta and pred_c at ``step`` on the lines between two FULL steps, and what a bend of 1 would add there."""
        start, end = ends
        share = 1 + self._reach(ends, step)
        delta, c = (torch.lerp(a, b, share) for a, b in zip(start[1:], end[1:], strict=True))
        first, last, now = (self._times()[i] for i in (start.step, end.step, step))
        return delta, c, (now - first) * (now - last)

    def _bends(self, known: Sequence[_Known]) -> Pair:
        """Second divided differences of delta and pred_c over three FULL steps; 0 where there are no three times."""
        times = [self._times()[full.step] for full in known]
        if len(set(times)) < 3:
            return torch.zeros_like(known[-1].delta), torch.zeros_like(known[-1].pred_c)
        x, y, z = (1 / prod(time - other for other in times if other != time) for time in times)
        delta, c = (
            torch.add(torch.add(one * x, two, alpha=y), three, alpha=z)
            for one, two, three in zip(*(full[1:] for full in known), strict=True)
        )
        return delta, c

    def _fit(self) -> None:
        """Take the FULL step that is known last into the coefficients."""
        *earlier, before, last, now = self._known
        reach = self._reach((before, last), now.step)
        if reach == 0:
            return
        moved, moved_c = now.delta - last.delta, now.pred_c - last.pred_c
        slope, slope_c = reach * (last.delta - before.delta), reach * (last.pred_c - before.pred_c)
        self._alpha.update(moved, slope)
        self._gamma.update(moved_c, slope_c)
        self._beta.update(moved - slope, moved_c - slope_c)
        if len({self._times()[full.step] for full in self._known}) == 4:
            line, line_c, lever = self._line((before, now), last.step)
            bend, bend_c = self._bends((*earlier, before, now))
            self._kappa.update(last.delta - line, lever * bend)
            self._mu.update(last.pred_c - line_c, lever * bend_c)

    def _times(self) -> tuple[float, ...]:
        assert self.sampler is not None
        return self.sampler.times

    def _reach(self, known: Sequence[_Known], step: int) -> float:
        """``r``: how far ``step`` lies beyond the last known step, in units of the gap before that.

        0 where that gap is none: solvers of order 2 evaluate twice at one time, and the later evaluation counts.
        """
        before, last, now = (self._times()[i] for i in (known[-2].step, known[-1].step, step))
        return (now - last) / (last - before) if last != before else 0.0


class _Used(NamedTuple):
    """An estimate that a step used, with its ``w - 1``; ``is_evaluated``: its pred_c is not estimated."""

    estimate: _Known
    guidance: float
    is_evaluated: bool


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
