"""The policy of a plan that is given."""

from collections.abc import Sequence

from .discrepancy import Trial
from .plan import PIPELINED, StepKind
from .sampler import Sampler


class FixedPolicy:
    """The plan that the user gave, whatever is measured."""

    reads_trials = False
    lag = 0
    sampler: Sampler | None = None
    tau_1: int | None = None
    tau_2: int | None = None

    def __init__(self, plan: Sequence[StepKind]) -> None:
        self.plan = plan
        self.may_pipeline = PIPELINED in plan

    def reads_discrepancy(self, step: int) -> bool:
        return False

    def observe(self, step: int, discrepancy: float, trials: Sequence[Trial] = ()) -> None:
        pass

    def kind(self, step: int, guidance: float = 1.0) -> StepKind:
        return self.plan[step]
