"""The published switching rule (arXiv 2602.21760): its constants, its detector of a plateau, and its policy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from .discrepancy import Bend, check_finite
from .plan import FULL, PIPELINED, StepKind
from .sampler import Sampler
from .settings import Refuse, Settings, option


@dataclass(frozen=True, kw_only=True)
class PaperConstants:
    """Constants of the published switching rule, in steps of the run (arXiv 2602.21760, section 5).

    Attributes:
        slope_window: ``L``, steps.
        slope_threshold: ``g``, discrepancy per step.
        interval: ``k``, length of the PIPELINED window in steps.
        tau_cap: the latest step at which the window may start.
        level: discrepancy of the first step where ``g`` holds; it grows with that of the run. None: it holds anywhere.
    """

    slope_window: int
    slope_threshold: float
    interval: int
    tau_cap: int
    level: float | None = None

    def scaled(self, num_steps: int) -> PaperConstants:
        """The same rule for a run of another length: published figures are for 50 steps."""
        ratio = num_steps / 50
        return replace(
            self,
            slope_window=max(1, round(self.slope_window * ratio)),
            slope_threshold=self.slope_threshold / ratio,
            interval=max(1, round(self.interval * ratio)),
            tau_cap=max(1, round(self.tau_cap * ratio)),
        )


@dataclass(frozen=True, kw_only=True)
class PaperSettings(Settings):
    """What may be set of `PaperPolicy`; what is not is the published preset, scaled to the run's length."""

    interval: int | None = option(
        "k: number of PIPELINED steps in the window. By default this and the next three are the published constants, "
        "scaled to the run's length. They are SD3's for every model but SDXL and its kind.",
        type=int,
        metavar="K",
    )
    slope_window: int | None = option(
        "L: number of steps over which the fall of the discrepancy is measured.", type=int, metavar="L"
    )
    slope_threshold: float | None = option("g: fall per step at which the window starts.", type=float, metavar="G")
    tau_cap: int | None = option("Latest step at which the window starts.", type=int, metavar="STEP")

    @classmethod
    def check(cls, given: Any, refuse: Refuse) -> dict[str, Any]:
        for name in ("interval", "slope_window", "tau_cap"):
            value = getattr(given, name)
            if value is not None and (type(value) is not int or value < 1):
                refuse(name, "give a whole number of steps, 1 or more")
        if given.slope_threshold is not None and not 0 < given.slope_threshold < float("inf"):
            refuse("slope_threshold", "give a positive number, such as 4e-4")
        return {}

    def constants(self, family: str, num_steps: int) -> PaperConstants:
        """The constants of a run: the family's preset, scaled, but for what was set."""
        names = ("slope_window", "slope_threshold", "interval", "tau_cap")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "slope_threshold" in given:
            given["level"] = None
        return replace(PAPER_PRESETS[family].scaled(num_steps), **given)


#: Published constants at 50 steps, by the family of the denoiser: SDXL (DDIM, w=5) and SD3 (Euler, w=7). For all other
#: models, SD3's in proportion to the run's own discrepancy: a model of SD3's type has 0.57 on its first step.
PAPER_PRESETS = {
    "unet": PaperConstants(slope_window=12, slope_threshold=4e-4, interval=5, tau_cap=15),
    "mmdit": PaperConstants(slope_window=15, slope_threshold=5e-4, interval=5, tau_cap=40),
    "blocks": PaperConstants(slope_window=15, slope_threshold=5e-4, interval=5, tau_cap=40, level=0.57),
}


class SlopeDetector:
    """Finds the step after which the discrepancy has stopped falling (arXiv 2602.21760, section 4.2).

    ``G_i = (M_{i-L} - M_i) / L`` is the mean fall per step over the last ``L`` steps; the detector fires at the
    first ``i`` with ``0 <= G_i < g``. (The paper's text prints the opposite sign; its condition needs this one.)

    Args:
        window: ``L``, in steps.
        threshold: ``g``, in units of discrepancy per step.
        level: see `PaperConstants`.
    """

    def __init__(self, window: int, threshold: float, level: float | None = None) -> None:
        self.window = window
        self.threshold = threshold
        self._level = level
        self._recent: deque[float] = deque(maxlen=window + 1)

    def update(self, step: int, value: float) -> bool:
        """Take ``M_step``; return whether the detector fires there.

        Raises:
            ValueError: ``value`` is nan or infinite.
        """
        check_finite(step, value)
        if self._level is not None:
            self.threshold, self._level = self.threshold * value / self._level, None
        self._recent.append(value)
        if len(self._recent) <= self.window:
            return False
        slope = (self._recent[0] - value) / self.window
        return 0.0 <= slope < self.threshold


class PaperPolicy:
    """One window of ``k`` PIPELINED steps, as published (arXiv 2602.21760, section 4.2).

    ``tau_1 = min(tau_1', tau_cap)`` and ``tau_2 = tau_1 + k``. tau_1 is the first PIPELINED step, counted from 0:
    when the detector fires on the discrepancy of FULL step ``i`` (which has then been evaluated), ``tau_1' = i + 1``.

    Raises:
        ValueError: the window does not fit the run (``tau_cap + k > num_steps``).
    """

    reads_bends = False
    error: float | None = None
    lag = 0  # as published
    may_pipeline = True
    sampler: Sampler | None = None

    def __init__(self, num_steps: int, constants: PaperConstants) -> None:
        if constants.tau_cap + constants.interval > num_steps:
            raise ValueError(
                f"tau_cap={constants.tau_cap} + interval={constants.interval} is more than the run's {num_steps} "
                "steps. Lower --hybrid_tau_cap or --hybrid_interval, raise --num_inference_steps, or use "
                "--hybrid_policy cfg."
            )
        self.constants = constants
        self.tau_1: int | None = None
        self._detector = SlopeDetector(constants.slope_window, constants.slope_threshold, constants.level)

    @property
    def tau_2(self) -> int | None:
        return None if self.tau_1 is None else self.tau_1 + self.constants.interval

    def reads_discrepancy(self, step: int) -> bool:
        # The last step before the cap decides nothing: the window starts after it in any case.
        return self.tau_1 is None and step + 1 < self.constants.tau_cap

    def observe(self, step: int, discrepancy: float, bend: Bend | None = None) -> None:
        if self._detector.update(step, discrepancy):
            self.tau_1 = step + 1

    def kind(self, step: int, guidance: float = 1.0) -> StepKind:
        if self.tau_1 is None and step >= self.constants.tau_cap:
            self.tau_1 = self.constants.tau_cap
        in_window = self.tau_1 is not None and self.tau_1 <= step < self.tau_1 + self.constants.interval
        return PIPELINED if in_window else FULL
