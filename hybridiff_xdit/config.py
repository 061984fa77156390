"""What a user chooses, in one object."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import NoReturn

from .estimates.rules import RULES
from .schedule.adaptive import TOLERANCE, AdaptiveSettings
from .schedule.fixed import FixedSettings
from .schedule.paper import PaperSettings
from .schedule.policies import POLICIES
from .schedule.settings import option

__all__ = ["TOLERANCE", "HybridConfig"]


@dataclass(frozen=True, kw_only=True)
class HybridConfig(FixedSettings, PaperSettings, AdaptiveSettings):
    """How to run ``hybrid-cond``. Each field is also the flag ``--hybrid_<field>``, whose help says what it means.

    A field of a policy's settings (`AdaptiveSettings`, `PaperSettings`, `FixedSettings`) is for that policy alone.

    Attributes:
        policy: name of the policy. Default: ``fixed`` if a plan is given, else ``adaptive``.
        guidance: name of the rule (`estimates.rules`). Default: ``mixed`` with ``paper``, else ``deferred``.
        stages: stages of a PIPELINED step, an even number, and with it the ranks of a picture (or groups of ranks that
            split its tokens): half of them evaluate a branch on FULL steps.
        balance: what makes the stages' shares alike. ``time`` is measured by CUDA graph on a GPU on the first run of a
            size; elsewhere, where a branch's tokens are split, and without CUDA graphs it is ``flops``. ``flops`` gives
            the same stages, and so the same pictures, on any device. Default: ``time``.
        cuda_graphs: whether a GPU's kernels are launched by CUDA graphs (`graphs`). Default: yes.
        report: folder for ``report.json`` and ``report.png``, made if missing; rank 0 writes.

    Raises:
        ValueError: a field is unknown, out of range, or has no effect under the policy; the message names the
            flag and the mend.
    """

    policy: str | None = option(
        "How the kinds of steps are chosen. "
        + " ".join(f"{name}: {policy.summary}." for name, policy in POLICIES.items())
        + " Default: adaptive, or fixed with --hybrid_plan.",
        choices=list(POLICIES),
    )
    guidance: str | None = option(
        "What stands for predictions that are not evaluated. "
        + " ".join(f"{name}: {rule.summary}." for name, rule in RULES.items())
        + " Default: mixed with paper, else deferred. Policy adaptive needs deferred.",
        choices=list(RULES),
    )
    stages: int = option(
        "Number of stages into which a PIPELINED step splits the layers, even (default: 2). Each has a process or a "
        "sequence group of its own. With more than two, FULL steps are split and approximate too.",
        default=2,
        type=int,
        metavar="N",
    )
    balance: str | None = option(
        "What is balanced between the stages: their time, measured on the first run, or their FLOPs (default: time).",
        choices=["time", "flops"],
    )
    cuda_graphs: bool | None = option(
        "Launch kernels by CUDA graphs where the model allows it (default: on).", is_switch=True
    )
    report: str | os.PathLike[str] | None = option(
        "Folder for report.json and report.png, which show what the run did.", metavar="DIR"
    )

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
        for name, other in POLICIES.items():
            for setting in fields(other.settings) if name != policy else ():
                if getattr(self, setting.name) is not None:
                    self._refuse(
                        setting.name, f"it has no effect with --hybrid_policy {policy}: drop it, or use {name}"
                    )
        chosen, rule = POLICIES[policy], RULES[str(self.guidance)]
        if chosen.needs_bends and not rule.tells_bend:
            self._refuse("guidance", f"it does not tell how predictions bend, by which {policy} decides: use deferred")
        for name, value in chosen.settings.check(self, self._refuse).items():
            object.__setattr__(self, name, value)
        if self.plan is not None and not rule.estimates and ("S" in self.plan):
            self._refuse("guidance", "it cannot do without an evaluation (S in the plan): use deferred or reuse")

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

    def _one_of(self, field: str, names: Iterable[str]) -> None:
        if getattr(self, field) not in names:
            self._refuse(field, f"choose one of {', '.join(names)}")

    def _refuse(self, field: str, mend: str) -> NoReturn:
        raise ValueError(f"{field}={getattr(self, field)!r} (--hybrid_{field}): {mend}.")


def retargeted(config: HybridConfig, tolerance: float | None, speedup: float | None) -> HybridConfig:
    """A configuration with another tolerance or another target; the same one where neither is given.

    Raises:
        ValueError: they are out of range, or have no effect under the policy; the message names the field and the mend.
    """
    if tolerance is None and speedup is None:
        return config
    return replace(config, tolerance=tolerance, speedup=speedup)
