r"""The adaptive policy: FULL steps lie as far apart as one tolerance on the predicted guidance error allows.

A *group* is a FULL step and the :math:`n - 1` steps up to the next one, all PIPELINED (each saves half a forward) or
all SKIPPED (each saves a whole one).

**Estimator.** On FULL step :math:`b` both predictions are known, so the guidance rule is asked what it would have
missed there had it known the FULL steps up to the last one only, and up to the one before that: two errors
:math:`\rho_1, \rho_2` at distances :math:`m_1 < m_2` in steps, for either kind (`discrepancy.Trial`). The error of an
estimate is a drift that grows with the distance and a noise that does not (what no history tells of a prediction,
rounding included):

.. math:: \rho(m)^2 = k^2 m^2 + \nu^2, \qquad
          k^2 = \frac{\rho_2^2 - \rho_1^2}{m_2^2 - m_1^2}, \quad \nu^2 = \rho_1^2 - k^2 m_1^2,

both kept as running means (weight 1/2 a FULL step) and in units of

.. math:: s_i = \frac{T}{i\,(T - i)},

because over the first and the last part of a run predictions change by the share of the run that has passed, and is
left: measured on two models of both families, :math:`k / s` is level but for a fall at the start. The guidance error of
a group is predicted as

.. math:: E(n)^2 = (w - 1)^2 \left[ \Big( \sum_{m=1}^{n-1} V_{b+m}\, m\, k \Big)^2
          + \sum_{m=1}^{n-1} V_{b+m}^2\, \nu^2 \right], \qquad V_i = \frac{W_i\, s_i}{\sqrt{1 - i/T}}.

:math:`W` are the sampler's weights (`Sampler.weights`), which make it an error of the denoiser's input whatever the
scheduler and the number of steps; the root is how much of it the picture keeps, since later steps correct part of it
(measured likewise). What is not counted: the later stages of a PIPELINED step read what was made of an older input, of
which no FULL step can tell what it costs. Such steps err more than predicted; by default none is chosen
(`DEFAULT_KINDS`).

**Controller.** Forwards should be saved where that costs least: the sum of :math:`E^2` (errors of groups are
independent) is to be least for what is saved. So there is one price :math:`\lambda` for all of them, and a group has
the kind and the length that minimise its net cost per step,

.. math:: \min_{n \ge 1,\ \mathrm{kind}} \frac{\lambda E(n)^2 - S(n)}{n}, \qquad
          S(n) = \tfrac{n - 1}{2} \text{ or } n - 1 \text{ forwards saved.}

On every FULL step the price is set anew, such that the rest of the run, forecast by the laws that are known, spends
what is left to spend: with a tolerance :math:`\tau`, an error of :math:`\sum E^2 = \tau^2` over the run; with a target
speed-up, the forwards to save. The laws are those of the FULL step before, :math:`i`: waiting for the present one's
would leave a GPU without work. If :math:`k / s` has fallen since step :math:`i / 2`, it is expected to fall as much
again by step :math:`2 i`, so that a run does not start to save while waiting is cheaper. Nothing but the run's own past
is used. :math:`n = 1` everywhere while the predictions change fast is the warm-up (tau_1 falls out of it), and so is
the dense end. The last step of a run is FULL. Where the FULL step that ends a group cannot pay its debt
(`Sampler.carries`), :math:`E^2` counts four times: what is paid back halves an error (measured likewise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .discrepancy import Trial, check_finite
from .plan import DEFAULT_KINDS, FULL, PIPELINED, SKIPPED, StepKind, synchronous_steps
from .sampler import Sampler
from .settings import Refuse, Settings, option

LONGEST_GROUP = 8  # steps: a law measured over two gaps is not trusted further

GROWN = 1.1  # times the guidance that a group was priced for, above which it ends

UNPAID = 4  # times E^2, where the end of a group cannot pay its debt

#: Forwards of one branch that a step of each kind saves against a FULL step (cost model: FULL 1, PIPELINED 1/2).
SAVES = {PIPELINED: 0.5, SKIPPED: 1.0}


#: Tolerance where none is given: the study in benchmarks/results/ says what it means.
TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings(Settings):
    """What may be set of `AdaptivePolicy`."""

    tolerance: float | None = option(
        f"Error allowed over the whole run, in units of the branches' discrepancy (default: {TOLERANCE}). A "
        "smaller one is closer and saves less.",
        type=float,
        metavar="TAU",
    )
    speedup: float | None = option(
        "Target speed-up over one GPU, for example 2.5. It replaces the tolerance: the policy skips the steps whose "
        "estimated error is smallest until the target is met.",
        type=float,
        metavar="S",
    )
    kinds: str | None = option(
        "Kinds of step that the policy may use. F: FULL, P: PIPELINED, S: SKIPPED (default: FS).",
        choices=["FPS", "FP", "FS"],
    )

    @classmethod
    def check(cls, given: Any, refuse: Refuse) -> dict[str, Any]:
        if given.kinds not in (None, "FPS", "FP", "FS"):
            refuse("kinds", "give FPS, FP (nothing SKIPPED) or FS (nothing PIPELINED)")
        if given.tolerance is not None and given.speedup is not None:
            refuse("speedup", "give it or --hybrid_tolerance, not both")
        if given.tolerance is not None and not 0 < given.tolerance < math.inf:
            refuse("tolerance", f"give a positive number, such as {TOLERANCE}")
        most = 5 * given.stages
        if given.speedup is not None and not 1 <= given.speedup < most:
            refuse("speedup", f"give a number from 1 (on two GPUs 2, every step FULL) to less than {most}, such as 2.5")
        return {"tolerance": TOLERANCE} if given.tolerance is None and given.speedup is None else {}


class _Law(NamedTuple):
    """How an estimate errs: see the module.

    Attributes:
        drift: (k / s)^2.
        noise: (nu / s)^2.
    """

    drift: float
    noise: float


class _Group(NamedTuple):
    """A FULL step and ``length - 1`` steps of a kind after it; ``error`` is its E^2."""

    kind: StepKind
    length: int
    error: float = 0.0

    @property
    def saving(self) -> float:
        return SAVES[self.kind] * (self.length - 1)


_ALONE = _Group(PIPELINED, 1)


class AdaptivePolicy:
    """See the module.

    Args:
        sampler: of the run; its length is the number of steps.
        tolerance: tau, the error allowed over the run, in the discrepancy's norm.
        speedup: target of the bound of the speed-up, in place of the tolerance.
        kinds: letters of the kinds that the policy may use.
        stages: of a PIPELINED step. What a step saves, it saves of a FULL step's time, whatever that is; the target's
            is over one GPU.

    Raises:
        ValueError: the target is not between all FULL (2 with two stages) and what the run's length and the kinds
            allow.
    """

    reads_trials = True
    lag = 1

    def __init__(
        self,
        sampler: Sampler,
        *,
        tolerance: float | None = None,
        speedup: float | None = None,
        kinds: str = DEFAULT_KINDS,
        stages: int = 2,
        gain: float | None = None,
    ) -> None:
        self.sampler: Sampler | None = sampler
        self.num_steps = len(sampler.times)
        self.error_left = None if tolerance is None else tolerance**2  # sum of E^2 to spend yet
        self.saving_left: float | None = None  # forwards to save yet, with a target
        self._saves = {kind: saving for kind, saving in SAVES.items() if kind.value in kinds}
        self.may_pipeline = PIPELINED in self._saves
        if speedup is not None:
            # In FULL steps: a synchronous one (`Plan.speedup_bound`) counts as stages / 2 of them.
            full = self.num_steps + (stages / 2 - 1) * synchronous_steps(stages, self.num_steps)
            one_gpu = self.num_steps * (stages if gain is None or stages > 2 else gain)
            self.saving_left = full - one_gpu / speedup
            groups, rest = divmod(max(self.num_steps - 6, 0), LONGEST_GROUP)
            most = (groups * (LONGEST_GROUP - 1) + max(rest - 1, 0)) * max(self._saves.values(), default=0.0)
            if not 0 <= self.saving_left <= most:
                least, best = one_gpu / full, one_gpu / (full - most)
                mend = "Lower it, or raise --num_inference_steps" if self.saving_left > most else "Raise it"
                raise ValueError(
                    f"speedup={speedup} (--hybrid_speedup): {self.num_steps} steps allow {least:.3g} to {best:.2f}. "
                    f"{mend}."
                )
        self._laws: dict[int, dict[StepKind, _Law]] = {}  # by FULL step: running means
        self._measured: dict[int, dict[StepKind, _Law]] = {}  # as measured there
        self._tables: dict[int, list[tuple[float, float]]] = {}  # see `_groups`
        self._observed = 0
        self._group = _ALONE
        self._priced = math.inf  # guidance for which the group was chosen
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

    def observe(self, step: int, discrepancy: float, trials: Sequence[Trial] = ()) -> None:
        """Take what FULL step ``step`` measured.

        Args:
            discrepancy: M.
            trials: of the guidance rule, nearest first.

        Raises:
            ValueError: the discrepancy is nan or infinite.
        """
        check_finite(step, discrepancy)
        self._observed = step
        self._learn(step, trials)

    def kind(self, step: int, guidance: float = 1.0) -> StepKind:
        if step > self._next_full:
            self._begin_group(step - 1, guidance)
        elif step < self._next_full and guidance > GROWN * self._priced:
            self._end_group(step)
        return self._group.kind if step < self._next_full else FULL

    def _begin_group(self, step: int, guidance: float) -> None:
        """Decide how far the next FULL step lies from FULL step ``step``."""
        self._group, self._priced = self._choose(step, guidance), guidance
        self._next_full = step + self._group.length
        if self._group.length > 1:
            self._first = step + 1 if self._first is None else self._first
            self._last = self._next_full - 1
            if self.saving_left is not None:
                self.saving_left -= self._group.saving
            elif self.error_left is not None:
                self.error_left = max(0.0, self.error_left - self._group.error)

    def _end_group(self, step: int) -> None:
        """Let the group end at ``step``, sooner than it was to: it was priced for less guidance than there is."""
        if self.saving_left is not None:
            self.saving_left += SAVES[self._group.kind] * (self._next_full - step)
        self._next_full = step

    def _learn(self, step: int, trials: Sequence[Trial]) -> None:
        errors = [error for trial in trials for error in trial[1:]]
        if step == 0 or len(trials) < 2 or not all(0 < error < math.inf for error in errors):
            return
        near, far = trials[:2]
        unit = _shape(step, self.num_steps) ** 2
        measured = {
            PIPELINED: _law(near.distance, near.pipelined, far.distance, far.pipelined, unit),
            SKIPPED: _law(near.distance, near.skipped, far.distance, far.skipped, unit),
        }
        before = next(reversed(self._laws.values()), measured)
        self._measured[step] = measured
        self._laws[step] = {
            kind: _Law(math.sqrt(law.drift * before[kind].drift), (law.noise + before[kind].noise) / 2)
            for kind, law in measured.items()
        }

    def _choose(self, step: int, guidance: float) -> _Group:
        """The group that begins with FULL step ``step``."""
        now = self._observed
        half = max((known for known in self._measured if known <= now / 2), default=None)
        if now not in self._laws or half is None or self._is_enough(0.0, 0.0):
            return _ALONE
        ahead = self._ahead(step, now, half)
        # The dearest price at which the rest of the run spends enough: bisected over its logarithm.
        low, high = -20.0, 40.0
        for _ in range(24):  # to some millionths of the price
            middle = (low + high) / 2
            is_enough = self._is_enough(*self._forecast(step, ahead, guidance, math.exp(middle)))
            low, high = (middle, high) if is_enough else (low, middle)
        if self.saving_left is None:
            return self._best(step, ahead[0], guidance, math.exp(high))  # the tolerance is not exceeded
        group = self._best(step, ahead[0], guidance, math.exp(low))
        left = math.ceil(self.saving_left / SAVES[group.kind] - 1e-9)  # the target is reached, not missed by a step
        return group._replace(length=min(group.length, left + 1))

    def _is_enough(self, saving: float, error: float) -> bool:
        """Whether a rest of the run that saves and errs so much spends what is left."""
        if self.saving_left is not None:
            return saving >= self.saving_left
        return self.error_left is not None and error >= self.error_left

    def _ahead(self, step: int, now: int, half: int) -> list[dict[StepKind, _Law]]:
        """The laws expected from ``step`` to the end, by those of FULL step ``now`` and their fall since ``half``."""
        laws, ahead = self._laws[now], []
        falls = {kind: _fall(self._measured, half, now, kind) for kind in self._saves}
        for i in range(step, self.num_steps):
            shares = {kind: min(2.0, i / now) ** fall for kind, fall in falls.items()}
            ahead.append({k: _Law(laws[k].drift * share, laws[k].noise * share) for k, share in shares.items()})
        return ahead

    def _forecast(
        self, step: int, ahead: list[dict[StepKind, _Law]], guidance: float, price: float
    ) -> tuple[float, float]:
        """(forwards saved, sum of E^2) from FULL step ``step`` to the end at this price."""
        saved, error, at = 0.0, 0.0, step
        while at < self.num_steps - 1:
            group = self._best(at, ahead[at - step], guidance, price)
            saved, error, at = saved + group.saving, error + group.error, at + group.length
        return saved, error

    def _best(self, step: int, laws: dict[StepKind, _Law], guidance: float, price: float) -> _Group:
        """The group with the least net cost per step: ``(price E(n)^2 - S(n)) / n``."""
        least, best = 0.0, _ALONE
        for kind, saves in self._saves.items():
            drift, noise = guidance**2 * laws[kind].drift, guidance**2 * laws[kind].noise
            for n, (per_drift, per_noise) in enumerate(self._groups(step), start=2):
                error = drift * per_drift + noise * per_noise
                net = (price * error - saves * (n - 1)) / n
                if net < least:
                    least, best = net, _Group(kind, n, error)
        return best

    def _groups(self, step: int) -> list[tuple[float, float]]:
        """``E(n)^2`` per unit of ``(w - 1)^2 k^2`` and of ``(w - 1)^2 nu^2``, for n = 2, 3, ... after ``step``.

        Kept by step: the search for the price asks again and again. No group begins before step 2, and by then the
        sampler is the run's final one.
        """
        if step not in self._tables:
            assert self.sampler is not None
            table, drift, noise = [], 0.0, 0.0
            for n in range(2, min(LONGEST_GROUP, self.num_steps - 1 - step) + 1):
                at = step + n - 1
                weight = self.sampler.weights[at] * _shape(at, self.num_steps) / math.sqrt(1 - at / self.num_steps)
                drift += weight * (n - 1)
                noise += weight**2
                times = 1 if self.sampler.carries(step + n, range(step + 1, step + n)) else UNPAID
                table.append((times * drift**2, times * noise))
            self._tables[step] = table
        return self._tables[step]


def _shape(step: int, num_steps: int) -> float:
    """``s``."""
    return num_steps / (step * (num_steps - step))


def _law(m1: float, rho1: float, m2: float, rho2: float, unit: float) -> _Law:
    """The law through two errors, over ``unit`` = s^2."""
    # Of what was measured, half at least is taken for drift: a chance reading must not end in a long group. (Groups of
    # three err 2 to 2.6 times as much as groups of two, measured on emoji-sdxl; by noise alone it would be 1.4.)
    least, most = (rho1 / m1) ** 2 / 2, (rho1 / m1) ** 2
    drift = min(max((rho2**2 - rho1**2) / (m2**2 - m1**2), least), most)
    return _Law(drift / unit, (rho1**2 - drift * m1**2) / unit)


def _fall(measured: dict[int, dict[StepKind, _Law]], half: int, now: int, kind: StepKind) -> float:
    """Exponent of the step with which the drift has changed since step ``half``; 0 if it has risen."""
    return min(0.0, math.log(measured[now][kind].drift / measured[half][kind].drift) / math.log(now / half))
