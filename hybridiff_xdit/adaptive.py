r"""The adaptive policy: FULL steps lie as far apart as one tolerance on the predicted guidance error allows.

**Estimator.** On FULL step :math:`b` the true delta is known, so the guidance rule is asked what it would have estimated
there from the FULL steps up to the last one, and up to the one before that: two errors :math:`\rho` at distances
:math:`m_1 < m_2`, in the discrepancy's norm, ``mean|delta - d| / mean|pred_u|``. They give the law by which the estimate
drifts from a FULL step on,

.. math:: \rho(m) = \rho_1 \left(m / m_1\right)^p e^{g m}, \qquad
          p = \frac{\ln \rho_2 / \rho_1}{\ln m_2 / m_1} \in [\tfrac14, 2],

where :math:`g \ge 0` is the growth per step of the law itself since the last FULL step (the discrepancy rises towards the
end of a run). The guidance error of a group of :math:`n - 1` PIPELINED steps and the FULL step that ends it is predicted as

.. math:: E(n) = |w - 1| \sum_{m=1}^{n-1} W_{b+m}\, \rho(m),

with the sampler's weights :math:`W` (`Sampler.weights`), which make it an error of the denoiser's input whatever the
scheduler and the number of steps.

**Controller.** PIPELINED steps should lie where they cost least: the sum of :math:`E^2` (errors of groups are independent)
is to be least for the number of PIPELINED steps. So there is one price for all of them, and a group is as long as minimises
its net cost per step,

.. math:: n = \arg\min_{n \ge 1} \frac{1}{n} \left( \frac{T}{\tau^2} E(n)^2 - (n - 1) \right).

:math:`\tau` is the tolerance: pipelining all T steps at the price would give a root-mean-square error of :math:`\tau`.
:math:`n = 1` everywhere while the discrepancy falls fast is the warm-up (tau_1 falls out of it), and so is the dense end.
The last step of a run is FULL, so that no debt of the guidance is left.

**Target.** With a target speed-up the number of PIPELINED steps is given and the price is not: on every FULL step the
price is the one at which the rest of the run, forecast by the present law (its growth :math:`g < 0` included while it
falls), takes the PIPELINED steps that are left. Nothing but the run's own past is used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .plan import FULL, PIPELINED, StepKind
from .sampler import Sampler

LONGEST_GROUP = 8  # steps: a law measured over two gaps is not trusted further
REST = 0.1  # share of the run that a forecast leaves FULL at its end, where the discrepancy rises


class _Law(NamedTuple):
    """How the estimate drifts after FULL step ``step``: see the module."""

    step: int
    distance: float
    error: float
    power: float
    growth: float

    def __call__(self, m: float) -> float:
        return self.error * (m / self.distance) ** self.power


class AdaptivePolicy:
    """See the module.

    Args:
        sampler: of the run; its length is the number of steps.
        tolerance: tau, in the discrepancy's norm.
        speedup: target of the bound of the speed-up, in place of the tolerance.

    Raises:
        ValueError: the target is not between 2 (all FULL) and what the run's length allows.
    """

    reads_drift = True

    def __init__(self, sampler: Sampler, *, tolerance: float | None = None, speedup: float | None = None) -> None:
        self.sampler: Sampler | None = sampler
        self.num_steps = len(sampler.times)
        self.tolerance = tolerance
        self._rest = self.num_steps - 1 - math.ceil(REST * self.num_steps)
        self.budget: int | None = None
        if speedup is not None:
            self.budget = round(2 * self.num_steps - 4 * self.num_steps / speedup)
            most = (self.num_steps - 4) * (LONGEST_GROUP - 1) // LONGEST_GROUP
            if not 0 <= self.budget <= most:
                best = 2 * self.num_steps / (self.num_steps - max(most, 0) / 2)
                raise ValueError(
                    f"speedup={speedup} (--hybrid_speedup): {self.num_steps} steps allow 2 to {best:.2f}. Lower it, or "
                    "raise --num_inference_steps."
                )
        self._law: _Law | None = None
        self._price = math.inf  # of the squared guidance error, in PIPELINED steps
        self._next_full = 0
        self._first: int | None = None
        self._last: int | None = None

    @property
    def tau_1(self) -> int | None:
        return self._first

    @property
    def tau_2(self) -> int | None:
        return None if self._last is None else self._last + 1

    def reads_discrepancy(self, step: int) -> bool:
        return step < self.num_steps - 2

    def observe(self, step: int, discrepancy: float, drift: list[tuple[float, float]], guidance: float) -> None:
        """Take what FULL step ``step`` measured, and decide how far the next one lies.

        Args:
            drift: (distance, error) of the rule's trials, nearest first.
            guidance: ``w - 1``.
        """
        self._learn(step, drift)
        length = self._group(step, guidance)
        self._next_full = step + length
        if length > 1:
            self._first = step + 1 if self._first is None else self._first
            self._last = step + length - 1
            if self.budget is not None:
                self.budget -= length - 1

    def kind(self, step: int) -> StepKind:
        return PIPELINED if step < self._next_full else FULL

    def _learn(self, step: int, drift: list[tuple[float, float]]) -> None:
        before, self._law = self._law, None
        if len(drift) < 2 or not all(0 < error < math.inf for _, error in drift):
            return
        (near, error), (far, further) = drift[:2]
        power = min(2.0, max(0.25, math.log(further / error) / math.log(far / near)))
        growth = 0.0
        if before is not None:
            growth = math.log(error / before(near)) / (step - before.step)
        self._law = _Law(step, near, error, power, max(-0.5, min(0.5, growth)))

    def _group(self, step: int, guidance: float) -> int:
        """Length of the group that begins with FULL step ``step``."""
        if self._law is None:
            return 1
        if self.budget is None:
            assert self.tolerance is not None
            return self._length(step, guidance, self.num_steps / self.tolerance**2)
        if self.budget <= 0:
            return 1
        if step < self._rest:
            # The dearest price that still spends the budget: bisected over its logarithm.
            low, high = -20.0, 40.0
            for _ in range(40):
                middle = (low + high) / 2
                spends = self._forecast(step, guidance, math.exp(middle)) >= self.budget
                low, high = (middle, high) if spends else (low, middle)
            self._price = math.exp(low)
        return min(self._length(step, guidance, self._price), self.budget + 1)

    def _forecast(self, step: int, guidance: float, price: float) -> int:
        """PIPELINED steps from ``step`` to the end if the present law and this price held."""
        count = 0
        while step < self._rest:
            length = min(self._length(step, guidance, price), self._rest - step)
            count += length - 1
            step += length
        return count

    def _length(self, step: int, guidance: float, price: float) -> int:
        """Steps of the group with the least net cost per step: ``price E(n)^2 - (n - 1)``, over n."""
        law = self._law
        assert law is not None and self.sampler is not None
        best, length, error = 0.0, 1, 0.0
        longest = min(LONGEST_GROUP, self.num_steps - 1 - step)
        for n in range(2, longest + 1):
            m = n - 1
            since = step + m - law.step
            # A falling law is believed for what lies ahead (the forecast), a rising one for this group already.
            growth = law.growth if law.growth > 0 or step > law.step else 0.0
            error += abs(guidance) * self.sampler.weights[step + m] * law(m) * math.exp(growth * min(since, 2 * LONGEST_GROUP))
            net = (price * error**2 - m) / n
            if net < best:
                best, length = net, n
        return length
