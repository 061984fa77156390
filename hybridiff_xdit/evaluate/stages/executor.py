"""Runs this rank's part of a step. Owns every buffer and every pending transfer; waits at the point of use."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from ...ranks.comm import Comm, Gathering, Transfer
from ...schedule.plan import SYNCHRONOUS_STEPS
from ...trees import tensors_of
from ..calls import Call, is_compiled
from ..graphs import Graphs, can_capture, seconds_between
from .anatomy import Activation, Anatomy, Boundary, Inputs
from .cuts import Partition, Segment

Branch = Literal["uncond", "cond"]


class Exchange(NamedTuple):
    """What a FULL step of more than two stages brings every rank.

    Attributes:
        pred_u: the prediction of uncond, [B, ...].
        pred_c: likewise of cond.
        headers: what the ranks said on the FULL step before (`Executor.heard`).
    """

    pred_u: torch.Tensor
    pred_c: torch.Tensor
    headers: torch.Tensor


class _Known(NamedTuple):
    """A boundary and the time of the step it belongs to."""

    time: float
    boundary: Boundary


class _Due(NamedTuple):
    """A boundary that another rank has sent, and that is not yet received: who reads it, made by whom and when."""

    reader: int  # index of the segment
    maker: int
    time: float


class _Route(NamedTuple):
    """Who evaluates what in one evaluation of the network.

    Attributes:
        stream: the boundaries that are read where they are old: those of a branch's FULL steps, or ``pipelined``, those
            of cond's FULL steps and of PIPELINED steps.
        first: rank that has the first two stages of those FULL steps.
        ranks: by stage.
        branches: by stage, whose embeddings it has.
    """

    stream: str
    first: int
    ranks: tuple[int, ...]
    branches: tuple[Branch, ...]

    def home(self, stage: int) -> int:
        """The rank that keeps the boundaries which ``stage`` reads where they are old.

        The one that made them on a FULL step: it has them whatever step comes next. On a PIPELINED step it is the
        reader itself for every other stage (and with two stages, so that nothing is sent after a FULL step).
        """
        return self.first + (stage - 1) // 2


class Executor:
    """Evaluates steps on a group of ranks, half of them a branch's, or on one process that plays all in turn.

    Who has which stage, with S = 2R stages on ranks 0 to R-1 (uncond) and R to 2R-1 (cond):

    * FULL: the r-th rank of a branch has stages 2r and 2r + 1, so both branches are evaluated at once, each through R
      ranks. With R = 1 that is the denoiser's own forward.
    * PIPELINED: the r-th rank of uncond has stage 2r, the r-th of cond stage 2r + 1. So a cond rank has seen, on the
      FULL step before, what the stage reads, or makes it itself: see `_Route.home`.

    FULL steps read boundaries of FULL steps only, for both branches have those, and of one age: what is old in both
    predictions cancels in their difference, which the guidance multiplies.

    Transfers cannot wait for each other in a circle, even if a send takes until it is received: on every rank a step's
    old boundaries leave first, then each rank takes the old one that it reads before it sends anything to a rank before
    it in the network, and last come the predictions, uncond's first. So the ranks' transfers follow one order, from the
    last stage to the first.

    The stages of a U-Net lag behind one another (`cuts`), so where a branch has several ranks no step may end in
    an exchange that waits for all: predictions are sent to each rank, which takes them when it has done its part.

    Where tokens are split (`tokens`), each of these ranks is a group of processes, and there is one such executor for
    each place in the groups, that sends shards between the ranks of its place. All places make the same transfers, at
    the same points between their group's exchanges: a group waits for another where one rank would, and no circle is
    added.

    Args:
        anatomy: the denoiser read as units.
        comm: the group, uncond's ranks first. A group of one plays all.
        graphs: how the denoiser's pieces are called.
        sequence: the ranks that evaluate with this one what it evaluates, where tokens are split.
        stages: of a PIPELINED step, 2 or a larger even number; as many as the group has ranks.
    """

    def __init__(
        self, anatomy: Anatomy, comm: Comm, graphs: Graphs, sequence: Comm | None = None, stages: int = 2
    ) -> None:
        self.anatomy = anatomy
        self.comm = comm
        self.graphs = graphs
        self.sequence = sequence
        self.stages = stages
        self.ranks = (comm.rank,) if comm.size > 1 else tuple(range(stages))
        self._partition: Partition | None = None
        self._device = torch.device("cpu")
        self._captured: Boundary | None = None  # by the hook, in the last forward
        self._full_steps = 0
        # The last two boundaries that are at home on this rank, by stream and by index of the segment that reads them.
        self._known: defaultdict[tuple[str, int], list[_Known]] = defaultdict(list)
        self._due: _Due | None = None
        self._headers: Gathering | None = None  # of the last FULL step: they are not waited for there
        self._outgoing: list[Transfer] = []
        self._capture: Any = None
        self.now = 0.0  # time of the FULL step that is evaluated

    def begin(self, inputs: Inputs, is_timed: bool = False) -> None:
        """Begin a run: choose the partition for one branch's inputs.

        With two stages also watch its cut, so that a FULL step, by the denoiser's own forward, leaves its boundary.

        Args:
            is_timed: whether it is balanced by time, where that can be measured. The same on all ranks.

        Raises:
            ValueError: the units do not understand an input.
        """
        self.drain()
        self.anatomy.check_inputs(inputs)
        self._device = next(tensors_of(inputs)).device
        self._partition = self.anatomy.partition(inputs, self.stages, self._seconds(inputs) if is_timed else None)
        if self.stages == 2 and 1 in self.ranks:
            unit = self.anatomy.units[self._partition.cut]
            self._capture = unit.module.register_forward_hook(
                lambda module, args, output: setattr(self, "_captured", unit.boundary(output))
            )

    def date(self, time: float) -> None:
        """Put right the time of the run's first step, which is over."""
        for known in self._known.values():
            known[:] = [before._replace(time=time) for before in known]

    # A FULL step of two stages is the streams' (`evaluate.streams`); it leaves the boundary at the cut.

    @property
    def name(self) -> str:
        """Of a whole forward that is watched."""
        return f"forward, boundary of {None if self._partition is None else self._partition.cut}"

    def watch(self, call: Call, inputs: Inputs) -> tuple[Any, Boundary | None]:
        """What a whole forward returns, and the boundary that it leaves at the cut."""
        # What was compiled before the hook was there would not call it.
        plain = torch.compiler.set_stance("force_eager") if is_compiled(call.denoiser) else nullcontext()
        with plain:
            output = call.evaluate(**inputs)
        boundary, self._captured = self._captured, None
        return output, boundary

    def keep(self, branch: int, boundary: Boundary | None) -> None:
        """Keep what a branch's forward (0 uncond, 1 cond) at time `now` left.

        Raises:
            RuntimeError: the forward did not call the module at the cut.
        """
        self._full_steps += 1
        if self._capture is not None and boundary is None:
            raise RuntimeError(
                "hybrid-cond: the denoiser's forward did not call the block that ends a stage as a module, so that no "
                "step can be PIPELINED: use --hybrid_kinds FS."
            )
        if self._partition is not None and boundary is not None and branch == 1:
            self._learn("pipelined", len(self._partition.segments) - 1, _Known(self.now, boundary))

    # A FULL step of more stages.

    def full(self, branches: dict[Branch, Inputs], header: torch.Tensor, time: float, *, extrapolate: bool) -> Exchange:
        """Both branches, each through its ranks, then the exchange of predictions and of headers.

        Args:
            branches: the forward's arguments of each branch, batch B.
            header: what this rank says (a checksum of the latents, its status), int64 [2].
            time: of the step, for what is extrapolated from it and to it.
            extrapolate: old boundaries are read as the straight line through the last two at ``time``.
        """
        self._drop_due()
        self.graphs.look()
        predictions = self._in_stages(branches, time, extrapolate)
        self._full_steps += 1
        if len(self.ranks) > 1:
            pred_u, pred_c = predictions
            return Exchange(pred_u, pred_c, self.heard())
        pred_u, pred_c = (self._share(predictions, rank) for rank in (self.stages // 2 - 1, self.stages - 1))
        exchange = Exchange(pred_u, pred_c, self.heard())
        self._headers = self.comm.gather(header)
        return exchange

    def pipelined(
        self, branches: dict[Branch, Inputs], stage0_branch: Branch, time: float, *, hand_over: bool, extrapolate: bool
    ) -> torch.Tensor:
        """One evaluation of the network in total, split over the ranks.

        Args:
            branches: the denoiser's arguments of each branch, batch B.
            stage0_branch: the branch whose embeddings uncond's ranks have (with two stages, stage 0); cond's have
                cond's.
            time: of the step.
            hand_over: whether the next step is PIPELINED too. If not, nobody will read what the stages before the last
                make, and they are not evaluated.
            extrapolate: old boundaries are read as the straight line through the last two at ``time``.

        Returns:
            The prediction on every rank, [B, C, H, W].
        """
        assert self._full_steps, "no FULL step came before"
        self.graphs.look()
        half, last = self.stages // 2, self.stages - 1
        ranks = tuple(stage // 2 + stage % 2 * half for stage in range(self.stages))
        route = _Route("pipelined", half, ranks, (stage0_branch, "cond") * half)
        stages = range(self.stages) if hand_over else range(last, self.stages)
        left, made = self._run(route, branches, time, stages, extrapolate=extrapolate)
        self._learn_due()
        pred = self._share(left[last].boundary if last in self.ranks else (), last)
        if hand_over:
            self._hand_over(route, made, time)
        return pred

    def heard(self) -> torch.Tensor:
        """Headers of all ranks on the last FULL step of more than two stages, [ranks, 2], if they are not read yet.

        Also those of the other places: if some ranks stopped and others went on, these would wait for ever.
        """
        if self._headers is None:
            return torch.zeros(1, 2, dtype=torch.int64, device=self._device)
        headers, self._headers = torch.stack(self._headers.wait()), None
        return headers if self.sequence is None else torch.cat(self.sequence.all_gather(headers))

    def drain(self) -> None:
        """Complete what is in flight and forget the run; what was captured stays for the next."""
        self._drop_due()
        for transfer in self._outgoing:
            transfer.wait()
        self.forget()

    def forget(self) -> None:
        """Forget the run, whatever is in flight: waits for no other rank."""
        self._due = None
        self._outgoing.clear()
        if self._capture is not None:
            self._capture.remove()
        self._capture = self._partition = self._captured = self._headers = None
        self._full_steps = 0
        self._known.clear()

    def _seconds(self, inputs: Inputs) -> tuple[float, ...] | None:
        """What each unit takes, the mean over the ranks; None where one of them could not measure it."""
        if not can_capture(self._device):
            return None
        mine = self.anatomy.seconds(inputs, seconds_between) or (math.nan,) * len(self.anatomy.units)
        # Exchanged on every run, whatever a rank remembers: one that has measured must not wait for one that has not.
        gathered = torch.stack(self.comm.all_gather(torch.tensor(mine, dtype=torch.float64, device=self._device)))
        mean = tuple(gathered.mean(dim=0).tolist())
        return None if math.isnan(mean[0]) else mean

    # A FULL step.

    def _in_stages(self, branches: dict[Branch, Inputs], time: float, extrapolate: bool) -> list[torch.Tensor]:
        """The predictions that end on this process's ranks, each branch through its ranks."""
        assert self._partition is not None
        half = self.stages // 2
        predictions: list[torch.Tensor] = []
        firsts: dict[Branch, int] = {"uncond": 0, "cond": half}
        for branch, first in firsts.items():
            ranks = tuple(first + stage // 2 for stage in range(self.stages))
            route = _Route(branch, first, ranks, (branch,) * self.stages)
            waits = self._full_steps < SYNCHRONOUS_STEPS
            left, made = self._run(
                route, branches, time, range(self.stages), extrapolate=extrapolate, synchronous=waits
            )
            for index, boundary in made.items():
                if self._partition.segments[index].stage % 2 == 0:  # another rank's
                    self._learn(branch, index, _Known(time, boundary))
                if branch == "cond":
                    self._learn("pipelined", index, _Known(time, boundary))
            if ranks[-1] in self.ranks:
                predictions += left[ranks[-1]].boundary
        return predictions

    # An evaluation.

    def _run(
        self,
        route: _Route,
        branches: dict[Branch, Inputs],
        time: float,
        stages: range,
        *,
        extrapolate: bool,
        synchronous: bool = False,
    ) -> tuple[dict[int, Activation], dict[int, Boundary]]:
        """This process's part of one evaluation of the network.

        Args:
            stages: those that are evaluated.
            synchronous: nothing old is read: each stage waits for the one before it.

        Returns:
            What is left at the end, by rank, and what was made for segments that may read it when it is old, by their
            index.
        """
        assert self._partition is not None
        segments = self._partition.segments
        ranks = [route.ranks[segment.stage] for segment in segments]
        old = {  # the segment that reads an old boundary, by its rank: there is one at most
            rank: index
            for index, (segment, rank) in enumerate(zip(segments, ranks, strict=True))
            if segment.age and rank != ranks[index - 1] and segment.stage in stages and not synchronous
        }
        taken: dict[int, Boundary] = {}

        def take(rank: int) -> None:
            if rank in old and rank not in taken:
                home = route.home(segments[old[rank]].stage)
                if home in self.ranks:
                    taken[rank] = self._read(route.stream, old[rank], time, extrapolate)
                else:
                    taken[rank] = self._receive(old[rank], home)

        for rank, index in old.items():
            home = route.home(segments[index].stage)
            if home in self.ranks and rank not in self.ranks:
                self._send(self._read(route.stream, index, time, extrapolate), rank)
        left: dict[int, Activation] = {}  # by each rank of this process, after its segments so far
        made: dict[int, Boundary] = {}
        for index, segment in enumerate(segments):
            if segment.stage not in stages:
                continue
            rank, source = ranks[index], ranks[max(index - 1, 0)]
            if rank not in self.ranks:
                if source in self.ranks and old.get(rank) != index:
                    take(source)
                    self._send(left[source].boundary, rank)
                continue
            boundary = None
            if old.get(rank) == index:
                take(rank)
                boundary = taken[rank]
            elif source != rank:
                boundary = left[source].boundary if source in self.ranks else self._receive(index, source)
            name = f"units {segment.start} to {segment.stop}"
            inputs = branches[route.branches[segment.stage]]
            left[rank] = self.graphs(name, partial(self._evaluate, segment), inputs, left.pop(rank, None), boundary)
            if index + 1 < len(segments) and segments[index + 1].age:
                made[index + 1] = left[rank].boundary
        return left, made

    def _evaluate(
        self, segment: Segment, inputs: Inputs, before: Activation | None, boundary: Boundary | None
    ) -> Activation:
        """The activation after a segment, whose boundary at the end is the prediction.

        Args:
            before: what this rank's segment before left, on the same step; None if this is its first.
            boundary: what the segment reads; None for the first of the network.
        """
        with self.anatomy.lora_scale(inputs) as inputs:
            activation = before or self.anatomy.start(inputs)
            if boundary is not None:
                activation = activation._replace(boundary=boundary)
            for unit in self.anatomy.units[segment.start : segment.stop]:
                activation = unit(activation)
        if segment.stop < len(self.anatomy.units):
            return activation
        return Activation((self.anatomy.prediction(activation).contiguous(),), {})

    # Boundaries.

    def _hand_over(self, route: _Route, made: dict[int, Boundary], time: float) -> None:
        """Bring home what a PIPELINED step made.

        Between two ranks it is sent at once and received where it is read. A receive that is posted earlier holds many
        of the GPU's multiprocessors while it waits (NCCL over NVLink: SD3 lost a quarter of a step so).
        """
        assert self._partition is not None
        for index, segment in enumerate(self._partition.segments):
            if not segment.age:
                continue
            maker, home = route.ranks[segment.stage - 1], route.home(segment.stage)
            if maker in self.ranks and home in self.ranks:
                self._learn(route.stream, index, _Known(time, made[index]))
            elif maker in self.ranks:
                self._send(made[index], home)
            elif home in self.ranks:
                self._due = _Due(index, maker, time)

    def _share(self, pred: Sequence[torch.Tensor], source: int) -> torch.Tensor:
        """The prediction that ``source`` has, on every rank.

        Args:
            pred: on ``source`` that prediction alone.
        """
        assert self._partition is not None
        if source in self.ranks:
            (own,) = pred
            for rank in range(self.stages):
                if rank not in self.ranks:
                    self._send((own,), rank)
            return own
        shape, dtype = self._partition.prediction
        return self.comm.receive(torch.empty(shape, dtype=dtype, device=self._device), source)

    def _read(self, stream: str, index: int, time: float, extrapolate: bool) -> Boundary:
        """What a segment reads at ``time``, of boundaries that are at home here."""
        self._learn_due()
        known = self._known[stream, index]
        last = known[-1]
        if not extrapolate or len(known) < 2:
            return last.boundary
        before = known[0]
        # Each stage extrapolates what others have made from extrapolated input: the more of them, the less of the line
        # may be taken, or errors grow from stage to stage. With up to four stages, all of it is closest.
        reach = min(1, 4 / self.stages) * (time - last.time) / (last.time - before.time)
        return tuple(torch.lerp(b, a, 1 + reach) for b, a in zip(before.boundary, last.boundary, strict=True))

    def _learn(self, stream: str, index: int, new: _Known) -> None:
        """Keep a boundary; solvers that evaluate twice at one time replace the first of the two."""
        known = self._known[stream, index]
        self._known[stream, index] = [*(before for before in known if before.time != new.time), new][-2:]

    def _learn_due(self) -> None:
        """Keep the boundary that is due, if one is, once it has arrived."""
        if self._due is not None:
            reader, maker, time = self._due
            self._due = None
            self._learn("pipelined", reader, _Known(time, self._receive(reader, maker)))

    def _send(self, boundary: Boundary, rank: int) -> None:
        """Start to send, as one flat tensor; nothing here waits for it but the memory it needs."""
        flat = boundary[0] if len(boundary) == 1 else torch.cat([tensor.reshape(-1) for tensor in boundary])
        self._outgoing.append(self.comm.send(flat.contiguous(), rank))
        if len(self._outgoing) > self.stages:  # in flight: a step's predictions and a boundary
            self._outgoing.pop(0).wait()

    def _receive(self, index: int, rank: int) -> Boundary:
        """What a segment reads, from another rank."""
        assert self._partition is not None
        tensors = self._partition.shapes[self._partition.segments[index].start - 1]
        count, dtype = sum(shape.numel() for shape, _ in tensors), tensors[0][1]
        buffer = torch.empty(count, dtype=dtype, device=self._device)
        parts = self.comm.receive(buffer, rank).split([shape.numel() for shape, _ in tensors])
        return tuple(part.view(shape) for part, (shape, _) in zip(parts, tensors, strict=True))

    def _drop_due(self) -> None:
        if self._due is not None:  # the run took another turn than was foreseen: the peer has sent it
            self._receive(self._due.reader, self._due.maker)
            self._due = None
