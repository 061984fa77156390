r"""The adaptive policy: FULL steps lie as far apart as the error that this costs allows.

A *group* is a FULL step and the :math:`n - 1` steps up to the next one, all PIPELINED (each saves half a forward) or
all SKIPPED (each saves a whole one). It works as the step-size control of an ODE solver does: what a group cost is
measured where it ends, and decides how long the next one may be.

**Error of a group.** Over a group from FULL step :math:`a` to FULL step :math:`b` the guidance rule replaces the
predictions by curves through FULL steps, once :math:`b` is known (`estimates.deferred`). A straight line misses a
prediction :math:`g` that bends by :math:`g''` by :math:`g'' (t - t_a)(t_b - t) / 2`. On every FULL step the bend is
measured, as the second divided difference :math:`g''/2` over it and the two FULL steps before, apart for cond
(:math:`\beta_c`) and for its distance from uncond (:math:`\beta_\delta`), each as the root of the mean square. So the
group adds to the sample about

.. math:: E(n) = \sqrt{\beta_c^2 + (w - 1)^2 \beta_\delta^2}
          \sum_{m=1}^{n-1} W_{a+m} (t_{a+m} - t_a)(t_{a+n} - t_{a+m}),

where :math:`W` are the sampler's weights (`Sampler.weights`), in units of the denoiser's input, whose size is about
one. On PIPELINED steps cond is evaluated, and :math:`\beta_c` does not count. For groups of 2, 3, 4, 5 steps the sum
grows as 1, 4, 10, 20. Where the FULL step that ends a group cannot pay its debt (`Sampler.carries`), :math:`E^2` counts
four times. What is not counted: the later stages of a PIPELINED step read what was made of an older input, of which no
FULL step can tell what it costs. Such steps err more than predicted; by default none is chosen (`DEFAULT_KINDS`).

**What bend to expect.** The last two bends are known up to the FULL step before the last: waiting for the last one's
would leave a GPU without work. The larger counts; if the later one is larger, it is expected to have grown on. Towards
the end predictions are smooth in the logarithm of the steps that are left, :math:`r`, so their bend grows as
:math:`r^{-2}`. A bend belongs to a batch: of several pictures the one that bends most counts.

**Controller.** Forwards should be saved where that costs least. So there is one price :math:`\lambda` of an error, and
a group has the kind and the length that minimise its net cost per step,

.. math:: \min_{n \ge 1,\ \mathrm{kind}} \frac{\lambda E(n)^2 - S(n)}{n}, \qquad
          S(n) = \tfrac{n - 1}{2} \text{ or } n - 1 \text{ forwards saved,}

but it is at most one step longer than the group before it: a bend that was measured over short distances says little of
long ones. While predictions bend fast the best length is 1, so a run begins with FULL steps by itself. It ends with
two: what a group that ends with the last step missed would be paid by a prediction that hardly counts.

With a *tolerance* :math:`\tau` the price is :math:`T / \tau^2`: a forward saved may add :math:`\tau / \sqrt{T}`, and a
run in which most are saved about :math:`\tau`. The first fifth of the run is left alone (`EARLY`). What is missed there
grows by what the network makes of it later, of which nothing is known yet.

With a *target* speed-up the price is set anew on every FULL step, such that the rest of the run saves what is left to
save. For that :math:`E(2)` is forecast. By the middle of the run (`SETTLED`) it is expected to have fallen three
quarters of the way, in orders of magnitude, to its level on other models (`TYPICAL`). Where it is below that level it
is expected to stay. Late in the run (`LATE`) it is expected to grow as :math:`r^{-2}`. So a run does not start to save
while waiting is cheaper, and what is measured corrects the forecast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from .discrepancy import Bend, check_finite
from .plan import DEFAULT_KINDS, FULL, PIPELINED, SKIPPED, StepKind, synchronous_steps
from .sampler import Sampler
from .settings import Refuse, Settings, option

LONGEST_GROUP = 8  # steps

FIRST_GROUP = 4  # FULL step with which one begins at the earliest: the bends of two steps are known there

EARLY = 0.2  # of a run: until then a tolerance skips nothing

#: What is expected of E(2) where a target is spread over a run: about this much in the middle of 50 steps. Of the
#: study's six models, with a solver of first order and with UniPC, it was 1.4e-4 to 9e-4.
TYPICAL = 5e-4
SETTLED = 0.35  # of a run: by then it is near that
LATE = 0.78  # of a run: from then on it grows

MOST = 3  # times as fast as with every step FULL: beyond this nothing was measured to be worth having

LAST_FULL = 2  # steps at the end of a run

GROWN = 1.1  # times the guidance that a group was priced for, above which it ends

UNPAID = 4  # times E^2, where the end of a group cannot pay its debt

#: Forwards of one branch that a step of each kind saves against a FULL step (cost model: FULL 1, PIPELINED 1/2).
SAVES = {PIPELINED: 0.5, SKIPPED: 1.0}

#: Estimated error above which a run warns. With a target, fewer steps were closer in every run of the study above it,
#: and in none below.
DOUBTFUL = 0.04

#: Tolerance where none is given: the study in benchmarks/results/ says what it means.
TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings(Settings):
    """What may be set of `AdaptivePolicy`."""

    tolerance: float | None = option(
        f"Error that skipping may add to the latents, relative to their size (default: {TOLERANCE}, one percent). A "
        "smaller one is closer and saves less.",
        type=float,
        metavar="TAU",
    )
    speedup: float | None = option(
        "Target speed-up over one GPU, for example 2.5. It replaces the tolerance: the policy skips the steps whose "
        "estimated error is smallest until the target is met. With 50 steps and up to 3.3 it was closer than any other "
        "way of saving as much time on all six models of our study, up to 6 on five of them. With fewer steps ask for "
        "less.",
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
        most = MOST * given.stages
        if given.speedup is not None and not 1 <= given.speedup <= most:
            refuse("speedup", f"give a number from 1 (on two GPUs 2, every step FULL) to {most}, such as 2.5")
        return {"tolerance": TOLERANCE} if given.tolerance is None and given.speedup is None else {}


class _Group(NamedTuple):
    """A FULL step and ``length - 1`` steps of a kind after it."""

    kind: StepKind
    length: int

    @property
    def saving(self) -> float:
        return SAVES[self.kind] * (self.length - 1)


_ALONE = _Group(PIPELINED, 1)


class AdaptivePolicy:
    """See the module.

    Args:
        sampler: of the run; its length is the number of steps.
        tolerance: tau, the error that may be added over the run, in units of the denoiser's input.
        speedup: target of the bound of the speed-up, in place of the tolerance.
        kinds: letters of the kinds that the policy may use.
        stages: of a PIPELINED step. What a step saves, it saves of a FULL step's time, whatever that is; the target's
            is over one GPU.

    Raises:
        ValueError: the target is not between all FULL (2 with two stages) and what the run's length and the kinds
            allow.
    """

    reads_bends = True
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
        self._price = None if tolerance is None else self.num_steps / tolerance**2
        self.saving_left: float | None = None  # forwards to save yet, with a target
        self._saves = {kind: saving for kind, saving in SAVES.items() if kind.value in kinds}
        self.may_pipeline = PIPELINED in self._saves
        if speedup is not None:
            # In FULL steps: a synchronous one (`Plan.speedup_bound`) counts as stages / 2 of them.
            full = self.num_steps + (stages / 2 - 1) * synchronous_steps(stages, self.num_steps)
            one_gpu = self.num_steps * (stages if gain is None or stages > 2 else gain)
            self.saving_left = full - one_gpu / speedup
            most = self._longest_saves() * max(self._saves.values(), default=0.0)
            if not 0 <= self.saving_left <= most:
                least, best = one_gpu / full, one_gpu / (full - most)
                mend = "Lower it, or raise --num_inference_steps" if self.saving_left > most else "Raise it"
                raise ValueError(
                    f"speedup={speedup} (--hybrid_speedup): {self.num_steps} steps allow {least:.3g} to {best:.2f}. "
                    f"{mend}."
                )
        self._bends: dict[int, Bend] = {}  # by FULL step
        self._reaches: dict[int, list[float]] = {}  # see `_reach`
        self._groups: dict[int, tuple[_Group, float]] = {}  # by FULL step: those with more than it, and their guidance
        self._group = _ALONE
        self._priced = math.inf  # guidance for which the group was chosen
        self._next_full = 0

    def _longest_saves(self) -> int:
        """Steps between FULL ones, where each group is as long as may be."""
        step, length, found = FIRST_GROUP, 2, 0
        while step + 2 <= self.num_steps - LAST_FULL:
            length = min(length, LONGEST_GROUP, self.num_steps - LAST_FULL - step)
            step, length, found = step + length, length + 1, found + length - 1
        return found

    @property
    def tau_1(self) -> int | None:
        return next((begin + 1 for begin in self._groups), None)

    @property
    def tau_2(self) -> int | None:
        return next((begin + group.length for begin, (group, _) in reversed(self._groups.items())), None)

    @property
    def error(self) -> float:
        """Root of the sum of the groups' E^2, each with the bend that was measured where it ended, or next after it."""
        total = 0.0
        for begin, (group, guidance) in self._groups.items():
            later = [bend for step, bend in self._bends.items() if step >= begin + group.length]
            if later:
                total += self._square(later[0], group.kind, guidance) * self._reach(begin)[group.length - 2]
        return math.sqrt(total)

    def reads_discrepancy(self, step: int) -> bool:
        return step < self.num_steps - 2

    def observe(self, step: int, discrepancy: float, bend: Bend | None = None) -> None:
        """Take what FULL step ``step`` measured.

        Args:
            discrepancy: M.
            bend: of the predictions; None where there are no two FULL steps before it.

        Raises:
            ValueError: the discrepancy is nan or infinite.
        """
        check_finite(step, discrepancy)
        if bend is not None and all(map(math.isfinite, bend)) and bend.cond > 0:  # divided by
            self._bends[step] = bend

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
            self._groups[step] = self._group, guidance
            if self.saving_left is not None:
                self.saving_left -= self._group.saving

    def _end_group(self, step: int) -> None:
        """Let the group end at ``step``, sooner than it was to: it was priced for less guidance than there is."""
        if self.saving_left is not None:
            self.saving_left += SAVES[self._group.kind] * (self._next_full - step)
        begin, _ = self._groups.popitem()
        self._group = self._group._replace(length=step - begin)
        if self._group.length > 1:
            self._groups[begin] = self._group, self._priced
        self._next_full = step

    def _choose(self, step: int, guidance: float) -> _Group:
        """The group that begins with FULL step ``step``."""
        is_done = self.saving_left is not None and self.saving_left <= 0
        if is_done or len(self._bends) < 2 or step + 2 > self.num_steps - LAST_FULL:
            return _ALONE
        *_, before, now = self._bends
        bend = self._expected(step, before, now, guidance)
        if self._price is not None:
            if step < EARLY * self.num_steps:
                return _ALONE
            return self._best(step, bend, guidance, self._price, self._group.length + 1)
        assert self.saving_left is not None
        ahead = self._ahead(step, bend, guidance)
        # The dearest price at which the rest of the run saves enough: bisected over its logarithm.
        low, high = -20.0, 40.0
        for _ in range(24):  # to some millionths of the price
            middle = (low + high) / 2
            is_enough = self._forecast(step, ahead, guidance, math.exp(middle)) >= self.saving_left
            low, high = (middle, high) if is_enough else (low, middle)
        group = self._best(step, ahead[0], guidance, math.exp(low), self._group.length + 1)
        left = math.ceil(self.saving_left / SAVES[group.kind] - 1e-9)  # the target is reached, not missed by a step
        return group._replace(length=min(group.length, left + 1))

    def _expected(self, step: int, before: int, now: int, guidance: float) -> Bend:
        """The bend to expect in a group that begins with FULL step ``step``, from the last two."""
        bend, last = self._bends[now], self._bends[before]
        rise = max(1.0, _size(bend, guidance) / _size(last, guidance)) ** (2 / (now - before))
        # What was measured on FULL step `now` lies about FULL step `before`.
        end = ((self.num_steps - before) / (self.num_steps - step - 1)) ** 2
        return Bend(*(rise * end * max(parts) for parts in zip(bend, last, strict=True)))

    def _ahead(self, step: int, bend: Bend, guidance: float) -> list[Bend]:
        """The bends to expect from FULL step ``step`` on, if ``bend`` is that of a group that begins there."""
        now = _size(bend, guidance) * self._lever(step)
        settled = min(1.0, (TYPICAL * (50 / self.num_steps) ** 3 / now) ** 0.75)  # of that, in the middle
        until = max(1.0, SETTLED * self.num_steps / step)
        ahead = []
        for i in range(step, self.num_steps - LAST_FULL):
            share = settled ** (math.log(min(i / step, until)) / math.log(until)) if until > 1 else 1.0
            share *= self._late(i) / self._late(step) * self._lever(step) / self._lever(i)
            ahead.append(Bend(bend.cond * share, bend.delta * share))
        return ahead

    def _late(self, step: int) -> float:
        """By how much ``E(2)`` is expected to have grown towards the end of a run."""
        return max(1.0, (1 - LATE) * self.num_steps / (self.num_steps - step)) ** 2

    def _forecast(self, step: int, ahead: list[Bend], guidance: float, price: float) -> float:
        """Forwards saved from FULL step ``step`` to the end at this price."""
        saved, at, longest = 0.0, step, self._group.length + 1
        while at - step < len(ahead):
            group = self._best(at, ahead[at - step], guidance, price, longest)
            saved, at, longest = saved + group.saving, at + group.length, group.length + 1
        return saved

    def _best(self, step: int, bend: Bend, guidance: float, price: float, longest: int) -> _Group:
        """The group of at most ``longest`` steps with the least net cost per step: ``(price E(n)^2 - S(n)) / n``."""
        least, best = 0.0, _ALONE
        for kind, saves in self._saves.items():
            square = self._square(bend, kind, guidance)
            for n, reach in enumerate(self._reach(step)[: longest - 1], start=2):
                net = (price * square * reach - saves * (n - 1)) / n
                if net < least:
                    least, best = net, _Group(kind, n)
        return best

    def _square(self, bend: Bend, kind: StepKind, guidance: float) -> float:
        """The square of the bend that counts in a group of this kind."""
        return _size(bend if kind is SKIPPED else bend._replace(cond=0.0), guidance) ** 2

    def _reach(self, step: int) -> list[float]:
        """``E(n)^2`` per unit of the bend's square, for n = 2, 3, ... after ``step``.

        Kept by step: the search for the price asks again and again. No group begins before step 4, and by then the
        sampler is the run's final one.
        """
        if step not in self._reaches:
            assert self.sampler is not None
            found = []
            for n in range(2, min(LONGEST_GROUP, self.num_steps - LAST_FULL - step) + 1):
                is_paid = self.sampler.carries(step + n, range(step + 1, step + n))
                found.append((1 if is_paid else UNPAID) * self._lever(step, n) ** 2)
            self._reaches[step] = found
        return self._reaches[step]

    def _lever(self, step: int, length: int = 2) -> float:
        """The sum in ``E(n)``."""
        assert self.sampler is not None
        weights, end, within = self.sampler.weights, step + length, range(step + 1, step + length)
        return sum(weights[i] * self._apart(step, i) * self._apart(i, end) for i in within)

    def _apart(self, a: int, b: int) -> float:
        """Time from step ``a`` to step ``b``; solvers of order 2 evaluate twice at one, which is not without error."""
        assert self.sampler is not None
        times = self.sampler.times
        return max(abs(times[b] - times[a]), abs(times[-1] - times[0]) / len(times) / 4)


def _size(bend: Bend, guidance: float) -> float:
    """Bend of the guided prediction."""
    return math.hypot(bend.cond, guidance * bend.delta)
