"""Evaluates PIPELINED steps of two stages. Owns every buffer and pending transfer; waits at the point of use.

Every branch has one rank, which evaluates it on FULL steps by the denoiser's own forward. On a PIPELINED step cond's
rank has the last stage: it has kept the boundary of the FULL step before, so that nothing is sent after one.
More stages: `more`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ...ranks.comm import Comm, Transfer
from ..calls import Call
from ..graphs import Graphs, can_capture, seconds_between
from .anatomy import Activation, Anatomy, Boundary, Inputs
from .cuts import Partition, Segment, Shape
from .families import read

Branch = Literal["uncond", "cond"]


class Known(NamedTuple):
    """A boundary and the time of the step it belongs to."""

    time: float
    boundary: Boundary


class Due(NamedTuple):
    """A boundary that another rank has sent, and that is not yet received: who reads it, made by whom and when."""

    reader: Hashable
    maker: int
    time: float
    shapes: Sequence[Shape]


class Executor:
    """Evaluates on a group of two ranks, or on one process that plays both.

    What may be in flight at once cannot wait in a circle, even if a send takes until it is received: on a step cond's
    rank hands the features of a U-Net over, then the prediction, and only then the other rank its boundary.

    Where tokens are split (`tokens`), each of these ranks is a group of processes, and there is one such executor for
    each place in the groups, that sends shards between the ranks of its place. All places make the same transfers, at
    the same points between their group's exchanges: a group waits for another where one rank would, and no circle is
    added.

    Args:
        anatomy: the (first) denoiser, read.
        comm: the group. A group of one plays all ranks.
        graphs: how a denoiser's pieces are called, by the denoiser.
        sequence: the ranks that evaluate with this one what it evaluates, where tokens are split.
        stages: of a PIPELINED step.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        comm: Comm,
        graphs: Callable[[nn.Module], Graphs],
        sequence: Comm | None = None,
        stages: int = 2,
    ) -> None:
        self.anatomy, self.comm, self.sequence, self.stages = anatomy, comm, sequence, stages
        self.ranks = (comm.rank,) if comm.size > 1 else tuple(range(stages))  # that this process plays
        self.now = 0.0  # time of the FULL step that is evaluated
        self._graphs_of = graphs
        self._tried: dict[Hashable, bool] = {}  # whether a denoiser's segments give what the whole gives
        self._device = torch.device("cpu")
        self.cond = 1  # number of that stream
        self._owner = 1  # rank that evaluates it on FULL steps
        self.is_ready = False  # whether a FULL step has been since, which leaves what a PIPELINED one reads
        self._partition: Partition | None = None
        self._shapes: dict[Branch, Sequence[tuple[Shape, ...]]] = {}  # after each unit
        # The last two boundaries that are at home on this rank, by who reads them.
        self._known: defaultdict[Hashable, list[Known]] = defaultdict(list)
        self._due: Due | None = None
        self._outgoing: list[list[Transfer]] = []
        #: Of an evaluation of this run. The others wait for what comes of it and for what this rank sends after it, so
        #: the run goes on with numbers that mean nothing, until they can be told.
        self.error: Exception | None = None

    def begin(
        self,
        branches: Mapping[Branch, Call],
        cond: int = 1,
        owner: int = 1,
        *,
        mixes: bool = False,
        is_timed: bool = False,
    ) -> str | None:
        """Choose the stages for these calls.

        Args:
            branches: a call of each.
            cond: number of its stream in a step.
            owner: rank that evaluates it on FULL steps.
            mixes: whether a PIPELINED step has the embeddings of both branches.
            is_timed: whether the stages are balanced by time, where that can be measured. The same on all ranks.

        Returns:
            Why the layers cannot be split, if so.

        Raises:
            ValueError: a feature is on that cannot be split, or there are too few layers.
            RuntimeError: the denoiser failed on a rank where it was evaluated to that end; on every rank.
        """
        self.drain()
        self.cond, self._owner = cond, owner
        call = branches["cond"]
        denoiser: Any = getattr(call.denoiser, "_orig_mod", call.denoiser)
        if denoiser is not self.anatomy.denoiser:
            self.anatomy = read(denoiser)
        self._device = call.tensors[0].device
        self.anatomy.check_inputs(call)
        self._shapes = self._count(branches)
        if any(self.anatomy.counted(one).shapes != self._shapes[branch] for branch, one in branches.items()):
            return "its texts have lengths that no argument's shape tells, but the values of its masks"
        partition = self.anatomy.partition(call, self.stages, self._seconds(call) if is_timed else None)
        ends = [segment.stop - 1 for segment in partition.segments]
        if self._shapes["uncond"][-1] != self._shapes["cond"][-1]:
            return "its branches predict tensors of different shapes"
        if mixes and any(self._shapes["uncond"][end] != self._shapes["cond"][end] for end in ends):
            return (
                "its branches have texts of different lengths, which the rule mixed would put into one evaluation (use "
                "--hybrid_guidance none, reuse or deferred)"
            )
        if self.anatomy.needs_trial and self._differs(call, partition):
            return "its stages do not give bit for bit what its own forward gives"
        self._partition = partition
        return None

    @property
    def graphs(self) -> Graphs:
        """How the denoiser's pieces are called."""
        return self._graphs_of(self.anatomy.denoiser)

    def date(self, time: float) -> None:
        """Put right the time of the run's first step, which is over."""
        for known in self._known.values():
            known[:] = [before._replace(time=time) for before in known]

    # A FULL step is the streams' (`evaluate.streams`); it leaves the boundary at the cut.

    @property
    def name(self) -> str:
        """Of a whole forward that is watched."""
        return f"forward, boundary of {None if self._partition is None else self._partition.cut}"

    def watch(self, call: Call, inputs: Inputs) -> tuple[Any, list[Boundary]]:
        """What a whole forward returns, and the boundary that it leaves at the cut."""
        starts = [] if self._partition is None or self.stages > 2 else [self._partition.segments[-1].start]
        return self.anatomy.watch(replace(call, inputs=inputs), starts)

    def keep(self, boundaries: list[Boundary]) -> None:
        """Keep what cond's forward at time `now` left."""
        for boundary in boundaries:
            self._learn("cond", Known(self.now, boundary))

    def pipelined(
        self, branches: Mapping[Branch, Call], stage0_branch: Branch, time: float, *, hand_over: bool, extrapolate: bool
    ) -> list[torch.Tensor]:
        """One evaluation of the network in total, split over the ranks.

        Args:
            branches: a call of each.
            stage0_branch: the branch whose embeddings uncond's ranks have (with two stages, stage 0); cond's have
                cond's.
            time: of the step.
            hand_over: whether the next step is PIPELINED too. If not, nobody will read what the stages before the last
                make, and they are not evaluated.
            extrapolate: old boundaries are read as the straight line through the last two at ``time``.

        Returns:
            The tensors of the prediction, on every rank.
        """
        assert self.is_ready and self._partition is not None, "no FULL step came before"
        self.graphs.look()
        *down, front, back = self._partition.segments
        last, first = self._owner, 1 - self._owner
        shapes = self._shapes["cond"]
        before = features = made = None
        pred: Boundary | None = None
        if down and last in self.ranks:  # a U-Net's way down to the front
            before = self._evaluate(down[0], "cond", branches, None, None)
        old = self._read("cond", time, extrapolate) if last in self.ranks else None
        if down and hand_over:
            features = self._move(before and before.boundary, last, first, shapes[front.start - 1])
        if hand_over and first in self.ranks:
            made = self._evaluate(front, stage0_branch, branches, None, features).boundary
        if last in self.ranks:
            pred = self._evaluate(back, "cond", branches, before, old).boundary
        pred = self._move(pred, last, first, shapes[-1])
        if hand_over and last in self.ranks and first not in self.ranks:
            self._due = Due("cond", first, time, shapes[front.stop - 1])
        elif hand_over:
            assert made is not None
            if last in self.ranks:
                self._learn("cond", Known(time, made))
            else:
                self._send(made, last)
        assert pred is not None
        return list(pred)

    def drain(self) -> None:
        """Complete what is in flight and forget the run; what was captured stays for the next."""
        self._drop_due()
        for transfers in self._outgoing:
            _wait(transfers)
        self.forget()

    def forget(self) -> None:
        """Forget the run, whatever is in flight: waits for no other rank."""
        self._due = self._partition = self.error = None
        self._outgoing.clear()
        self.is_ready = False
        self._known.clear()

    def _count(self, branches: Mapping[Branch, Call]) -> dict[Branch, Sequence[tuple[Shape, ...]]]:
        """Shapes after each unit, of each branch."""
        shapes, error, is_evaluated = {}, None, False
        try:
            for branch, call in branches.items():
                counted = self.anatomy.recounted(call)
                shapes[branch] = counted.shapes
                is_evaluated |= not counted.is_fixed
        except Exception as raised:
            error = raised
        if error is not None or is_evaluated:  # else it was counted without an evaluation, which none can fail alone
            self._is_any(False, error)
        return shapes

    def _differs(self, call: Call, partition: Partition) -> bool:
        """Whether, on any rank, the segments give something else than the whole; tried once on all ranks alike."""
        key = call.kind, partition
        if key not in self._tried:
            differs, error = False, None
            try:
                differs = self.anatomy.differs(call, partition.segments)
            except Exception as raised:
                error = raised
            self._tried[key] = self._is_any(differs, error)
        return self._tried[key]

    def _is_any(self, mine: bool, error: Exception | None) -> bool:
        """Whether something is so on any rank. An error of this rank's, or of another, is raised on all."""
        said = torch.tensor([2 if error else int(mine)], device=self._device, dtype=torch.int32)
        found = self.comm.all_gather(said)
        if self.sequence is not None:
            found = self.sequence.all_gather(torch.cat(found))
        values = torch.cat(found).tolist()
        if error is not None:
            raise error
        if 2 in values:
            rank = self.comm.global_rank(values.index(2) % self.comm.size)
            raise RuntimeError(
                f"hybrid-cond: rank {rank} failed while the stages of its denoiser were tried, before the first "
                "step was over. Look for the error in its log. The run has ended on every rank."
            )
        return any(values)

    def _seconds(self, call: Call) -> tuple[float, ...] | None:
        """What each unit takes, the mean over the ranks; None where one of them could not measure it."""
        if not can_capture(self._device):
            return None
        units = len(self.anatomy.names(call))
        mine = self.anatomy.seconds(call, seconds_between) or (math.nan,) * units
        # Exchanged on every run, whatever a rank remembers: one that has measured must not wait for one that has not.
        gathered = torch.stack(self.comm.all_gather(torch.tensor(mine, dtype=torch.float64, device=self._device)))
        mean = tuple(gathered.mean(dim=0).tolist())
        return None if math.isnan(mean[0]) else mean

    def _evaluate(
        self,
        segment: Segment,
        branch: Branch,
        branches: Mapping[Branch, Call],
        before: Activation | None,
        boundary: Boundary | None,
    ) -> Activation:
        """As `Anatomy.evaluate`, by graph where that can be. After an error, zeros of the right shape: see `error`."""
        assert self._partition is not None
        call = branches[branch]
        # Its boundary is among the arguments, and blocks have left no more.
        before = before._replace(boundary=()) if before and before.conditioning else None
        is_last = segment is self._partition.segments[-1]

        def piece(inputs: Inputs, before: Activation | None, boundary: Boundary | None) -> Activation:
            left = self.anatomy.evaluate(segment, replace(call, inputs=inputs), before, boundary)
            return Activation(tuple(t.contiguous() for t in left.boundary), {}) if is_last else left

        if self.error is None:
            try:
                return self.graphs(f"units {segment.start} to {segment.stop}", piece, call.inputs, before, boundary)
            except Exception as error:
                self.error = error
        shapes = self._shapes[branch][segment.stop - 1]
        return Activation(tuple(torch.zeros(shape, dtype=kind, device=self._device) for shape, kind in shapes), {})

    # Boundaries.

    def _read(self, reader: Hashable, time: float, extrapolate: bool) -> Boundary:
        """What is read at ``time``, of boundaries that are at home here."""
        self._learn_due()
        known = self._known[reader]
        last = known[-1]
        if not extrapolate or len(known) < 2:
            return last.boundary
        before = known[0]
        # Each stage extrapolates what others have made from extrapolated input: the more of them, the less of the line
        # may be taken, or errors grow from stage to stage. With up to four stages, all of it is closest.
        reach = min(1, 4 / self.stages) * (time - last.time) / (last.time - before.time)
        return tuple(torch.lerp(b, a, 1 + reach) for b, a in zip(before.boundary, last.boundary, strict=True))

    def _learn(self, reader: Hashable, new: Known) -> None:
        """Keep a boundary; solvers that evaluate twice at one time replace the first of the two."""
        self._known[reader] = [*(before for before in self._known[reader] if before.time != new.time), new][-2:]

    def _learn_due(self) -> None:
        """Keep the boundary that is due, if one is, once it has arrived."""
        if self._due is not None:
            reader, maker, time, shapes = self._due
            self._due = None
            self._learn(reader, Known(time, self._receive(shapes, maker)))

    def _drop_due(self) -> None:
        if self._due is not None:  # the run took another turn than was foreseen: the peer has sent it
            self._receive(self._due.shapes, self._due.maker)
            self._due = None

    def _move(self, tensors: Boundary | None, source: int, target: int, shapes: Sequence[Shape]) -> Boundary | None:
        """What ``source`` has, also on ``target``."""
        if source not in self.ranks:
            return self._receive(shapes, source) if target in self.ranks else None
        assert tensors is not None
        if target not in self.ranks:
            self._send(tensors, target)
        return tensors

    def _send(self, tensors: Boundary, rank: int) -> None:
        """Start to send; nothing here waits for it but the memory it needs.

        What is sent is received where it is read. A receive that is posted earlier holds many of the GPU's
        multiprocessors while it waits (NCCL over NVLink: SD3 lost a quarter of a step so).
        """
        self._outgoing.append([self.comm.send(tensor.contiguous(), rank) for tensor in tensors])
        if len(self._outgoing) > self.stages:  # in flight: a step's predictions and a boundary
            _wait(self._outgoing.pop(0))

    def _receive(self, shapes: Sequence[Shape], rank: int) -> Boundary:
        return tuple(
            self.comm.receive(torch.empty(shape, dtype=dtype, device=self._device), rank) for shape, dtype in shapes
        )


def _wait(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        transfer.wait()
