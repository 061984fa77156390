"""The policy of a plan that is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .discrepancy import Bend
from .plan import PIPELINED, Plan, StepKind
from .sampler import Sampler
from .settings import Refuse, Settings, option


@dataclass(frozen=True, kw_only=True)
class FixedSettings(Settings):
    """What may be set of `FixedPolicy`."""

    plan: str | None = option(
        "Kind of each step: one letter F, P or S a step, or START-END/GAP. For example, 8-48/2S makes every second "
        "step from 8 to 48 FULL and the others there SKIPPED; 8-48/2 makes the others PIPELINED.",
        metavar="PLAN",
    )

    @classmethod
    def check(cls, given: Any, refuse: Refuse) -> dict[str, Any]:
        if given.plan is None:
            refuse("plan", "--hybrid_policy fixed needs a plan, such as --hybrid_plan 8-48/2")
        # The run's length is not known yet: read a pattern against the shortest run that it fits.
        end = given.plan.partition("-")[2].partition("/")[0]
        Plan.parse(given.plan, int(end) if end.isdigit() else None)
        return {}


class FixedPolicy:
    """The plan that the user gave, whatever is measured."""

    reads_bends = False
    lag = 0
    error: float | None = None
    sampler: Sampler | None = None
    tau_1: int | None = None
    tau_2: int | None = None

    def __init__(self, plan: Sequence[StepKind]) -> None:
        self.plan = plan
        self.may_pipeline = PIPELINED in plan

    def reads_discrepancy(self, step: int) -> bool:
        return False

    def observe(self, step: int, discrepancy: float, bend: Bend | None = None) -> None:
        pass

    def kind(self, step: int, guidance: float = 1.0) -> StepKind:
        return self.plan[step]
