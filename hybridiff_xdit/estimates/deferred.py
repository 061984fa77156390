r"""Estimates from the last two FULL steps, and each estimate's error paid back on the next FULL step.

With FULL steps at :math:`a' < a`, times :math:`t`, and :math:`r_j = (t_j - t_a) / (t_a - t_{a'})`, a SKIPPED step
:math:`j` uses

.. math:: \hat c_j = c_a + \gamma\, r_j (c_a - c_{a'}), \qquad
          d_j = \delta_a + \alpha\, r_j (\delta_a - \delta_{a'}),

damped extrapolations, the second for the distance of each other stream from cond, and a PIPELINED one, where
:math:`c_j` is evaluated,

.. math:: d_j = \delta_a + \alpha\, r_j (\delta_a - \delta_{a'})
          + \beta\, (c_j - c_a - \alpha\, r_j (c_a - c_{a'})):

what cond tells of the part of delta that no history predicts (:math:`\beta = 0` carries the last delta on,
:math:`\beta = 1` the last pred_u).

On the next FULL step :math:`b` curves :math:`D, C` from :math:`a` to :math:`b` replace the estimates in hindsight:
straight lines, and of what the parabolas through :math:`a'` add to these, a share :math:`\kappa` and :math:`\mu`. The
errors of the steps' impulses are added there,

.. math:: \hat\delta_b = \delta_b + \sum_{a<j<b} \frac{G_j v_j}{G_b v_b} \left( D(t_j) - d_j \right),
          \qquad c_b + \sum_{a<j<b} \frac{G_j k_j}{G_b k_b} \left( C(t_j) - \hat c_j \right),

with the sampler's gains :math:`G` (`Sampler.gains`) and what the pipeline makes of the streams (`weights`): :math:`k`
of a prediction, and :math:`v = k (w - 1)` of a distance. Those of step :math:`b` itself are known only when it is over.
Until then :math:`w` is taken for the largest of late (`Guidance.ahead`); what that leaves unpaid is paid on the FULL
step after. On PIPELINED steps cond owes nothing, and :math:`D(t_j)` has :math:`\beta\, (c_j - C(t_j))` added. A FULL
step whose gain is too small to carry the debt (`Sampler.carries`) leaves it to the next.

:math:`\alpha, \beta, \gamma, \kappa, \mu \in [0, 1]` are fitted per picture on every FULL step, each as a running mean
(weight 0.8 a FULL step) of a least-squares coefficient, each within [-1, 2]: :math:`\alpha` of
:math:`\delta_b - \delta_a` on :math:`r_b (\delta_a - \delta_{a'})`, :math:`\gamma` likewise of cond, :math:`\beta` of
the residual of delta's straight line on that of cond, :math:`\kappa` and :math:`\mu` of what FULL step :math:`a` lies
off the line from :math:`a'` to :math:`b` on what the parabola through the one before says. Where low precision or the
model makes delta noisy, the fit damps itself: nothing is tuned to a model. A bend of bfloat16 predictions is mostly
rounding, which skipping does not add to; so what two bends in a row do not have in common is not counted (`bend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from ..schedule.discrepancy import Bend
from ..schedule.sampler import Sampler
from .base import Streams
from .reuse import Known, Reuse
from .weights import Guidance, Weights

Parts = tuple[torch.Tensor, ...]  # of cond, then of the distances

#: Of a bend's square, the most that is laid to rounding in bfloat16. Two bends in a row are not quite alike without it.
MOST_ROUNDED = 0.75

#: Relative change of a weight below which a debt counts as paid.
SETTLED = 1e-3


class Deferred(Reuse):
    """See the module."""

    summary = "estimates fitted to the run; the next FULL step corrects what they missed"
    tells_bend = True
    extrapolates_boundary = True
    needs_sampler = True
    _memory = 4  # three for the curves, and one more for the fit of their bends
    _forget = 0.8

    def __init__(self, sampler: Sampler | None = None, guidance: Guidance | None = None) -> None:
        super().__init__(sampler, guidance)
        count = 1 + len(self.guidance.largest)
        self._slopes = [_Coefficient(self._forget) for _ in range(count)]  # gamma, then alpha of each distance
        self._shares = [_Coefficient(self._forget) for _ in range(count)]  # mu, then kappa of each distance
        self._betas = [_Coefficient(self._forget) for _ in range(count - 1)]
        self._used: list[_Used] = []  # since the last FULL step
        self._owing: list[int] = []  # steps whose error is not paid back yet
        self._debt: list[torch.Tensor] | None = None  # of the impulses
        self._paid: _Paid | None = None  # on the last FULL step that paid

    def bend(self, step: int, streams: Sequence[torch.Tensor]) -> Bend | None:
        last = [self._measured(step, streams)]
        for known in reversed(self._known):
            if self._times()[known.step] not in {self._times()[other.step] for other in last}:
                last.insert(0, known)
        if len(last) < 3:
            return None
        now = self._guided_bends(last[-3:])
        squares = [part.square().flatten(1).mean(1) for part in now]
        if streams[0].dtype is torch.bfloat16 and len(last) > 3:
            share, before = self._rounded(last[-4:]), self._guided_bends(last[-4:-1])
            for k, (a, b) in enumerate(zip(before, now, strict=True)):
                rounding = share * (squares[k] - (a * b).flatten(1).mean(1))
                squares[k] = squares[k] - torch.minimum(rounding.clamp(min=0), MOST_ROUNDED * squares[k])
        return Bend(*(square.amax().sqrt() for square in squares))

    def _guided_bends(self, known: Sequence[Known]) -> Parts:
        """The bends of cond and of what the guidance adds to it per unit of its largest weight."""
        cond, *deltas = self._bends(known)
        largest, most = self.guidance.largest, self.guidance.most
        parts = [weight / most * part for weight, part in zip(largest, deltas, strict=True)]
        return cond, sum(parts, torch.zeros_like(cond))

    def _rounded(self, known: Sequence[Known]) -> float:
        """Rounding's part of a bend's square, over the square less the product of the bend and the one before.

        Rounding differs on each of the four steps. Their weights in the two bends say what it adds to the square and
        takes from the product.
        """
        before, now = (self._divided(known[i : i + 3]) for i in range(2))
        own, shared = sum(x * x for x in now), before[1] * now[0] + before[2] * now[1]
        return own / (own - shared)

    def full(self, step: int, streams: Sequence[torch.Tensor]) -> Streams:
        assert self.sampler is not None
        gains = self.sampler.gains
        super().full(step, streams)
        if len(self._known) > 2:
            self._fit()
        self._settle()
        if self._used:
            found = self._bends(self._known[-3:])
            bends = [share.value * bend for share, bend in zip(self._shares, found, strict=True)]
        for used in self._used:
            at = used.estimate.step
            hindsight = self._hindsight(used, bends)
            impulses = zip(_impulses(self.guidance.at(at)), hindsight.parts, used.estimate.parts, strict=True)
            self._owe([gains[at] * weight * (right - estimate) for weight, right, estimate in impulses])
            self._owing.append(at)
        self._used.clear()
        weights = self.guidance.ahead(step)
        divisors = [gains[step] * weight for weight in _impulses(weights)]
        if self._debt is None or not self.sampler.carries(step, self._owing) or not all(divisors):
            return list(streams)
        self._paid = _Paid(step, weights, self._debt)
        owed_c, *owed = (debt / divisor for debt, divisor in zip(self._debt, divisors, strict=True))
        self._debt = None
        self._owing.clear()
        missing = [owed_c - delta for delta in owed]
        missing.insert(self.guidance.cond, owed_c)
        return [(stream.float() + more).to(stream.dtype) for stream, more in zip(streams, missing, strict=True)]

    def _owe(self, added: list[torch.Tensor]) -> None:
        owed: list[Any] = self._debt or [0.0] * len(added)
        self._debt = [debt + more for debt, more in zip(owed, added, strict=True)]

    def _settle(self) -> None:
        """Owe what the last payment, made with the weights of the step before, was short of."""
        if self._paid is None:
            return
        step, taken, debt = self._paid
        self._paid = None
        ratios = [
            actual / assumed
            for actual, assumed in zip(_impulses(self.guidance.at(step)), _impulses(taken), strict=True)
        ]
        if any(abs(ratio - 1) > SETTLED for ratio in ratios):
            self._owe([(1 - ratio) * part for ratio, part in zip(ratios, debt, strict=True)])
            self._owing.append(step)

    def _use(self, estimate: Known, is_evaluated: bool) -> Streams:
        self._used.append(_Used(estimate, is_evaluated))
        return super()._use(estimate, is_evaluated)

    def _estimate(self, known: Sequence[Known], step: int, cond: torch.Tensor | None = None) -> Known:
        last = known[-1]
        if len(known) < 2 or not self._slopes[0].is_known:
            return super()._estimate(known, step, cond)
        before, reach = known[-2], self._reach(known, step)
        slopes = [reach * (b - a) for a, b in zip(before.parts, last.parts, strict=True)]
        gamma, *alphas = (slope.value for slope in self._slopes)
        deltas = [part + alpha * slope for part, alpha, slope in zip(last.deltas, alphas, slopes[1:], strict=True)]
        if cond is None:
            return Known(step, last.cond + gamma * slopes[0], tuple(deltas))
        for k, (alpha, beta) in enumerate(zip(alphas, self._betas, strict=True)):
            deltas[k] = deltas[k] + beta.value * (cond - last.cond - alpha * slopes[0])
        return Known(step, cond, tuple(deltas))

    def _hindsight(self, used: _Used, bends: Sequence[torch.Tensor]) -> Known:
        """What stands for the step's predictions now that the FULL step after it is known.

        Args:
            bends: of cond and of the distances, [B, ...]: how their curves bend (second divided differences).
        """
        step, c = used.estimate.step, used.estimate.cond
        line, lever = self._line(self._known[-2:], step)
        cond, *deltas = (torch.add(part, bend, alpha=lever) for part, bend in zip(line, bends, strict=True))
        if not used.is_evaluated:
            return Known(step, cond, tuple(deltas))
        foreseen = zip(deltas, self._betas, strict=True)
        return Known(step, c, tuple(delta + beta.value * (c - cond) for delta, beta in foreseen))

    def _line(self, ends: Sequence[Known], step: int) -> tuple[Parts, float]:
        """The predictions at ``step`` on the line between two FULL steps, and what a bend of 1 would add there."""
        start, end = ends
        share = 1 + self._reach(ends, step)
        first, last, now = (self._times()[i] for i in (start.step, end.step, step))
        line = tuple(torch.lerp(a, b, share) for a, b in zip(start.parts, end.parts, strict=True))
        return line, (now - first) * (now - last)

    def _bends(self, known: Sequence[Known]) -> Parts:
        """Second divided differences over three FULL steps; 0 where there are no three times."""
        if len({self._times()[full.step] for full in known}) < 3:
            return tuple(map(torch.zeros_like, known[-1].parts))
        x, y, z = self._divided(known)
        return tuple(
            torch.add(torch.add(one * x, two, alpha=y), three, alpha=z)
            for one, two, three in zip(*(full.parts for full in known), strict=True)
        )

    def _divided(self, known: Sequence[Known]) -> list[float]:
        """The weights of FULL steps, of three times, in their second divided difference."""
        times = [self._times()[full.step] for full in known]
        return [1 / prod(time - other for other in times if other != time) for time in times]

    def _fit(self) -> None:
        """Take the FULL step that is known last into the coefficients."""
        *earlier, before, last, now = self._known
        reach = self._reach((before, last), now.step)
        if reach == 0:
            return
        moved = [b - a for a, b in zip(last.parts, now.parts, strict=True)]
        slopes = [reach * (b - a) for a, b in zip(before.parts, last.parts, strict=True)]
        for coefficient, target, regressor in zip(self._slopes, moved, slopes, strict=True):
            coefficient.update(target, regressor)
        for beta, target, slope in zip(self._betas, moved[1:], slopes[1:], strict=True):
            beta.update(target - slope, moved[0] - slopes[0])
        if len({self._times()[full.step] for full in self._known}) == 4:
            line, lever = self._line((before, now), last.step)
            bends = self._bends((*earlier, before, now))
            for coefficient, part, chord, bend in zip(self._shares, last.parts, line, bends, strict=True):
                coefficient.update(part - chord, lever * bend)

    def _times(self) -> tuple[float, ...]:
        assert self.sampler is not None
        return self.sampler.times

    def _reach(self, known: Sequence[Known], step: int) -> float:
        """``r``: how far ``step`` lies beyond the last known step, in units of the gap before that.

        0 where that gap is none: solvers of order 2 evaluate twice at one time, and the later evaluation counts.
        """
        before, last, now = (self._times()[i] for i in (known[-2].step, known[-1].step, step))
        return (now - last) / (last - before) if last != before else 0.0


def _impulses(weights: Weights) -> list[float]:
    """What the scheduler's input has of cond and of each distance."""
    return [weights.kappa, *(weights.kappa * weight for weight in weights.deltas)]


class _Used(NamedTuple):
    """An estimate that a step used; ``is_evaluated``: its cond is not estimated."""

    estimate: Known
    is_evaluated: bool


class _Paid(NamedTuple):
    """A debt that a FULL step paid, with the weights that were taken for the step's."""

    step: int
    weights: Weights
    debt: list[torch.Tensor]


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
