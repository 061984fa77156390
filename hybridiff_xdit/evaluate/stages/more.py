"""Evaluates steps of more than two stages: half of the ranks are a branch's, and FULL steps are split too.

Who has which stage, with S = 2R stages on ranks 0 to R-1 (uncond) and R to 2R-1 (cond):

* FULL: the r-th rank of a branch has stages 2r and 2r + 1. So both branches are evaluated at once, each through R
  ranks.
* PIPELINED: the r-th rank of uncond has stage 2r, the r-th of cond stage 2r + 1. So a cond rank has seen, on the FULL
  step before, what the stage reads, or makes it itself: see `_Route.home`.

FULL steps read boundaries of FULL steps only, for both branches have those, and of one age: what is old in both
predictions cancels in their difference, which the guidance multiplies.

Transfers cannot wait for each other in a circle, even if a send takes until it is received: on every rank a step's old
boundaries leave first, then each rank takes the old one that it reads before it sends anything to a rank before it in
the network, and last come the predictions, uncond's first. So the ranks' transfers follow one order, from the last
stage to the first.

The stages of a U-Net lag behind one another (`cuts`), so no step may end in an exchange that waits for all: predictions
are sent to each rank, which takes them when it has done its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ...ranks.comm import Gathering
from ...schedule.plan import SYNCHRONOUS_STEPS
from ..calls import Call
from .anatomy import Activation, Boundary
from .cuts import Shape
from .executor import Branch, Due, Executor, Known


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
        """Rank that stores the boundaries which ``stage`` reads where they are old.

        It is the rank that made them on the last FULL step, so a FULL step never has to send them for later. On a
        PIPELINED step it is the reader itself for every other stage.
        """
        return self.first + (stage - 1) // 2


class More(Executor):
    """Evaluates on as many ranks as there are stages, uncond's first, or on one process that plays all in turn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._full_steps = 0
        self._headers: Gathering | None = None  # of the last FULL step, if they are not read yet

    def count_whole(self) -> None:
        """The run's first FULL step was evaluated whole: it read nothing old, and was one of those that may not."""
        self._full_steps = 1

    def full(
        self, branches: Mapping[Branch, Call], header: torch.Tensor, time: float, *, extrapolate: bool
    ) -> list[list[torch.Tensor]]:
        """Both branches, each through its ranks; the tensors of each stream's prediction, in order of the streams.

        Args:
            branches: a call of each.
            header: what this rank says (a checksum of the latents, its status), int64 [2]. See `heard`.
            time: of the step, for what is extrapolated from it and to it.
            extrapolate: old boundaries are read as the straight line through the last two at ``time``.
        """
        if self.comm.size > 1:  # sent first: at a step's end one would wait for the stages that lag behind
            self._headers = self.comm.gather(header)
        self._drop_due()
        self.graphs.look()
        left = self._in_stages(branches, time, extrapolate)
        self._full_steps += 1
        self.is_ready = True
        pred_u = self._share(left.get("uncond"), self.stages // 2 - 1, self._shapes["uncond"][-1])
        pred_c = self._share(left.get("cond"), self.stages - 1, self._shapes["cond"][-1])
        return [list(pred_u), list(pred_c)] if self.cond else [list(pred_c), list(pred_u)]

    def pipelined(
        self, branches: Mapping[Branch, Call], stage0_branch: Branch, time: float, *, hand_over: bool, extrapolate: bool
    ) -> list[torch.Tensor]:
        assert self.is_ready, "no FULL step came before"
        self.graphs.look()
        half, last = self.stages // 2, self.stages - 1
        ranks = tuple(stage // 2 + stage % 2 * half for stage in range(self.stages))
        route = _Route("pipelined", half, ranks, (stage0_branch, "cond") * half)
        stages = range(self.stages) if hand_over else range(last, self.stages)
        left, made = self._run(route, branches, time, stages, extrapolate=extrapolate)
        self._learn_due()
        pred = self._share(left[last].boundary if last in self.ranks else None, last, self._shapes["cond"][-1])
        if hand_over:
            self._hand_over(route, made, time)
        return list(pred)

    def heard(self) -> torch.Tensor | None:
        """What all ranks said on the last FULL step, [ranks, 2]; None where that is read already.

        Also the ranks of the other places: if some stopped and others went on, these would wait for ever.
        """
        gathering, self._headers = self._headers, None
        if gathering is None:
            return None
        headers = torch.stack(gathering.wait())
        return headers if self.sequence is None else torch.cat(self.sequence.all_gather(headers))

    def forget(self) -> None:
        super().forget()
        self._full_steps, self._headers = 0, None

    def _in_stages(self, branches: Mapping[Branch, Call], time: float, extrapolate: bool) -> dict[str, Boundary]:
        """The predictions that end on this process's ranks, each branch through its ranks."""
        assert self._partition is not None
        half = self.stages // 2
        predictions: dict[str, Boundary] = {}
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
                    self._learn((branch, index), Known(time, boundary))
                if branch == "cond":
                    self._learn(("pipelined", index), Known(time, boundary))
            if ranks[-1] in self.ranks:
                predictions[branch] = left[ranks[-1]].boundary
        return predictions

    def _run(
        self,
        route: _Route,
        branches: Mapping[Branch, Call],
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
                    taken[rank] = self._read((route.stream, old[rank]), time, extrapolate)
                else:
                    taken[rank] = self._receive(self._read_by(old[rank], route), home)

        for rank, index in old.items():
            home = route.home(segments[index].stage)
            if home in self.ranks and rank not in self.ranks:
                self._send(self._read((route.stream, index), time, extrapolate), rank)
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
            before = left.pop(rank, None)
            boundary = None
            if old.get(rank) == index:
                take(rank)
                boundary = taken[rank]
            elif source == rank:
                boundary = before and before.boundary
            elif index:
                here = source in self.ranks
                boundary = left[source].boundary if here else self._receive(self._read_by(index, route), source)
            left[rank] = self._evaluate(segment, route.branches[segment.stage], branches, before, boundary)
            if index + 1 < len(segments) and segments[index + 1].age:
                made[index + 1] = left[rank].boundary
        return left, made

    def _read_by(self, index: int, route: _Route) -> Sequence[Shape]:
        """Shapes of what a segment reads."""
        assert self._partition is not None
        segment = self._partition.segments[index]
        return self._shapes[route.branches[segment.stage]][segment.start - 1]

    def _hand_over(self, route: _Route, made: dict[int, Boundary], time: float) -> None:
        """Bring home what a PIPELINED step made. It is sent at once, and received where it is read."""
        assert self._partition is not None
        for index, segment in enumerate(self._partition.segments):
            if not segment.age:
                continue
            maker, home, reader = route.ranks[segment.stage - 1], route.home(segment.stage), (route.stream, index)
            if maker in self.ranks and home in self.ranks:
                self._learn(reader, Known(time, made[index]))
            elif maker in self.ranks:
                self._send(made[index], home)
            elif home in self.ranks:
                self._due = Due(reader, maker, time, self._read_by(index, route))

    def _share(self, pred: Boundary | None, source: int, shapes: Sequence[Shape]) -> Boundary:
        """The prediction that ``source`` has, on every rank."""
        if source not in self.ranks:
            return self._receive(shapes, source)
        assert pred is not None
        for rank in range(self.stages):
            if rank not in self.ranks:
                self._send(pred, rank)
        return pred
