"""What a user chooses, in one object."""

import os
from dataclasses import dataclass, replace
from typing import Any

from .estimates.rules import RULES
from .schedule.plan import SKIPPED, Plan
from .schedule.policies import POLICIES

_PAPER_ONLY = ("interval", "slope_window", "slope_threshold", "tau_cap")

#: Tolerance of the adaptive policy where none is given: the study in benchmarks/results/ says what it means.
TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """How to run ``hybrid-cond``. Each field is also the flag ``--hybrid_<field>``.

    Attributes:
        policy: ``adaptive`` (FULL steps as far apart as `tolerance` allows), ``cfg`` (every step FULL), ``paper`` (one
            PIPELINED window, as published) or ``fixed`` (`plan`). Default: ``fixed`` if a plan is given, else
            ``adaptive``.
        tolerance: for ``adaptive``: the guidance error allowed over the run, in the discrepancy's norm
            (`adaptive`). Default 0.005.
        speedup: for ``adaptive``, in place of the tolerance: the bound of the speed-up over one GPU to reach, from that
            of all FULL steps (2 for two branches on two ranks, 1 on one).
        kinds: for ``adaptive``: letters of the kinds of step that it may use: ``FS``, ``FP`` or ``FPS``. Default
            ``FS``.
        guidance: what stands for the guidance where it is not evaluated: ``mixed`` (the published code), ``none``,
            ``reuse`` (the last delta) or ``deferred`` (estimates whose error is paid back on the next FULL step).
            Default: ``mixed`` with ``paper``, else ``deferred``.
        interval: k, length of the published window, steps. Default: the preset, scaled to the run's length;
            so too for the next three.
        slope_window: L, steps.
        slope_threshold: g, discrepancy per step.
        tau_cap: the latest step at which the window starts.
        plan: for ``fixed``: a letter F, P or S a step, or ``START-END/GAP`` (`Plan.parse`).
        stages: stages of a PIPELINED step, an even number, and with it the ranks of a picture (or groups of ranks that
            split its tokens): half of them evaluate a branch on FULL steps.
        balance: what makes the stages' shares alike: ``time``, measured on a GPU on the first run of a size (elsewhere,
            and where a branch's tokens are split, it is ``flops``), or ``flops``, which gives the same stages, and so
            the same pictures, on any device. Default: ``time``.
        cuda_graphs: whether a GPU's kernels are launched by CUDA graphs (`graphs`). Default: yes.
        report: folder for ``report.json`` and ``report.png``, made if missing; rank 0 writes.

    Raises:
        ValueError: a field is unknown, out of range, or has no effect under the policy; the message names the
            flag and the mend.
    """

    policy: str | None = None
    guidance: str | None = None
    tolerance: float | None = None
    speedup: float | None = None
    kinds: str | None = None
    interval: int | None = None
    slope_window: int | None = None
    slope_threshold: float | None = None
    tau_cap: int | None = None
    plan: str | None = None
    stages: int = 2
    balance: str | None = None
    cuda_graphs: bool | None = None
    report: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        policy = self.policy or ("adaptive" if self.plan is None else "fixed")
        object.__setattr__(self, "policy", policy)
        self._one_of("policy", POLICIES)
        object.__setattr__(self, "guidance", self.guidance or ("mixed" if policy == "paper" else "deferred"))
        self._one_of("guidance", RULES)
        if self.balance not in (None, "time", "flops"):
            self._refuse("balance", "give time or flops")
        if self.cuda_graphs not in (None, True, False):
            self._refuse("cuda_graphs", "give True (on the command line: on) or False (off)")
        if type(self.stages) is not int or self.stages < 2 or self.stages % 2:
            self._refuse("stages", "give an even number, 2 or more: half of the ranks are a branch's")
        self._check_adaptive()
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
            plan = Plan.parse(self.plan, int(end) if end.isdigit() else None)
            if SKIPPED in plan and not RULES[str(self.guidance)].estimates:
                self._refuse("guidance", "it cannot do without an evaluation (S in the plan): use deferred or reuse")

    def _check_adaptive(self) -> None:
        for name in ("tolerance", "speedup", "kinds"):
            if self.policy != "adaptive" and getattr(self, name) is not None:
                self._refuse(name, f"it has no effect with --hybrid_policy {self.policy}: drop it, or use adaptive")
        if self.policy != "adaptive":
            return
        if not RULES[str(self.guidance)].estimates:
            self._refuse("guidance", "it estimates no guidance whose error adaptive could bound: use deferred or reuse")
        if self.kinds not in (None, "FPS", "FP", "FS"):
            self._refuse("kinds", "give FPS, FP (nothing SKIPPED) or FS (nothing PIPELINED)")
        if self.tolerance is not None and self.speedup is not None:
            self._refuse("speedup", "give it or --hybrid_tolerance, not both")
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            self._refuse("tolerance", f"give a positive number, such as {TOLERANCE}")
        most = 5 * self.stages
        if self.speedup is not None and not 1 <= self.speedup < most:
            self._refuse("speedup", f"give a number from 2 (every step FULL) to less than {most}, such as 2.5")
        if self.tolerance is None and self.speedup is None:
            object.__setattr__(self, "tolerance", TOLERANCE)

    @property
    def is_exact(self) -> bool:
        """Whether every step is FULL and nothing old is read, so that no rule is needed."""
        return self.policy == "cfg" and self.stages == 2

    @property
    def has_stages(self) -> bool:
        """Whether layers are split: steps may be PIPELINED, or FULL steps have more than two stages."""
        kinds = {"paper": "P", "adaptive": self.kinds or "", "fixed": self.plan or ""}.get(str(self.policy), "")
        is_pattern = "/" in kinds
        return self.stages > 2 or "P" in kinds or (is_pattern and not kinds.endswith("S"))

    def agreed(self) -> "HybridConfig":
        """What must be the same on every rank: all but where a report goes."""
        return replace(self, report=None)

    def paper_constants(self) -> dict[str, Any]:
        """The published rule's constants that the user set; None keeps the preset."""
        return {name: getattr(self, name) for name in _PAPER_ONLY}

    def _one_of(self, field: str, names: dict[str, Any]) -> None:
        if getattr(self, field) not in names:
            self._refuse(field, f"choose one of {', '.join(names)}")

    def _refuse(self, field: str, mend: str) -> None:
        raise ValueError(f"{field}={getattr(self, field)!r} (--hybrid_{field}): {mend}.")
