"""A run: one pass of the pipeline that is running through its scheduler's timesteps.

A *step* is everything between two calls of the scheduler's `step`. How many there are, and where they begin, is the
scheduler's to say. The first step of a run, and each one whose calls are not as foretold, is evaluated call by call,
and its calls are learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..config import HybridConfig
from ..engine import Engine
from ..estimates.base import Rule
from ..estimates.rules import RULES
from ..evaluate.calls import Call, Structure, count_parts, is_compiled, part, split
from ..evaluate.stages.executor import Branch, Executor
from ..evaluate.stages.more import More
from ..evaluate.streams import LEFT, RUNNING, Asked, Streams, deal
from ..schedule.adaptive import DOUBTFUL
from ..schedule.plan import FULL, PIPELINED, SKIPPED, StepKind
from ..schedule.policies import make_policy
from ..schedule.sampler import Sampler, read_sampler
from .coupling import Coupling, attention_of, coupling_of, is_apart, memory_of, moving_weights, state_of
from .pattern import Pattern, compare
from .pending import Promise
from .signals import FAILED, Signals
from .step import Step

#: Relative difference between a batch evaluated whole and in parts, above which its samples see one another.
COUPLED = {torch.float32: 1e-3, torch.float64: 1e-6}
COUPLED_HALF = 0.05


#: Why a batch is evaluated whole.
_TOGETHER = {
    Coupling.COUPLED: "its attention processors (perturbed-attention guidance) cut the batch themselves",
    Coupling.SEEING: "it evaluates the samples of a batch together",
}

#: Calls that a first step may have. A pipeline that works in tiles makes some tens of them.
_MOST_CALLS = 64
#: Patterns that are kept for later runs: of a few sizes.
_MOST_PATTERNS = 7


@dataclass
class Setting:
    """What the runs of a pipeline share.

    Attributes:
        config: the strategy.
        streams: evaluates and exchanges whole streams.
        executor: evaluates stages; None where no step is PIPELINED.
        warn: logs a warning, each text once.
        earlier: patterns of several calls, as finished runs had them; the same on all ranks.
        tried: kinds of calls whose samples were evaluated apart as in their batch.
        may_guidance_change: whether the pipeline was called with a callback, which may change w on any step.
    """

    config: HybridConfig
    streams: Streams
    executor: Executor | None
    warn: Callable[[str], None]
    earlier: list[Pattern] = field(default_factory=list)
    tried: set[Any] = field(default_factory=set)
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
        self.is_finished = False
        self.signals = Signals(setting.streams)
        self.pattern: Pattern | None = None
        self._learnt: list[Pattern] = []  # all that the run has had
        self._promised: Pattern | None = None  # what a step that is learnt is expected to ask for
        self._promises: list[Promise | None] = []  # of its calls; None where this rank evaluates
        self.now = Step()  # the present step
        self._attention: list[tuple[Any, Any]] = []  # modules with their processors, when its calls were learnt
        self._kind_now = FULL
        self._foretold: list[Asked] = []
        self._branches: dict[Branch, Call] = {}  # of the last step with stages, or of the run's first
        self._executor: Executor | None = None  # while steps of this pattern may be split
        self._whole = ""  # why not, where that is the denoiser's affair
        self._first: float | None = None  # timestep of the first step
        self._last_staged = 0  # the last FULL step of more than two stages
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
        if config.policy == "adaptive" or (not config.is_exact and self._rule.needs_sampler):
            sampler = read_sampler(self.scheduler, start, self.num_steps, **extra)
        family = self.setting.executor.anatomy.family if self.setting.executor else "blocks"
        policy = make_policy(config, self.num_steps, family, sampler, gain)
        self.engine = Engine(config, policy, sampler)

    @property
    def _rule(self) -> type[Rule]:
        return RULES[str(self.setting.config.guidance)]

    @property
    def is_over(self) -> bool:
        """Whether all ranks know that the run has ended."""
        return self.signals.is_over

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
        self._device = call.tensors[0].device
        if len(self.now.calls) == _MOST_CALLS and not self.step:
            self.setting.warn(
                "hybrid-cond: this pipeline does not step its scheduler, but perhaps a copy of it: all is evaluated "
                "whole on every rank."
            )
            self.now, self.num_steps = Step(), 0
        self.now.calls.append(call)
        if self.step >= self.num_steps:  # more than the scheduler has timesteps for
            self.now.calls.clear()
            return call.evaluate(**call.inputs)
        if (index := len(self.now.calls) - 1) > 0:
            with torch.profiler.record_function(f"step {self.step} {self._kind_now.name}, call {index + 1}"):
                return self._answer_later(call, index)
        if self.pattern is not None and (self.pattern.slots[0].kind != call.kind or self._has_other_attention()):
            self._forget()
        kind = FULL if self.pattern is None else self._kind(self.pattern)
        with torch.profiler.record_function(f"step {self.step} {kind.name}"):
            return self._learn(call) if self.pattern is None else self._answer_first(call, self.pattern, kind)

    def _answer_first(self, call: Call, pattern: Pattern, kind: StepKind) -> Any:
        self._kind_now = kind
        if kind is SKIPPED:
            self.now.hand(pattern, self.engine.skipped())
        elif kind is PIPELINED:
            self.now.hand(pattern, self._pipelined(call, pattern))
        elif pattern.is_foretold:
            true = self._full(call, pattern)
            self.now.hand(pattern, self.engine.full(true, pattern.estimated or pattern.structures), true)
        else:
            self._announce(call)
            return self._evaluate_whole(call, pattern.slots[0].count)
        return self.now.answer(0)

    def _answer_later(self, call: Call, index: int) -> Any:
        pattern = self.pattern
        if self._promised is not None:
            slots = self._promised.slots
            if index < len(slots) and slots[index].kind == call.kind:
                return self._promise(index, call, self._promised)
            self._keep_promises(self.now)
        if pattern is None:
            return self._evaluate_whole(call, count_parts(call))
        slot = pattern.slots[index] if index < len(pattern.slots) else None
        if slot is not None and not self.now.is_changed and slot.kind == call.kind:
            if self._kind_now is not FULL:
                return self.now.answer(index)
            if not pattern.is_foretold:
                return self._evaluate_whole(call, slot.count)
            foretold = self._foretold[index].call
            if compare(foretold, call, self.signals.pending, waits=not pattern.is_verified):
                return self.now.answer(index)
            # Once it was as foretold, it may well be again; else it is the pipeline's way.
            self.now.is_unforetold = not pattern.is_verified
        # Another call than foretold: it is evaluated as it came, on every rank, and the step is learnt anew.
        self.now.change(index)
        return self._evaluate_whole(call, count_parts(call))

    def _kind(self, pattern: Pattern) -> StepKind:
        """The kind of the present step: the policy's, but FULL where there is nothing to estimate from."""
        with self.signals.together():
            if self.setting.may_guidance_change and self.engine.policy.reads_bends:
                # The host waits, and the GPU then for the host. But a group must not outlast the guidance it is for.
                self.engine.read_weights()
            kind = self.engine.kind()
        if self._fits(kind, pattern):
            return kind
        if self._is_estimable(pattern):
            why = self._whole or (
                "its calls are known, and its layers split, from the second step on"
                if self._is_pair(pattern)
                else f"this pipeline asks for {pattern.count} stream(s) in {len(pattern.slots)} call(s) a step, not "
                "for uncond and cond of one denoiser that may be evaluated apart"
            )
            self.setting.warn(
                f"hybrid-cond: steps that would be PIPELINED are FULL, since {why}. Use --hybrid_kinds FS."
            )
        return FULL

    def _fits(self, kind: StepKind, pattern: Pattern) -> bool:
        """Whether a step of these streams can be of a kind."""
        is_split = self._executor is not None and self._executor.is_ready and self._is_pair(pattern)
        return kind is FULL or (self._is_estimable(pattern) and (kind is SKIPPED or is_split))

    def _is_pair(self, pattern: Pattern) -> bool:
        """Whether the streams are uncond and cond of one denoiser, each some rank's."""
        slots = pattern.slots
        is_one = all(slot.kind[0] == slots[0].kind[0] and slot.owners is not None for slot in slots)
        return is_one and pattern.count == 2 and self.engine.cond in (0, 1)

    def _is_estimable(self, pattern: Pattern) -> bool:
        """Whether there is something to estimate the streams from."""
        return self.engine.is_known and pattern.is_estimable

    def _evaluate_whole(self, call: Call, count: int) -> Any:
        """Evaluate a call on every rank as it came; what it returns."""
        state = state_of(call.denoiser)
        ((output,),) = self.setting.streams.evaluate([Asked(call)])
        self.now.note(split(output, count, call.is_listed), state, coupling_of(call.denoiser) is Coupling.NONE)
        return output

    def _announce(self, call: Call, status: int = RUNNING) -> list[int]:
        """Exchange headers alone, on a FULL step whose payload is of a size that not every rank knows; the statuses."""
        self._read()
        statuses = self.signals.announce(call, self.step, status)
        self.now.has_exchanged = True
        return statuses

    def _read(self) -> None:
        """Wait for what was measured and said up to the last FULL step. Every rank reads the same values."""
        with self.signals.together():
            self._hear()
            self.engine.read_all()

    def _hear(self) -> None:
        """Wait for what the ranks said up to the last FULL step. Before any exchange: a rank that has left is missing.

        Raises:
            RunOver: the ranks drifted apart, or another one has left.
        """
        if isinstance(self._executor, More):
            # What was said when a step began is there long before the step is over.
            with self.signals.beside(self._device):
                if (headers := self._executor.heard()) is not None:
                    self.signals.send(self._last_staged, headers)
        self.signals.read()

    # A FULL step as foretold.

    def _full(self, call: Call, pattern: Pattern) -> list[Any]:
        """Evaluate a FULL step whose calls are foretold; by stream."""
        streams, executor = self.setting.streams, self._executor
        self._foretold = pattern.foretell(call)
        if isinstance(executor, More):
            self._branches = _branches(self._foretold, executor.cond)
            outputs = self._staged(executor, pattern.structures)
        else:
            if executor is not None:
                executor.now = self.time(self.step)
            evaluated = streams.evaluate(self._foretold, executor)
            # The GPU has the evaluation to do while the host waits for what came before it.
            self._read()
            with self.signals.together():
                header = self.signals.header(call)
                if not pattern.has_exchanged and streams.comm.size > 1:
                    # Ranks that could not know the size of this exchange have to be told from those that do.
                    self.signals.check(streams.announce(header), self.step)
                given, headers = streams.exchange(evaluated, self._foretold, pattern.structures_by_call, header)
            pattern.has_exchanged = True
            self.now.has_exchanged = True
            self.signals.send(self.step, headers)
            outputs = [output for parts in given for output in parts]
        return outputs

    def _pipelined(self, call: Call, pattern: Pattern) -> list[Any]:
        """What to hand the pipeline on a PIPELINED step."""
        with self.signals.together():
            self._hear()
            assert self._executor is not None
            self._branches = _branches(pattern.foretell(call), self._executor.cond)
            pred = self._evaluate_once(self.step)
        self.signals.fail(self._executor.error)
        return self.engine.pipelined(pred)

    def _evaluate_once(self, step: int) -> list[torch.Tensor]:
        """This rank's part of a PIPELINED step, with the arguments that it has last seen; the prediction."""
        assert self._executor is not None
        return self._executor.pipelined(
            self._branches,
            self._rule.stage0_branch,
            self.time(step),
            hand_over=step + 1 < self.num_steps and self.engine.policy.kind(step + 1) is PIPELINED,
            extrapolate=self._rule.extrapolates_boundary,
        )

    def _staged(self, executor: More, structures: list[Structure]) -> list[Any]:
        """Both branches' predictions through the ranks' stages, in nests of these structures."""
        with self.signals.together():
            self._hear()
            predictions = executor.full(
                self._branches,
                self.signals.header(self.now.calls[0]),
                self.time(self.step),
                extrapolate=self._rule.extrapolates_boundary,
            )
        self.now.has_exchanged, self._last_staged = True, self.step
        # The GPU has the evaluation to do while the host waits for what was measured before it.
        with self.signals.together():
            self.engine.read_all()
        self.signals.fail(executor.error)
        return [structure.fill(pred) for structure, pred in zip(structures, predictions, strict=True)]

    # A step that is learnt.

    def _learn(self, call: Call) -> Any:
        """Evaluate the first call of a step of which nothing is known; what it returns."""
        with self.signals.together():
            self.engine.kind()  # a policy is asked on every step
        self._kind_now = FULL
        self._attention = attention_of(call.denoiser)
        self._release_executor()
        self._whole = ""
        streams = self.setting.streams
        earlier = next((pattern for pattern in self.setting.earlier if pattern.slots[0].kind == call.kind), None)
        if earlier is not None and streams.comm.size > 1:
            self._announce(call)
            self._promised, self._promises = earlier, []
            return self._promise(0, call, earlier)
        count, state = count_parts(call), state_of(call.denoiser)
        coupling = coupling_of(call.denoiser)
        whole: list[Any] = []
        if coupling in (Coupling.UNKNOWN, Coupling.STORING):
            before = memory_of(call.denoiser)
            (whole,) = streams.evaluate([Asked(call, count)])
            if coupling is Coupling.STORING or memory_of(call.denoiser) != before:
                return self._learn_storing(call, whole, state)
        is_shared = count > 1 and (streams.is_apart or streams.comm.size > 1)
        owners = None
        if coupling in _TOGETHER and is_shared:
            self._warn_whole(call, _TOGETHER[coupling])
        else:
            owners = deal([1.0] * count, streams.ranks) if count > 1 else None
            if count == 2 and owners is not None:  # most batches are [uncond, cond]
                self._prepare(_branches([Asked(call, count)], cond=1), owners[1], cond=1)
        if isinstance(self._executor, More):
            structure = self._executor.anatomy.counted(self._branches["cond"]).structure
            found = self._staged(self._executor, [structure] * count)
        else:
            owners, found = self._learn_apart(call, count, owners)
        is_new = not is_apart(call.denoiser) and call.kind not in self.setting.tried
        if is_shared and owners is not None and (coupling is Coupling.UNKNOWN or is_new):
            if not whole:
                (whole,) = streams.evaluate([Asked(call, count)])
            if _differ(whole, found, Structure(whole[0], call.is_listed)):
                who = "an attention processor" if coupling is Coupling.UNKNOWN else "it"
                self._warn_whole(call, f"{who} lets the samples of its batch see one another")
                owners, found = None, whole
            else:
                self.setting.tried.add(call.kind)
        if owners is None:
            self._release_executor()
        self.now.note(found, state, owners is not None or count == 1)
        return self.now.answer(0)

    def _learn_storing(self, call: Call, streams: list[Any], state: Any) -> Any:
        """Take what a call was evaluated to whose processors keep something of it that the pipeline may read."""
        self._announce(call)
        if self.setting.streams.ranks > 1 or not self.setting.config.is_exact:
            self.setting.warn(
                f"hybrid-cond: {type(call.denoiser).__name__} is evaluated whole on every rank, call by call, and "
                "every step is FULL, since its attention processors keep something of what they see."
            )
        graphs = self.setting.streams.graphs(call.denoiser)
        if graphs.captures:
            graphs.refuse("a replay would leave nothing where its attention processors keep what they see")
        self.now.is_storing = True
        self.now.note(streams, state, False)
        return self.now.answer(0)

    def _learn_apart(
        self, call: Call, count: int, owners: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...] | None, list[Any]]:
        """Evaluate the first call of such a step by its streams; who may own them (None: no single rank), and they."""
        streams = self.setting.streams
        asked = [Asked(call, count, owners)]
        error: Exception | None = None
        try:
            evaluated = streams.evaluate(asked, self._executor)
        except Exception as raised:
            error = raised
        with self.signals.together():
            statuses = self._announce(call, RUNNING if error is None else FAILED)
            # Where layers are split too, there is no other way to evaluate it.
            if error is not None and (owners is None or self._executor is not None or set(statuses) != {FAILED}):
                raise error
        if error is not None:
            self._warn_whole(call, f"its parts cannot be evaluated apart ({type(error).__name__}: {error})")
            return None, streams.evaluate([Asked(call, count)])[0]
        if owners is None:
            return None, evaluated[0]
        own = next((output for output in evaluated[0] if output is not None), None)
        if own is None:  # there are more ranks than streams, and this one has to know what streams look like
            own = streams.evaluate([Asked(part(call, 0, count))])[0][0]
        structures = [[Structure(own, call.is_listed)] * count]
        with self.signals.together():
            (found,), _ = streams.exchange(evaluated, asked, structures, self.signals.header(call))
        return owners, found

    def _release_executor(self) -> None:
        """No layers are split in this run; the same on every rank."""
        if self._executor is not None:
            with self.signals.together():
                self._hear()
                self._executor.drain()
            self._executor = None

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
        self.now.note([output], state, True)
        self._promises.append(promise)
        if index + 1 < len(expected.slots):
            return output
        asked = expected.ask(self.now.calls)
        mine = [
            [None] if promise else outputs for outputs, promise in zip(self.now.outputs, self._promises, strict=True)
        ]
        with self.signals.together():
            header = self.signals.header(call)
            self.now.outputs, headers = streams.exchange(mine, asked, expected.structures_by_call, header)
        self._promised = None
        self.signals.send(self.step, headers)
        for promise, outputs in zip(self._promises, self.now.outputs, strict=True):
            if promise is not None:
                promise.keep(outputs[0])
        return self.now.outputs[index][0]

    def _keep_promises(self, now: Step) -> None:
        """The step asks for something else than was expected: what was promised is evaluated on this rank too."""
        self._promised = None
        for promise, outputs in zip(self._promises, now.outputs, strict=True):
            if promise is not None:
                outputs[0] = promise.keep()

    def _prepare(self, branches: dict[Branch, Call], owner: int, cond: int) -> None:
        """Begin with the executor, where steps of the run may be PIPELINED or FULL ones have stages.

        Args:
            branches: a call of each.
            owner: rank that evaluates cond on FULL steps.
            cond: number of its stream.
        """
        executor = self.setting.executor
        if executor is None or not self._may_split:
            return
        denoiser = branches["cond"].denoiser
        name = type(getattr(denoiser, "_orig_mod", denoiser)).__name__
        if is_compiled(denoiser):
            self.setting.warn(
                f"hybrid-cond: where layers are split, the {name} is evaluated as it is, though it is compiled as a "
                "whole. Compile its blocks instead: block.forward = torch.compile(block.forward), or use "
                "--hybrid_kinds FS."
            )
        if moves := moving_weights(denoiser):
            with self.signals.together():
                raise ValueError(
                    f"hybrid-cond cannot split the layers of a {name} whose weights are moved "
                    f"or cast when a module is called ({', '.join(moves)}): use --hybrid_kinds FS, or take that off."
                )
        config = self.setting.config
        is_timed = config.balance != "flops" and config.cuda_graphs is not False and self.setting.streams.across is None
        mixes = self._rule.stage0_branch == "uncond"
        with self.signals.together():
            self._whole = executor.begin(branches, cond, owner, mixes=mixes, is_timed=is_timed) or ""
        if not self._whole:
            self._executor, self._branches = executor, branches
            executor.now = self.time(self.step)
        elif executor.stages > 2:
            self.setting.warn(f"hybrid-cond: the layers of a {name} are not split, since {self._whole}.")

    @property
    def _may_split(self) -> bool:
        """Whether steps of the run may be PIPELINED, or FULL ones have stages."""
        executor = self.setting.executor
        return executor is not None and (self.engine.policy.may_pipeline or executor.stages > 2)

    def _prepare_later(self, pattern: Pattern, calls: list[Call]) -> None:
        """The same at the end of a step that was learnt, which may tell the streams where its batch did not."""
        if not self._may_split:
            return
        # A rank that has left that step has said so in its exchange, or says it in this one.
        self._read()
        self.signals.announce(calls[0], self.step)
        executor, cond = self._executor, self.engine.cond
        is_pair = pattern.is_estimable and self._is_pair(pattern)
        # Two stages watch cond beside further streams too; more of them take both branches and no others.
        if executor is not None and executor.cond == cond and (is_pair or not isinstance(executor, More)):
            return
        self._release_executor()
        if self._whole or not is_pair:
            return
        owners = [owner for slot in pattern.slots for owner in slot.owners or ()]
        assert cond is not None
        self._prepare(_branches(pattern.ask(calls), cond), owners[cond], cond)
        if isinstance(self._executor, More):
            self._executor.count_whole()

    def _warn_whole(self, call: Call, why: str) -> None:
        if self.setting.streams.ranks > 1:
            self.setting.warn(
                f"hybrid-cond: {type(call.denoiser).__name__} is evaluated whole on every rank, since {why}."
            )

    def _warn_idle(self) -> None:
        """Say so where ranks had nothing to do in the whole run."""
        comm, streams = self.setting.streams.comm, max((pattern.count for pattern in self._learnt), default=0)
        is_dealt = all(slot.may_deal for pattern in self._learnt for slot in pattern.slots)
        if self._executor is None and is_dealt and 0 < streams < comm.size:
            self.setting.warn(
                f"hybrid-cond: this pipeline's steps have {streams} stream(s) and the group has {comm.size} ranks, so "
                f"that {comm.size - streams} had nothing of its own to evaluate. Start fewer processes "
                "(--nproc_per_node), or give the others a part of each stream: --ulysses_degree, --ring_degree, "
                "--hybrid_stages."
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
        now, pattern = self.now, self.pattern
        self.now = Step()
        if not now.calls or self.step >= self.num_steps:  # Cosmos steps twice; a loop may be longer than foretold
            return False
        if self._promised is not None:
            self._keep_promises(now)
        if self._is_repeated(timestep):
            return self._end_at(timestep)
        now.end()
        is_new = pattern is None or now.is_changed or len(now.calls) != len(pattern.slots)
        if is_new:
            if pattern is not None:
                self._forget()
            if self._kind_now is FULL:
                pattern = now.learn(sample, self.setting.streams.ranks, partial(self._warn_whole, now.calls[-1]))
                self._learnt.append(pattern)
            else:
                pattern = None
            self.pattern = pattern
        elif pattern is not None and self._kind_now is FULL:
            pattern.is_verified = True
        with self.signals.together():
            if self.step == 0:
                self._plan_again(timestep, extra)
            is_exact = self.setting.config.is_exact
            is_estimable = pattern is not None and pattern.is_estimable and (pattern.is_alike or not is_exact)
            if pattern is not None and is_new and is_estimable:
                self.engine.full(now.evaluated, pattern.estimated or [], now.handed)
            count = pattern.count if pattern else 1
            self.engine.cost(self._kind_now, count, pattern.load(self.setting.streams.ranks) if pattern else 1)
            first_cond = 0 if len(now.calls) > 1 else count - 1
            self.engine.end_step(output, sample, is_estimable, first_cond)
        if pattern is not None and is_new and not (is_exact or pattern.is_alike or self.engine.is_known):
            self.setting.warn(
                "hybrid-cond: the predictions of this pipeline's branches are of different sizes, and it does not "
                "weigh the last tokens of each, so none can be estimated, and every step is FULL. Use "
                "--hybrid_policy cfg."
            )
        if self._executor is not None and self._kind_now is FULL:
            self._executor.is_ready = True
        if pattern is not None and is_new and self.step < self.num_steps:
            self._prepare_later(pattern, now.calls)
        return self.step == self.num_steps

    def _is_repeated(self, timestep: Any) -> bool:
        """Whether the second step is at the timestep of the first, where the scheduler has another one for it."""
        if self.step > 1:
            return False
        at, before = float(self.on_host(torch.as_tensor(timestep))), self._first
        self._first = at
        times = self.scheduler.timesteps
        return self.step == 1 and at == before and bool(times[self._start] != times[self._start + 1])

    def _end_at(self, timestep: Any) -> bool:
        """End the run before its second step, where its steps are not the scheduler's: the rest is evaluated plainly.

        Raises:
            ValueError: the step has been estimated, from another one of the same timestep.
        """
        why = f"this pipeline steps its scheduler several times at timestep {float(timestep):g} (views of a panorama)"
        if self._kind_now is not FULL:
            with self.signals.together():
                raise ValueError(f"hybrid-cond: {why}, so that no step can be estimated. Use --hybrid_policy cfg.")
        self.setting.warn(f"hybrid-cond: {why}: all that follows is evaluated whole on every rank.")
        self.num_steps = self.step
        return True

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
        with self.signals.together():
            self._read()
            if self._executor is not None:
                self._executor.drain()
            comm = self.setting.streams.comm
            mine = torch.tensor([comm.bytes_sent, self.signals.status], device=self._device)
            sent = torch.stack(comm.all_gather(mine))
            self.signals.raise_if_left(sent[:, 1].tolist(), self.step)
        self.signals.is_over = True
        self.remember()
        self._warn_idle()
        if (error := self.engine.policy.error or 0.0) > DOUBTFUL:
            self.setting.warn(
                f"hybrid-cond: skipping is estimated to have changed the latents of this run by {error:.0%} of their "
                "size. Fewer steps (--num_inference_steps) may be closer in the same time: lower --hybrid_speedup or "
                "--hybrid_tolerance."
            )
        return {**self.engine.report(), "bytes_sent": sent[:, 0].tolist()}

    def settle(self) -> None:
        """Complete what is on its way between stages, where all ranks know that the run has ended before its end.

        A rank that is ahead of the others may be about to drop its pipeline, and with it what it has not sent yet.
        """
        if self._executor is not None:
            self._executor.drain()

    @torch.no_grad()  # the pipeline's own is over
    def leave(self) -> bool:
        """Tell the other ranks that this one has left the run before its end; whether all have left it."""
        self.signals.is_over = True
        if self.setting.streams.comm.size == 1 or self._device is None:
            return True
        have_all_left = self._leave()
        self.settle()
        return have_all_left

    def _leave(self) -> bool:
        """Take part in the exchange that the others make next, and in what they do before it."""
        streams, executor, pattern = self.setting.streams, self._executor, self.pattern
        is_within = bool(self.now.calls)
        is_due = is_within and self._kind_now is FULL and not self.now.has_exchanged  # the present step's exchange
        is_learnt = is_within and not is_due and (pattern is None or self.now.is_changed)
        step = self.step + (is_within and not is_due)
        header = torch.tensor([0, LEFT], device=self._device)
        if isinstance(executor, More):
            executor.heard()
        if not (is_due or is_learnt):
            # The others make further steps before they exchange anything; PIPELINED ones need this rank's part.
            while step < self.num_steps and (kind := self._foreseen(step)) is not FULL:
                if kind is PIPELINED and executor is not None:
                    self._evaluate_once(step)
                step += 1
        if (promised := self._promised) is not None:  # of the present step, which is learnt
            asked = promised.ask([self.now.calls[0]] * len(promised.slots))
            statuses = streams.leave(asked, promised.structures_by_call, header)
        elif step >= self.num_steps:
            statuses = torch.stack(streams.comm.all_gather(header))
        elif is_learnt or pattern is None or not (pattern.has_exchanged or isinstance(executor, More)):
            statuses = streams.announce(header)
        elif isinstance(executor, More):
            executor.full(self._branches, header, self.time(step), extrapolate=self._rule.extrapolates_boundary)
            heard = executor.heard()
            assert heard is not None
            statuses = heard
        else:
            statuses = streams.leave(self._foretold, pattern.structures_by_call, header)
        return set(statuses[:, 1].tolist()) == {LEFT}

    def _foreseen(self, step: int) -> StepKind:
        """The kind of a later step, as the other ranks will take it."""
        pattern = self.pattern
        if pattern is None or not self._is_estimable(pattern):
            return FULL
        kind = self.engine.kind(step)
        return kind if self._fits(kind, pattern) else FULL

    def remember(self) -> None:
        """The run has ended on all ranks alike: keep for later ones what calls of a step it has had.

        Those are kept of which there are several, each some rank's.
        """
        self.is_finished = True
        earlier = self.setting.earlier
        for pattern in self._learnt:
            if len(pattern.slots) > 1 and all(slot.owners and slot.count == 1 for slot in pattern.slots):
                kind = pattern.slots[0].kind
                earlier[:] = [other for other in earlier if other.slots[0].kind != kind][-_MOST_PATTERNS:]
                earlier.append(pattern.bare())


def _branches(asked: list[Asked], cond: int) -> dict[Branch, Call]:
    """A call of each branch, batch B, from those of a step; ``cond`` is the number of its stream."""
    streams = [part(one.call, i, one.count) for one in asked for i in range(one.count)]
    return {"uncond": streams[1 - cond], "cond": streams[cond]}


def _differ(whole: list[Any], apart: list[Any], structure: Structure) -> bool:
    """Whether streams differ by more than rounding. On a GPU the host waits."""
    for one, other in zip(whole, apart, strict=True):
        for a, b in zip(structure.tensors(one), structure.tensors(other), strict=True):
            if (a - b).abs().max() > COUPLED.get(a.dtype, COUPLED_HALF) * a.abs().max():
                return True
    return False
