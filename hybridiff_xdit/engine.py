"""One run: which kind each step is, what is estimated where nothing is evaluated, and what was measured.

It works on streams: nests that a denoiser returned, in the order in which the pipeline asks for them. Who evaluates
them is `evaluate`'s affair, how a pipeline asks for them is `seam`'s.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from .config import HybridConfig
from .estimates.base import Rule
from .estimates.rules import RULES
from .estimates.weights import EXACT, UNEXPLAINED, Guidance, Weights, dots, plain, solve
from .evaluate.calls import Structure
from .schedule.discrepancy import Bend, rel_mae
from .schedule.plan import FULL, PIPELINED, SKIPPED, Plan, Policy, StepKind
from .schedule.sampler import Sampler

Tensors = list[torch.Tensor]


class _Unread(NamedTuple):
    """Numbers on their way to the host."""

    step: int
    values: torch.Tensor  # on the host
    arrival: torch.cuda.Event | None  # when they are there


class Engine:
    """The estimates and the measurements of one run.

    The estimators begin with a FULL step, and anew with each `restart`. Which stream is cond, and how the pipeline
    weighs the streams, is known when that step is over (`end_step`).

    Args:
        config: the strategy.
        policy: which kind each step is.
        sampler: how the scheduler weighs predictions; None where nothing needs it.
    """

    def __init__(self, config: HybridConfig, policy: Policy, sampler: Sampler | None) -> None:
        self.config, self.policy, self.sampler = config, policy, sampler
        self.kinds: list[StepKind] = []
        self._kind = FULL
        self._asked, self._done = 0, 0.0  # evaluations so far of one GPU, and of the busiest rank
        self.discrepancy: list[tuple[int, float]] = []
        self.bends: list[tuple[int, Bend]] = []
        self._structures: list[Structure] = []
        self._rules: list[Rule] | None = None  # one a tensor of a prediction
        self._guidance: list[Guidance] = []
        self._begun: list[Any] | None = None  # streams of the FULL step with which the estimators begin
        self._handed: list[Any] = []  # streams of the present step, as the pipeline got them
        self._scheduled: int | None = None  # number of the tensor that the run's scheduler gets
        self._measured: list[_Unread] = []
        self._weighed: list[_Unread] = []

    @property
    def step(self) -> int:
        """Number of the present step."""
        return len(self.kinds)

    @property
    def is_known(self) -> bool:
        """Whether there is something to estimate from."""
        return self._rules is not None

    @property
    def cond(self) -> int | None:
        """Number of the stream that is cond; None where it is not known yet."""
        return self._guidance[0].cond if self._guidance else None

    def kind(self, step: int | None = None) -> StepKind:
        """Kind of the present step, or of a later one up to the next FULL step, as the policy has it."""
        if self._measured and self.policy.reads_discrepancy(self._measured[-1].step):
            self.read(keep=self.policy.lag)
        most = max((guidance.most for guidance in self._guidance), default=1.0)
        return self.policy.kind(self.step if step is None else step, most)

    def cost(self, kind: StepKind, streams: int, load: int) -> None:
        """Note the kind of the present step, and what it costs.

        Args:
            streams: evaluations on one GPU.
            load: of the busiest rank, where it is FULL.
        """
        self._kind = kind
        self._asked += streams
        self._done += {FULL: load, PIPELINED: load / 2, SKIPPED: 0}[kind]

    def restart(self) -> None:
        """Forget what the estimates are made from: the streams are no longer the same."""
        self._rules, self._begun = None, None

    def full(self, streams: list[Any], structures: list[Structure], handed: list[Any] | None = None) -> list[Any]:
        """What to hand the pipeline on a FULL step.

        Args:
            streams: their true predictions.
            structures: of each.
            handed: what the pipeline got, where the estimators begin with a step that had a debt to pay.
        """
        self._structures = structures
        if self._rules is None:
            self._begun, self._handed = streams, handed or streams
            return self._handed
        self._handed = self._nests(self._take(streams))
        return self._handed

    def skipped(self) -> list[Any]:
        """What to hand the pipeline where nothing is evaluated."""
        assert self._rules is not None
        self._handed = self._nests([rule.skipped(self.step) for rule in self._rules])
        return self._handed

    def pipelined(self, pred: Tensors) -> list[Any]:
        """What to hand the pipeline where cond alone, or the published mixture, is evaluated: its tensors, [B, ...]."""
        assert self._rules is not None
        self._handed = self._nests(
            [rule.pipelined(self.step, one) for rule, one in zip(self._rules, pred, strict=True)]
        )
        return self._handed

    def end_step(self, output: torch.Tensor, sample: torch.Tensor, is_estimable: bool, first_cond: int) -> None:
        """Take what the pipeline has made of the streams, and handed to its scheduler.

        Args:
            output: the scheduler's input.
            sample: the scheduler's sample.
            is_estimable: whether the streams are what estimates can be made of.
            first_cond: the stream to take for cond where the weights do not tell.
        """
        step = self.step
        products = self._dots(output, sample) if is_estimable and self._needs_weights() else None
        self.kinds.append(self._kind)
        if self._begun is not None and is_estimable:
            self._begin(step, products, first_cond)
        elif self._begun is not None:
            self._begun = None
        elif products is not None:
            self._weighed.append(_Unread(step, *to_host(products.flatten())))
        self._handed = []

    def read(self, keep: int = 0) -> None:
        """Bring measurements to the host, but for those of the last ``keep`` FULL steps.

        Every rank reads the same values at the same step, so all raise or none, and all take the same decision.

        Raises:
            ValueError: predictions are not finite.
        """
        while len(self._measured) > keep:
            step, values, arrival = self._measured.pop(0)
            discrepancy, *measured = from_host(values, arrival)
            bend = Bend(*measured) if measured else None
            if len(self._structures) > 1:
                self.discrepancy.append((step, discrepancy))
            if bend is not None:
                self.bends.append((step, bend))
            if self.policy.reads_discrepancy(step):
                self.policy.observe(step, discrepancy, bend)

    def read_all(self) -> None:
        """Bring to the host all that was measured on the steps so far, as `read` and `read_weights` do."""
        self.read()
        self.read_weights()

    def read_weights(self) -> None:
        """Bring the weights of all steps so far to the host. A GPU must have work to do meanwhile."""
        for step, values, arrival in self._weighed:
            self._learn(step, solve(_square(from_host(values, arrival))))
        self._weighed.clear()

    def report(self) -> dict[str, Any]:
        """The entries of a report that are the engine's to tell; see `seam.hooks.last_report`."""
        plan = Plan(self.kinds)
        stages = self.config.stages
        bound = 1.0  # of a run without a step
        if plan:
            bound = self._asked / self._done if stages == 2 else plan.speedup_bound(stages)
        return {
            "plan": str(plan),
            "discrepancy": [[step, _finite(value)] for step, value in self.discrepancy],
            "bends": [[step, *map(_finite, bend)] for step, bend in self.bends],
            "tau_1": self.policy.tau_1,
            "tau_2": self.policy.tau_2,
            "speedup_bound": bound,
            "estimated_error": self.policy.error,
        }

    # The estimators.

    def _needs_weights(self) -> bool:
        # Where every step is FULL, the first one's tell which stream is cond, and that is all.
        return self._begun is not None or (self._rules is not None and not self.config.is_exact)

    def _begin(self, step: int, products: torch.Tensor | None, first_cond: int) -> None:
        """Begin the estimators with the streams of FULL step ``step``, which is over, where that can be."""
        streams, self._begun = self._begun, None
        assert streams is not None
        is_whole = not any(any(structure.before) for structure in self._structures)
        most = UNEXPLAINED if is_whole else EXACT
        weights = None if products is None else solve(_square(products.flatten().tolist()), most)
        if weights is None and not is_whole:
            return  # it is not these tokens that the pipeline weighs
        default = plain(len(streams), weights.cond if weights else first_cond)
        tensors = self._columns(streams)
        self._guidance = [Guidance(default) for _ in tensors]
        self._learn(step, weights)
        rule: type[Rule] = Rule if self.config.is_exact else RULES[str(self.config.guidance)]
        self._rules = [rule(self.sampler, guidance) for guidance in self._guidance]
        self._take(streams, step)

    def _learn(self, step: int, weights: Weights | None) -> None:
        if self._scheduled is not None:
            self._guidance[self._scheduled].learn(step, weights)

    def _take(self, streams: list[Any], step: int | None = None) -> list[Tensors]:
        """Measure a FULL step's true predictions and give them to the rules; what these hand on, by tensor."""
        assert self._rules is not None
        step = self.step if step is None else step
        columns = self._columns(streams)
        values = [self._spread(columns)]
        if self.policy.reads_bends:
            bends = [rule.bend(step, column) for rule, column in zip(self._rules, columns, strict=True)]
            found = [bend for bend in bends if bend is not None]
            values += [torch.stack(parts).max() for parts in zip(*found, strict=True)]  # of the tensor that bends most
        self._measured.append(_Unread(step, *to_host(torch.stack(values))))
        return [rule.full(step, column) for rule, column in zip(self._rules, columns, strict=True)]

    def _spread(self, columns: list[Tensors]) -> torch.Tensor:
        """The discrepancy of the first tensor; 0 with one stream, and nan where that is not finite."""
        cond, column = self._guidance[0].cond, columns[0]
        others = [stream for k, stream in enumerate(column) if k != cond]
        return rel_mae(others[0], column[cond]) if others else column[0].float().abs().mean() * 0

    def _columns(self, streams: list[Any]) -> list[Tensors]:
        """The streams' tensors, by place in a prediction."""
        rows = [structure.tensors(stream) for structure, stream in zip(self._structures, streams, strict=True)]
        return [list(column) for column in zip(*rows, strict=True)]

    def _nests(self, columns: list[Tensors]) -> list[Any]:
        rows = zip(*columns, strict=True)
        return [structure.fill(row) for structure, row in zip(self._structures, rows, strict=True)]

    def _dots(self, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor | None:
        for place, column in enumerate(self._columns(self._handed)):
            products = dots(output, sample, column)
            if products is not None:
                self._scheduled = place
                return products
        return None


def to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Start to bring values to the host: they, and the event that tells when they are there."""
    host = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return host, None
    with torch.cuda.device(values.device):
        arrival = torch.cuda.Event()
        arrival.record()
    return host, arrival


def from_host(values: torch.Tensor, arrival: torch.cuda.Event | None) -> list[Any]:
    """Wait for values. Waiting for their copy alone leaves running what is queued behind it."""
    if arrival is not None:
        arrival.synchronize()
    return values.tolist()


def _finite(value: float) -> float | None:
    """For JSON, which has no nan and no infinity."""
    return value if math.isfinite(value) else None


def _square(values: list[float]) -> np.ndarray:
    size = math.isqrt(len(values))
    return np.array(values).reshape(size, size)
