"""What a user chooses, in one object."""

import os
from dataclasses import dataclass
from typing import Any

from .guidance import RULES
from .plan import POLICIES, Plan

_PAPER_ONLY = ("interval", "slope_window", "slope_threshold", "tau_cap")


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How to run ``hybrid-cond``. Each field is also the flag ``--hybrid_<field>``.

    Attributes:
        policy: ``cfg`` (every step FULL), ``paper`` (one PIPELINED window, as published) or ``fixed`` (`plan`).
            Default: ``fixed`` if a plan is given, else ``paper``.
        guidance: what stands for the guidance on PIPELINED steps: ``mixed`` (the published code), ``none`` or
            ``reuse``. Default: ``mixed`` with ``paper``, else ``reuse``.
        interval: k, length of the published window, steps. Default: the preset, scaled to the run's length;
            so too for the next three.
        slope_window: L, steps.
        slope_threshold: g, discrepancy per step.
        tau_cap: the latest step at which the window starts.
        plan: for ``fixed``: a letter F or P a step, or ``START-END/GAP`` (`Plan.parse`).
        stages: stages of a PIPELINED step. Only 2 so far.
        report: folder for ``report.json`` and ``report.png``, made if missing; rank 0 writes.

    Raises:
        ValueError: a field is unknown, out of range, or has no effect under the policy; the message names the
            flag and the mend.
    """

    policy: str | None = None
    guidance: str | None = None
    interval: int | None = None
    slope_window: int | None = None
    slope_threshold: float | None = None
    tau_cap: int | None = None
    plan: str | None = None
    stages: int | None = None
    report: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        policy = self.policy or ("paper" if self.plan is None else "fixed")
        object.__setattr__(self, "policy", policy)
        self._one_of("policy", POLICIES)
        object.__setattr__(self, "guidance", self.guidance or ("mixed" if policy == "paper" else "reuse"))
        self._one_of("guidance", RULES)
        for name in ("interval", "slope_window", "tau_cap"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                self._refuse(name, "give a whole number of steps, 1 or more")
        if self.slope_threshold is not None and not 0 < self.slope_threshold < float("inf"):
            self._refuse("slope_threshold", "give a positive number, such as 4e-4")
        for name in _PAPER_ONLY:
            if policy != "paper" and getattr(self, name) is not None:
                self._refuse(name, f"it has no effect with --hybrid_policy {policy}: drop it, or use paper")
        if policy == "fixed" and self.plan is None:
            self._refuse("plan", "--hybrid_policy fixed needs a plan, such as --hybrid_plan 8-48/2")
        if policy != "fixed" and self.plan is not None:
            self._refuse("plan", f"it has no effect with --hybrid_policy {policy}: drop it, or use fixed")
        if self.plan is not None:
            # The run's length is not known yet: read a pattern against the shortest run that it fits.
            end = self.plan.partition("-")[2].partition("/")[0]
            Plan.parse(self.plan, int(end) if end.isdigit() else None)
        if self.stages not in (None, 2):
            self._refuse("stages", "only 2 is offered so far: drop the flag")

    def paper_constants(self) -> dict[str, Any]:
        """The published rule's constants that the user set; None keeps the preset."""
        return {name: getattr(self, name) for name in _PAPER_ONLY}

    def _one_of(self, field: str, names: dict[str, Any]) -> None:
        if getattr(self, field) not in names:
            self._refuse(field, f"choose one of {', '.join(names)}")

    def _refuse(self, field: str, mend: str) -> None:
        raise ValueError(f"{field}={getattr(self, field)!r} (--hybrid_{field}): {mend}.")
