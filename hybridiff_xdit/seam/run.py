"""A run: one pass of the pipeline that is running through its scheduler's timesteps.

A *step* is everything between two calls of the scheduler's `step`. How many there are, and where they begin, is the
scheduler's to say. The first step of a run, and each one whose calls are not as foretold, is evaluated call by call,
and its calls are learnt.

Every FULL step has one exchange, at its first call. Its header holds a checksum of the latents, so that ranks which
have drifted apart are found, and whether a rank has left the run. A rank that leaves it (by an error of its own, or an
interruption) takes part in one more exchange to say so; then all ranks end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..config import HybridConfig
from ..engine import Engine, from_host, to_host
from ..estimates.rules import RULES
from ..evaluate.calls import Call, Inputs, Structure, count_parts, join, part, split
from ..evaluate.stages.executor import Branch, Executor
from ..evaluate.streams import LEFT, RUNNING, Asked, Streams, deal
from ..ranks.comm import checksum
from ..schedule.plan import FULL, PIPELINED, SKIPPED, StepKind
from ..schedule.policies import make_policy
from ..schedule.sampler import Sampler, read_sampler
from .coupling import Coupling, attention_of, coupling_of, moving_weights, state_of
from .pattern import Pattern, Slot, Template, compare
from .pending import Promise

FAILED = LEFT + 1  #: A rank's status where the evaluation of a step that is being learnt has raised an error.

#: Relative difference between a batch evaluated whole and in parts, above which its samples see one another.
COUPLED = {torch.float32: 1e-3, torch.float64: 1e-6}
COUPLED_HALF = 0.05


#: Patterns that are kept for later runs: of a few sizes.
_MOST_PATTERNS = 7


class RunOver(RuntimeError):
    """The ranks drifted apart, or one of them left the run. Every rank raises it at the same place."""


class _Late(NamedTuple):
    """Flags of a FULL step, on their way to the host: drifted, another argument than foretold, each rank's status."""

    step: int
    values: torch.Tensor
    arrival: torch.cuda.Event | None


@dataclass
class Setting:
    """What the runs of a pipeline share.

    Attributes:
        config: the strategy.
        streams: evaluates and exchanges whole streams.
        executor: evaluates stages; None where no step is PIPELINED.
        warn: logs a warning, each text once.
        earlier: patterns of several calls, as finished runs had them; the same on all ranks.
        may_guidance_change: whether the pipeline was called with a callback, which may change w on any step.
    """

    config: HybridConfig
    streams: Streams
    executor: Executor | None
    warn: Callable[[str], None]
    earlier: list[Pattern] = field(default_factory=list)
    may_guidance_change: bool = False


class Run:
    """See the module.

    Args:
        setting: shared with other runs.
        scheduler: whose timesteps they are; they are set, and it has not stepped.
        hint: number of steps, where the pipeline tells it. It may leave out the last timesteps (``denoising_end``).

    Raises:
        ValueError: the configuration does not fit the run or its scheduler.
    """

    def __init__(self, setting: Setting, scheduler: Any, hint: int | None) -> None:
        self.setting, self.scheduler, self._hint = setting, scheduler, hint
        timesteps = scheduler.timesteps
        self._timesteps = timesteps  # kept, so that their addresses stay theirs
        self._host_timesteps = dict(zip((t.data_ptr() for t in timesteps), timesteps.cpu(), strict=True))
        self.is_over = self.is_finished = False
        self.pattern: Pattern | None = None
        self._learnt: list[Pattern] = []  # all that the run has had
        self._promised: Pattern | None = None  # what a step that is learnt is expected to ask for
        self._promises: list[Promise | None] = []  # of its calls; None where this rank evaluates
        self.calls: list[Call] = []  # of the present step
        self._outputs: list[list[Any]] = []  # of each call, by stream: what the pipeline got
        self._true: list[list[Any]] = []  # likewise: what was evaluated, where something else was handed on
        self._states: list[Any] = []  # of the denoiser at each call of a step that is learnt
        self._attention: list[tuple[Any, Any]] = []  # modules with their processors, when its calls were learnt
        self._may_deal: list[bool] = []  # whether the streams of each such call may be evaluated apart
        self._kind_now = FULL
        self._is_changed = self._is_unforetold = self._has_exchanged = False
        self._foretold: list[Asked] = []
        self._branches: dict[Branch, Inputs] = {}  # of the last step with stages, or of the run's first
        self._executor: Executor | None = None
        self._pending: list[torch.Tensor] = []  # whether arguments differ from what was foretold, 0-d
        self._late: list[_Late] = []
        self._device: torch.device | None = None
        begin = getattr(scheduler, "begin_index", None)
        # Image-to-image begins within the list. Where the scheduler is not told, its first step tells.
        start = begin if begin is not None else len(timesteps) - (hint or len(timesteps))
        self._plan(start, {}, gain=2 / (2 if setting.streams.ranks == 1 else 1))

    # What the run is.

    def _plan(self, start: int, extra: dict[str, Any], gain: float) -> None:
        """Read the scheduler from its ``start``-th timestep on, and make the policy for it.

        Args:
            extra: further arguments of the scheduler's step.
            gain: evaluations of a FULL step on one GPU, over those of the busiest rank.
        """
        config = self.setting.config
        self._start, self._extra, self._gain = start, extra, gain
        left = len(self.scheduler.timesteps) - start
        self.num_steps = min(self._hint, left) if self._hint else left
        sampler: Sampler | None = None
        if config.policy == "adaptive" or (not config.is_exact and RULES[str(config.guidance)].needs_sampler):
            sampler = read_sampler(self.scheduler, start, self.num_steps, **extra)
        family = self.setting.executor.anatomy.family if self.setting.executor else "mmdit"
        policy = make_policy(config, self.num_steps, family, sampler, gain)
        self.engine = Engine(config, policy, sampler)

    @property
    def step(self) -> int:
        """Number of the present step."""
        return self.engine.step

    def time(self, step: int) -> float:
        """Time of a step, in which boundaries are extrapolated."""
        sampler = self.engine.sampler
        return float(step) if sampler is None else sampler.times[step]

    def on_host(self, value: Any) -> Any:
        """A timestep of the run in host memory, anything else as it is.

        Schedulers look up tables in host memory by the timestep: from the GPU's, each would wait for the step before.
        """
        is_scalar = isinstance(value, torch.Tensor) and value.is_cuda and not value.ndim
        return self._host_timesteps.get(value.data_ptr(), value) if is_scalar else value

    # A denoiser's call.

    def answer(self, call: Call) -> Any:
        """What a call of a denoiser returns.

        Raises:
            RunOver: the ranks drifted apart, or one has left.
        """
        self.calls.append(call)
        self._device = call.tensors[0].device
        if self.step >= self.num_steps:  # more than the scheduler has timesteps for
            return call.evaluate(**call.inputs)
        if len(self.calls) > 1:
            with torch.profiler.record_function(f"step {self.step} {self._kind_now.name}, call {len(self.calls)}"):
                return self._answer_later(call, len(self.calls) - 1)
        if self.pattern is not None and (self.pattern.slots[0].kind != call.kind or self._has_other_attention()):
            self._forget()
        kind = FULL if self.pattern is None else self._kind(self.pattern)
        with torch.profiler.record_function(f"step {self.step} {kind.name}"):
            return self._learn(call) if self.pattern is None else self._answer_first(call, self.pattern, kind)

    def _answer_first(self, call: Call, pattern: Pattern, kind: StepKind) -> Any:
        self._begin_step(kind)
        if kind is SKIPPED:
            self._hand(pattern, self.engine.skipped())
        elif kind is PIPELINED:
            self._hand(pattern, self._pipelined(call, pattern))
        elif pattern.is_foretold:
            true = self._full(call, pattern)
            self._hand(pattern, self.engine.full(true, pattern.structures), true)
        else:
            self._exchange_headers(call, RUNNING)
            return self._evaluate_whole(call, pattern.slots[0].count)
        return self._joined(0, call)

    def _answer_later(self, call: Call, index: int) -> Any:
        pattern = self.pattern
        if self._promised is not None:
            slots = self._promised.slots
            if index < len(slots) and slots[index].kind == call.kind:
                return self._promise(index, call, self._promised)
            self._keep_promises()
        if pattern is None:
            return self._evaluate_whole(call, count_parts(call))
        slot = pattern.slots[index] if index < len(pattern.slots) else None
        if slot is not None and not self._is_changed and slot.kind == call.kind:
            if self._kind_now is not FULL:
                return self._joined(index, call)
            if not pattern.is_foretold:
                return self._evaluate_whole(call, slot.count)
            foretold = self._foretold[index].call
            if compare(foretold, call, self._pending, waits=not pattern.is_verified):
                return self._joined(index, call)
            # Once it was as foretold, it may well be again; else it is the pipeline's way.
            self._is_unforetold = not pattern.is_verified
        # Another call than foretold: it is evaluated as it came, on every rank, and the step is learnt anew.
        self._is_changed = True
        del self._outputs[index:], self._true[index:], self._states[index:], self._may_deal[index:]
        return self._evaluate_whole(call, count_parts(call))

    def _kind(self, pattern: Pattern) -> StepKind:
        """The kind of the present step: the policy's, but FULL where there is nothing to estimate from."""
        with self._together():
            if self.setting.may_guidance_change:  # the host waits, but a group must not outlast its guidance
                self.engine.read_weights()
            kind = self.engine.kind()
        if self._fits(kind, pattern):
            return kind
        if self._is_estimable(pattern):
            self.setting.warn(
                f"hybrid-cond: this pipeline asks for {pattern.count} stream(s) in {len(pattern.slots)} call(s) a "
                "step, and a PIPELINED step needs uncond and cond, in this order, in one: such steps are FULL. Use "
                "--hybrid_kinds FS."
            )
        return FULL

    def _fits(self, kind: StepKind, pattern: Pattern) -> bool:
        """Whether a step of these streams can be of a kind."""
        is_pair = len(pattern.slots) == 1 and pattern.count == 2 and self.engine.cond == 1
        return kind is FULL or (self._is_estimable(pattern) and (kind is SKIPPED or is_pair))

    def _is_estimable(self, pattern: Pattern) -> bool:
        """Whether there is something to estimate the streams from."""
        return self.engine.is_known and pattern.is_foretold and pattern.is_estimable

    def _begin_step(self, kind: StepKind) -> None:
        self._kind_now = kind
        self._is_changed = self._has_exchanged = False
        self._outputs = []
        self._true = []
        self._states = []
        self._may_deal = []

    def _hand(self, pattern: Pattern, streams: list[Any], true: Sequence[Any] = ()) -> None:
        """Keep what the calls of this step are answered with, and on a FULL step what was evaluated."""
        given, evaluated = iter(streams), iter(true or streams)
        self._outputs = [[next(given) for _ in range(slot.count)] for slot in pattern.slots]
        self._true = [[next(evaluated) for _ in range(slot.count)] for slot in pattern.slots]
        self._may_deal = [slot.may_deal for slot in pattern.slots]
        self._states = [None] * len(pattern.slots)

    def _joined(self, index: int, call: Call) -> Any:
        parts = self._outputs[index]
        return parts[0] if len(parts) == 1 else join(parts, call.is_listed)

    def _evaluate_whole(self, call: Call, count: int) -> Any:
        """Evaluate a call on every rank as it came; what it returns."""
        state = state_of(call.denoiser)
        ((output,),) = self.setting.streams.evaluate([Asked(call)])
        self._note(call, split(output, count, call.is_listed), state, coupling_of(call.denoiser) is Coupling.NONE)
        return output

    def _note(self, call: Call, streams: list[Any], state: Any, may_deal: bool) -> None:
        """Keep what a call was answered with, for the step to be learnt."""
        self._outputs.append(streams)
        self._states.append(state)
        self._may_deal.append(may_deal)

    # A FULL step as foretold.

    def _full(self, call: Call, pattern: Pattern) -> list[Any]:
        """Evaluate a FULL step whose calls are foretold; by stream."""
        streams, executor = self.setting.streams, self._executor
        self._foretold = pattern.foretell(call)
        if executor is not None and executor.stages > 2:
            outputs = self._staged(call)
        else:
            structures = [slot.structures for slot in pattern.slots]
            if executor is not None:
                executor.now = self.time(self.step)
            evaluated = streams.evaluate(self._foretold, executor)
            # The GPU has the evaluation to do while the host waits for what came before it.
            self._read()
            with self._together():
                header = self._header(call, RUNNING)
                if not pattern.has_exchanged and streams.comm.size > 1:
                    # Ranks that could not know the size of this exchange have to be told from those that do.
                    self._check_headers(streams.announce(header))
                given, headers = streams.exchange(evaluated, self._foretold, structures, header)
            pattern.has_exchanged = True
            self._has_exchanged = True
            self._send_flags(headers)
            outputs = [output for parts in given for output in parts]
        return outputs

    def _pipelined(self, call: Call, pattern: Pattern) -> list[Any]:
        """What to hand the pipeline on a PIPELINED step."""
        executor, engine = self._executor, self.engine
        assert executor is not None
        rule = RULES[str(self.setting.config.guidance)]
        step = self.step
        with self._together():
            self._read_flags()  # a rank that has left takes no part in this step
            hand_over = step + 1 < self.num_steps and engine.policy.kind(step + 1) is PIPELINED
            self._branches = _branches(call)
            pred = executor.pipelined(
                self._branches,
                rule.stage0_branch,
                self.time(step),
                hand_over=hand_over,
                extrapolate=rule.extrapolates_boundary,
            )
        return engine.pipelined(pred)

    def _staged(self, call: Call) -> list[Any]:
        """Both branches' predictions through the ranks' stages."""
        executor = self._executor
        assert executor is not None
        rule = RULES[str(self.setting.config.guidance)]
        self._branches = _branches(call)
        self._read()
        with self._together():
            exchange = executor.full(
                self._branches, call.latents, self.time(self.step), extrapolate=rule.extrapolates_boundary
            )
        self._has_exchanged = True
        self._send_flags(None, exchange.drifted)
        structure = executor.structure(call)
        return [structure.fill([pred]) for pred in (exchange.pred_u, exchange.pred_c)]

    # A step that is learnt.

    def _learn(self, call: Call) -> Any:
        """Evaluate the first call of a step of which nothing is known; what it returns."""
        with self._together():
            self.engine.kind()  # a policy is asked on every step
        self._begin_step(FULL)
        self._attention = attention_of(call.denoiser)
        streams = self.setting.streams
        earlier = next((pattern for pattern in self.setting.earlier if pattern.slots[0].kind == call.kind), None)
        if earlier is not None and streams.comm.size > 1:
            self._exchange_headers(call, RUNNING)
            self._promised, self._promises = earlier, []
            return self._promise(0, call, earlier)
        count, state = count_parts(call), state_of(call.denoiser)
        is_shared = streams.is_apart or streams.comm.size > 1
        coupling = coupling_of(call.denoiser) if count > 1 and is_shared else Coupling.NONE
        if coupling is Coupling.COUPLED:
            self._warn_whole("its attention processors (perturbed-attention guidance) cut the batch themselves")
        self._executor = self._prepare(call, count)
        if self._executor is not None and self._executor.stages > 2:
            self._note(call, self._staged(call), state, True)
            return self._joined(0, call)
        owners = deal([1.0] * count, streams.ranks) if count > 1 and coupling is not Coupling.COUPLED else None
        asked = [Asked(call, count, owners)]
        error: Exception | None = None
        try:
            evaluated = streams.evaluate(asked, self._executor)
        except Exception as raised:
            error = raised
        with self._together():
            statuses = self._exchange_headers(call, RUNNING if error is None else FAILED)
            if error is not None and (owners is None or set(statuses) != {FAILED}):
                raise error
        if error is not None:
            self._warn_whole(f"its parts cannot be evaluated apart ({type(error).__name__}: {error})")
            owners = None
            evaluated = streams.evaluate([Asked(call, count)])
        if owners is None:
            found = evaluated[0]
        else:
            own = next((output for output in evaluated[0] if output is not None), None)
            if own is None:  # there are more ranks than streams, and this one has to know what streams look like
                own = streams.evaluate([Asked(part(call, 0, count))])[0][0]
            structure = Structure(own, call.is_listed)
            with self._together():
                header = self._header(call, RUNNING)
                (found,), _ = streams.exchange(evaluated, asked, [[structure] * count], header)
        if coupling is Coupling.UNKNOWN and owners is not None:
            (whole,) = streams.evaluate([Asked(call, count)])
            if _differ(whole, found, structure):
                self._warn_whole("an attention processor lets the samples of its batch see one another")
                owners, found = None, whole
        self._note(call, found, state, owners is not None or count == 1)
        return self._joined(0, call)

    def _promise(self, index: int, call: Call, expected: Pattern) -> Any:
        """Evaluate a call of such a step if it is this rank's; else return what is filled in after the last one."""
        streams, slot = self.setting.streams, expected.slots[index]
        assert slot.owners is not None and self._device is not None
        state, promise = state_of(call.denoiser), None
        if slot.owners[0] == streams.comm.rank:
            output = streams.evaluate([Asked(call)])[0][0]
        else:
            promise = Promise(slot.structures[0], self._device, lambda: streams.evaluate([Asked(call)])[0][0])
            output = promise.output()
        self._note(call, [output], state, True)
        self._promises.append(promise)
        if index + 1 < len(expected.slots):
            return output
        asked = [Asked(call, 1, slot.owners) for call, slot in zip(self.calls, expected.slots, strict=True)]
        mine = [[None] if promise else outputs for outputs, promise in zip(self._outputs, self._promises, strict=True)]
        with self._together():
            structures = [slot.structures for slot in expected.slots]
            self._outputs, headers = streams.exchange(mine, asked, structures, self._header(call, RUNNING))
        self._promised = None
        self._send_flags(headers)
        for promise, outputs in zip(self._promises, self._outputs, strict=True):
            if promise is not None:
                promise.keep(outputs[0])
        return self._outputs[index][0]

    def _keep_promises(self) -> None:
        """The step asks for something else than was expected: what was promised is evaluated on this rank too."""
        self._promised = None
        for promise, outputs in zip(self._promises, self._outputs, strict=True):
            if promise is not None:
                outputs[0] = promise.keep()

    def _prepare(self, call: Call, count: int) -> Executor | None:
        """The executor, where steps of the run may be PIPELINED or FULL ones have stages."""
        executor = self.setting.executor
        may_pipeline = self.engine.policy.may_pipeline
        if executor is None or count != 2 or call.is_listed or not (may_pipeline or executor.stages > 2):
            return None
        if moves := moving_weights(call.denoiser):
            with self._together():
                raise ValueError(
                    f"hybrid-cond cannot split the layers of a {type(call.denoiser).__name__} whose weights are moved "
                    f"or cast when a module is called ({', '.join(moves)}): use --hybrid_kinds FS, or take that off."
                )
        config = self.setting.config
        is_timed = config.balance != "flops" and config.cuda_graphs is not False and self.setting.streams.across is None
        self._branches = _branches(call)
        with self._together():
            executor.begin(self._branches["cond"], is_timed)
        executor.now = self.time(self.step)
        return executor

    def _pattern(self, batch: int) -> Pattern:
        """What the present step, which is over, tells of the next."""
        calls, streams = self.calls, self.setting.streams
        templates = [None, *(Template(calls[0], call) for call in calls[1:])]
        is_foretold = all(template is None or template.is_foretold for template in templates)
        by_denoiser: dict[int, Any] = {}
        for call, state in zip(calls, self._states, strict=False):
            if state is not None:  # it was evaluated as it came
                is_foretold &= by_denoiser.setdefault(id(call.denoiser), state) == state
        if not is_foretold:
            self._warn_whole("what a later call does is decided after the first one (a cache, or skipped layers)")
        elif self._is_unforetold:
            self._warn_whole("what a later call of a step is given is not known when the first one is made")
            is_foretold = False
        is_estimable, structures = True, []
        for i, call in enumerate(calls):
            count = len(self._outputs[i])
            if count * batch != call.batch:  # parts that only looked alike, or more of them than are alike
                output = self._joined(i, call)
                count = call.batch // batch if call.batch % batch == 0 else 1
                count = count if count == count_parts(call) else 1
                is_estimable &= count * batch == call.batch
                self._outputs[i] = split(output, count, call.is_listed)
            structures.append([Structure(stream, call.is_listed) for stream in self._outputs[i]])
        if not is_estimable:
            self._warn_whole("its batch is not made of parts that share the latents")
        may_deal = [ok and is_foretold and is_estimable for ok in self._may_deal[: len(calls)]]
        costs = [
            sum(tensor.numel() for tensor in call.tensors) / len(found)
            for call, found, ok in zip(calls, structures, may_deal, strict=True)
            if ok
            for _ in found
        ]
        # A stream that is alone is every rank's.
        dealt = iter(deal(costs, streams.ranks)) if len(costs) > 1 else None
        slots = []
        for call, found, ok, template in zip(calls, structures, may_deal, templates, strict=True):
            owners = tuple(next(dealt) for _ in found) if ok and dealt else None
            slots.append(Slot(call.kind, owners, found, template, ok))
        return Pattern(slots, is_foretold, is_estimable)

    def _warn_whole(self, why: str) -> None:
        if self.setting.streams.comm.size > 1 or self.setting.streams.is_apart:
            self.setting.warn(
                f"hybrid-cond: {type(self.calls[-1].denoiser).__name__} is evaluated whole on every rank, since {why}."
            )

    def _has_other_attention(self) -> bool:
        """Whether the denoiser has another attention processor than when its calls were learnt."""
        return any(module.processor is not processor for module, processor in self._attention)

    def _forget(self) -> None:
        """The pipeline asks for other streams than before."""
        self.pattern = None
        self.engine.restart()

    # The scheduler's step.

    def end_step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, extra: dict[str, Any]) -> bool:
        """End the present step, before the scheduler steps.

        Args:
            output: what the pipeline has made of the streams.
            timestep: with which the scheduler is called.
            sample: likewise.
            extra: further arguments of its step that are numbers (``eta``).

        Returns:
            Whether it was the run's last.
        """
        calls, pattern = self.calls, self.pattern
        if not calls or self.step >= self.num_steps:  # Cosmos steps twice; a loop may go on beyond what was foretold
            calls.clear()
            return False
        if self._promised is not None:
            self._keep_promises()
        del self._outputs[len(calls) :], self._true[len(calls) :]  # it may have asked for less than was foretold
        is_new = pattern is None or self._is_changed or len(calls) != len(pattern.slots)
        if is_new:
            if pattern is not None:
                self._forget()
            self.pattern = pattern = self._pattern(len(sample)) if self._kind_now is FULL else None
            if pattern is not None:
                self._learnt.append(pattern)
        elif pattern is not None and self._kind_now is FULL:
            pattern.is_verified = True
        with self._together():
            if self.step == 0:
                self._plan_again(timestep, extra)
            is_estimable = pattern is not None and pattern.is_foretold and pattern.is_estimable
            if pattern is not None and is_new and is_estimable:
                handed = [stream for streams in self._outputs for stream in streams]
                true = [*self._true, *self._outputs[len(self._true) :]]
                self.engine.full([stream for streams in true for stream in streams], pattern.structures, handed)
            count = pattern.count if pattern else 1
            self.engine.cost(self._kind_now, count, pattern.load(self.setting.streams.ranks) if pattern else 1)
            first_cond = 0 if len(calls) > 1 else count - 1
            self.engine.end_step(output, sample, is_estimable, first_cond)
        calls.clear()
        self._outputs, self._true = [], []
        return self.step == self.num_steps

    def _plan_again(self, timestep: Any, extra: dict[str, Any]) -> None:
        """Plan the run anew if its first step tells more than was known before it."""
        times = [float(time) for time in self.scheduler.timesteps]
        start, at = self._start, float(self.on_host(torch.as_tensor(timestep)))
        if getattr(self.scheduler, "begin_index", None) is None:
            start = min(range(len(times)), key=lambda i: abs(times[i] - at))
        gain = self._gain
        if self.pattern is not None:
            gain = self.pattern.count / self.pattern.load(self.setting.streams.ranks)
        if (start, extra, gain) != (self._start, self._extra, self._gain):
            self._plan(start, extra, gain)
            self.engine.kind()
            if self._executor is not None:
                self._executor.date(self.time(0))

    # The end of a run.

    def finish(self) -> dict[str, Any]:
        """End the run on every rank at the same place; the report's entries that are the run's to tell.

        Raises:
            RunOver: the ranks drifted apart, or one has left.
        """
        with self._together():
            self._read()
            if self._executor is not None:
                if self._executor.drifted():
                    raise self._drifted(self.num_steps - 1)
                self._executor.drain()
            comm = self.setting.streams.comm
            mine = torch.tensor([comm.bytes_sent, RUNNING], device=self._device)
            sent = torch.stack(comm.all_gather(mine))
            self._raise_if_left(sent[:, 1].tolist(), self.step)
        self.is_over = self.is_finished = True
        self._remember()
        return {**self.engine.report(), "bytes_sent": sent[:, 0].tolist()}

    @torch.no_grad()  # the pipeline's own is over
    def leave(self) -> bool:
        """Tell the other ranks that this one has left the run before its end; whether all have left it."""
        streams = self.setting.streams
        self.is_over = True
        if streams.comm.size == 1 or self._device is None:
            return True
        step = self.step + bool(self.calls)
        if self._promised is not None:
            asked = [Asked(self.calls[0], 1, slot.owners) for slot in self._promised.slots]
            structures = [slot.structures for slot in self._promised.slots]
            headers = streams.leave(asked, structures, torch.tensor([0, LEFT], device=self._device))
            return set(headers[:, 1].tolist()) == {LEFT}
        if not (self.calls and self._kind_now is FULL and not self._has_exchanged):
            # The others make further steps before they exchange anything; PIPELINED ones need this rank's part.
            while step < self.num_steps and (kind := self._foreseen(step)) is not FULL:
                if kind is PIPELINED and self._executor is not None:
                    self._play_along(step)
                step += 1
        header = torch.tensor([0, LEFT], device=self._device)
        pattern = self.pattern
        if step >= self.num_steps:
            statuses = torch.stack(streams.comm.all_gather(header))
        elif pattern is None or not pattern.has_exchanged:
            statuses = streams.announce(header)
        else:
            statuses = streams.leave(self._foretold, [slot.structures for slot in pattern.slots], header)
        return set(statuses[:, 1].tolist()) == {LEFT}

    def _foreseen(self, step: int) -> StepKind:
        """The kind of a later step, as the other ranks will take it."""
        pattern = self.pattern
        if pattern is None or not self._is_estimable(pattern):
            return FULL
        kind = self.engine.kind(step)
        return kind if self._fits(kind, pattern) else FULL

    def _play_along(self, step: int) -> None:
        """Take this rank's part of a PIPELINED step that it will not see, with the arguments of the last one."""
        executor, rule = self._executor, RULES[str(self.setting.config.guidance)]
        assert executor is not None
        executor.pipelined(
            self._branches,
            rule.stage0_branch,
            self.time(step),
            hand_over=step + 1 < self.num_steps and self.engine.policy.kind(step + 1) is PIPELINED,
            extrapolate=rule.extrapolates_boundary,
        )

    def _remember(self) -> None:
        """Keep for later runs what the calls of a step are, where there are several and each is some rank's."""
        earlier = self.setting.earlier
        for pattern in self._learnt:
            if len(pattern.slots) > 1 and all(slot.owners and slot.count == 1 for slot in pattern.slots):
                kind = pattern.slots[0].kind
                earlier[:] = [other for other in earlier if other.slots[0].kind != kind][-_MOST_PATTERNS:]
                earlier.append(pattern.bare())

    # What the ranks tell one another.

    def _exchange_headers(self, call: Call, status: int) -> list[int]:
        """Exchange headers alone, and wait for them; the statuses.

        Raises:
            RunOver: the ranks drifted apart, or another one has left or failed.
        """
        self._read()
        streams = self.setting.streams
        if streams.comm.size == 1:
            self._has_exchanged = True
            return [status]
        with self._together():
            headers = streams.announce(self._header(call, status))
            self._has_exchanged = True
            return self._check_headers(headers, status)

    def _check_headers(self, headers: torch.Tensor, status: int = RUNNING) -> list[int]:
        sums, statuses = headers.T.tolist()
        if status != FAILED and set(statuses) != {FAILED}:
            self._raise_if_left(statuses, self.step)
        if len(set(sums)) > 1:
            raise self._drifted(self.step)
        return statuses

    def _header(self, call: Call, status: int) -> torch.Tensor:
        """int64 [2]: a checksum of the latents, and this rank's status. (16 bytes: what follows stays aligned.)"""
        if self.setting.streams.comm.size == 1 and self.setting.streams.across is None:
            return torch.zeros(2, dtype=torch.int64)  # on the host: nobody is told
        latents = checksum(call.latents)
        return torch.cat([latents, torch.full_like(latents, status)])

    def _zero(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self._device)

    def _send_flags(self, headers: torch.Tensor | None, drifted: torch.Tensor | None = None) -> None:
        """Start to bring to the host what all ranks said in an exchange."""
        if headers is not None:
            drifted, statuses = (headers[:, 0] != headers[0, 0]).any(), headers[:, 1]
        else:
            statuses = self._zero()
        assert drifted is not None
        others = torch.stack(self._pending).any() if self._pending else torch.zeros_like(drifted)
        self._pending = []
        flags = torch.cat([drifted.view(1).long(), others.view(1).long(), statuses])
        self._late.append(_Late(self.step, *to_host(flags)))

    def _read(self) -> None:
        """Wait for what was measured up to the last FULL step, and for what the ranks said there.

        Every rank reads the same values at the same step, so all raise or none.

        Raises:
            RunOver: the ranks drifted apart, or one has left.
        """
        with self._together():
            self._read_flags()
            self.engine.read(keep=0)
            self.engine.read_weights()

    def _read_flags(self) -> None:
        late, self._late = self._late, []
        for step, values, arrival in late:
            drifted, differs, *statuses = from_host(values, arrival)
            self._raise_if_left(statuses, step)
            if drifted:
                raise self._drifted(step)
            if differs:
                raise RunOver(
                    f"hybrid-cond: before step {step} a later call of the denoiser had other values than the first "
                    "one told, so that the picture is wrong. Take hybrid-cond off, and report the pipeline."
                )

    def _raise_if_left(self, statuses: list[int], step: int) -> None:
        comm = self.setting.streams.comm
        gone = [rank for rank, status in enumerate(statuses) if status != RUNNING]
        if gone:
            # With split tokens these are the ranks of all places, in order of place.
            names = " and ".join(str(comm.global_rank(rank % comm.size)) for rank in gone)
            raise RunOver(
                f"hybrid-cond: rank {names} left the run before step {step} was over: it was interrupted, or an error "
                "was raised there. Look for it in its log. The run has ended on every rank."
            )

    def _drifted(self, step: int) -> RunOver:
        return RunOver(
            f"hybrid-cond: at step {step} the ranks' latents are no longer the same. They drifted apart since the last "
            "FULL step or the one before: give every rank the same generator seed, scheduler, dtype and callbacks. A "
            "scheduler that draws its noise from the global generator, whatever generator= is, needs torch.manual_seed "
            "with the same seed on every rank before each call."
        )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What is raised meanwhile is raised on every rank: nobody has to be told."""
        try:
            yield
        except Exception:
            self.is_over = True
            raise


def _branches(call: Call) -> dict[Branch, Inputs]:
    """The arguments of each branch, batch B, from those of both, batch 2B in the order uncond, cond."""
    return {"uncond": part(call, 0, 2).inputs, "cond": part(call, 1, 2).inputs}


def _differ(whole: list[Any], apart: list[Any], structure: Structure) -> bool:
    """Whether streams differ by more than rounding. On a GPU the host waits."""
    for one, other in zip(whole, apart, strict=True):
        for a, b in zip(structure.tensors(one), structure.tensors(other), strict=True):
            if (a - b).abs().max() > COUPLED.get(a.dtype, COUPLED_HALF) * a.abs().max():
                return True
    return False
