"""Runs this rank's part of a step. Owns every buffer and every pending transfer; waits at the point of use."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from .comm import Comm, Transfer, checksum
from .graphs import Graphs, can_capture, seconds_between
from .partition import Activation, Anatomy, Boundary, Inputs, Partition, Segment, tensors_of

Branch = Literal["uncond", "cond"]


class Exchange(NamedTuple):
    """What a FULL step brings every rank: both predictions [B, ...], and if the ranks' inputs differ (0-d bool)."""

    pred_u: torch.Tensor
    pred_c: torch.Tensor
    drifted: torch.Tensor


class _Known(NamedTuple):
    """A boundary of stage 1 and the time of the step it belongs to."""

    time: float
    boundary: Boundary


class _Due(NamedTuple):
    """A boundary handed over and not yet taken, or None if it is to be received; from which segment, at which time."""

    source: Segment
    time: float
    boundary: Boundary | None


class Executor:
    """Evaluates steps on a group of two ranks, or on one process that plays both in turn.

    Args:
        anatomy: the denoiser read as units.
        comm: the group; rank 0 is uncond, rank 1 is cond. A group of one plays both.
        graphs: how the denoiser's pieces are called.
        sequence: the group of this rank's branch, where its tokens are split.
    """

    def __init__(self, anatomy: Anatomy, comm: Comm, graphs: Graphs, sequence: Comm | None = None) -> None:
        self.anatomy = anatomy
        self.comm = comm
        self.graphs = graphs
        self.sequence = sequence
        self.ranks = (comm.rank,) if comm.size == 2 else (0, 1)
        self._partition: Partition | None = None
        self._prediction: torch.Tensor | None = None  # of the last FULL step: shape and dtype of the next
        self._captured: Boundary | None = None  # by the hook, in the last forward
        self._known: list[_Known] = []  # the last two boundaries of stage 1, on its rank
        self._due: _Due | None = None
        self._outgoing: list[Transfer] = []
        self._capture: Any = None

    def prepare(self, inputs: Inputs, is_timed: bool = False) -> None:
        """Choose the partition for one branch's inputs and watch its cut, so that a FULL step leaves its boundary.

        Args:
            is_timed: whether it is balanced by time, where that can be measured. The same on all ranks.
        """
        self._partition = self.anatomy.partition(inputs, self._seconds(inputs) if is_timed else None)
        if self._partition.output_rank in self.ranks:
            unit = self.anatomy.units[self._partition.cut]
            self._capture = unit.module.register_forward_hook(
                lambda module, args, output: setattr(self, "_captured", unit.boundary(output))
            )

    def full(
        self, forward: Callable[..., Any], branches: dict[Branch, Inputs], inputs: Inputs, time: float
    ) -> Exchange:
        """Both branches, one per rank, then one exchange of [checksum of the inputs | prediction].

        Args:
            forward: the denoiser's own forward; the first item of what it returns is the prediction.
            branches: the forward's arguments of each branch, batch B.
            inputs: the arguments of both together, batch 2B, which every rank holds: ranks that drifted apart are
                found by their checksum.
            time: of the step, for what is extrapolated from it.
        """

        def evaluate(inputs: Inputs) -> tuple[torch.Tensor, Boundary | None]:
            pred = forward(**inputs)[0].contiguous()
            boundary, self._captured = self._captured, None
            return pred, boundary

        name = f"forward, boundary of {None if self._partition is None else self._partition.cut}"
        self._finish_transfers()
        self.graphs.look()
        if len(self.ranks) > 1:
            pred_u, _ = self.graphs(name, evaluate, branches["uncond"])
            pred_c, boundary = self.graphs(name, evaluate, branches["cond"])
            pred, drifted = pred_c, torch.zeros((), dtype=torch.bool, device=pred_c.device)
        else:
            mine: Branch = "uncond" if self.comm.rank == 0 else "cond"
            pred, boundary = self.graphs(name, evaluate, branches[mine])
            header = torch.zeros(2, dtype=torch.int64, device=pred.device)  # 16 bytes: the prediction stays aligned
            header[:1] = checksum(inputs)
            payload = torch.cat([header.view(torch.uint8), pred.view(-1).view(torch.uint8)])
            gathered = self.comm.all_gather(payload)
            sums = torch.cat([part[:8].view(torch.int64) for part in gathered])
            pred_u, pred_c = (part[16:].view(pred.dtype).view(pred.shape) for part in gathered)
            if self.sequence is not None:  # if some ranks stopped and others went on, these would wait for ever
                sums = torch.cat(self.sequence.all_gather(sums))
            drifted = (sums != sums[0]).any()
        if self._capture is not None and boundary is None:
            raise RuntimeError(
                "hybrid-cond: the denoiser's forward did not call the block that ends a stage as a module. Compile the "
                "blocks' forwards (block.forward = torch.compile(block.forward)) instead of the whole denoiser."
            )
        if boundary is not None:
            self._learn(_Known(time, boundary))
        self._prediction = pred
        return Exchange(pred_u, pred_c, drifted)

    def pipelined(
        self, branches: dict[Branch, Inputs], stage0_branch: Branch, time: float, *, hand_over: bool, extrapolate: bool
    ) -> torch.Tensor:
        """One evaluation of the network in total, split over the ranks.

        Args:
            branches: the denoiser's arguments of each branch, batch B.
            stage0_branch: the branch whose embeddings stage 0 has; stage 1 has cond's.
            time: of the step.
            hand_over: whether the next step is PIPELINED too. If not, nobody will read this step's stage 0, and it is
                not evaluated.
            extrapolate: stage 1 reads the straight line through its last two boundaries at ``time``, not the last one.

        Returns:
            The prediction on every rank, [B, C, H, W].
        """
        assert self._partition is not None and self._prediction is not None, "no FULL step came before"
        partition = self._partition
        stage1 = partition.output_rank
        self.graphs.look()
        left: dict[int, Activation] = {}  # by each rank of this process, after its segments so far
        for index, segment in enumerate(partition.segments):
            if not hand_over and segment.rank != stage1:
                continue
            rank = segment.rank
            if rank in self.ranks:
                boundary = None
                if index > 0:
                    boundary = self._read(time, extrapolate) if segment.age else self._take().boundary
                branch = branches["cond" if rank == stage1 else stage0_branch]
                name = f"units {segment.start} to {segment.stop}"
                left[rank] = self.graphs(name, partial(self._evaluate, segment), branch, left.pop(rank, None), boundary)
            if hand_over and index + 1 < len(partition.segments) and not partition.segments[index + 1].age:
                self._hand_over(segment, partition.segments[index + 1], left, time)
        if stage1 in self.ranks:
            (pred,) = left[stage1].boundary
            if len(self.ranks) == 1:
                self._send(pred, 1 - stage1)
        else:
            pred = self.comm.receive(torch.empty_like(self._prediction), stage1)
        if hand_over:
            *_, source, target = partition.segments
            self._hand_over(source, target, left, time)
        return pred

    def drain(self) -> None:
        """Complete what is in flight and forget the run; what was captured stays for the next."""
        self._finish_transfers()
        if self._capture is not None:
            self._capture.remove()
        self._capture = self._partition = self._prediction = self._captured = None
        self._known.clear()

    def _seconds(self, inputs: Inputs) -> tuple[float, ...] | None:
        """What each unit takes, the mean over the ranks; None where one of them could not measure it."""
        device = next(tensors_of(inputs)).device
        if not can_capture(device):
            return None
        mine = self.anatomy.seconds(inputs, seconds_between) or (math.nan,) * len(self.anatomy.units)
        # Exchanged on every run, whatever a rank remembers: one that has measured must not wait for one that has not.
        gathered = torch.stack(self.comm.all_gather(torch.tensor(mine, dtype=torch.float64, device=device)))
        mean = tuple(gathered.mean(dim=0).tolist())
        return None if math.isnan(mean[0]) else mean

    def _learn(self, new: _Known) -> None:
        """Keep a boundary of stage 1; solvers that evaluate twice at one time replace the first of the two."""
        self._known = [*(known for known in self._known if known.time != new.time), new][-2:]

    def _learn_due(self) -> None:
        """Keep the boundary of stage 1 that is due, if one is."""
        if self._due is not None:
            self._learn(self._take())

    def _read(self, time: float, extrapolate: bool) -> Boundary:
        """What stage 1 reads at ``time``."""
        self._learn_due()
        last = self._known[-1]
        if not extrapolate or len(self._known) < 2:
            return last.boundary
        before = self._known[0]
        reach = (time - last.time) / (last.time - before.time)
        return tuple(torch.lerp(b, a, 1 + reach) for b, a in zip(before.boundary, last.boundary, strict=True))

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

    def _hand_over(self, source: Segment, target: Segment, left: dict[int, Activation], time: float) -> None:
        """Pass on the boundary between two segments: one flat tensor.

        Between two ranks it is sent at once and received where it is read. A receive that is posted earlier holds many
        of the GPU's multiprocessors while it waits (NCCL over NVLink: SD3 lost a quarter of a step so).
        """
        # What is due from the step before is taken first: it must not be lost, and the two ranks' transfers have one
        # order (were both to send first, they would wait for each other).
        self._learn_due()
        boundary = left[source.rank].boundary if source.rank in self.ranks else None
        if target.rank in self.ranks:
            self._due = _Due(source, time, boundary)
        else:
            assert boundary is not None
            self._send(torch.cat([tensor.reshape(-1) for tensor in boundary]), target.rank)

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        """Start to send; nothing here waits for it but the memory it needs."""
        self._outgoing.append(self.comm.send(tensor, rank))
        if len(self._outgoing) > 2:  # in flight: a prediction and a boundary
            self._outgoing.pop(0).wait()

    def _take(self) -> _Known:
        """The boundary that is due, once it has arrived."""
        assert self._due is not None and self._partition is not None and self._prediction is not None
        (source, time, boundary), self._due = self._due, None
        if boundary is None:
            tensors = self._partition.shapes[source.stop - 1]
            count, dtype = sum(shape.numel() for shape, _ in tensors), tensors[0][1]
            buffer = torch.empty(count, dtype=dtype, device=self._prediction.device)
            parts = self.comm.receive(buffer, source.rank).split([shape.numel() for shape, _ in tensors])
            boundary = tuple(part.view(shape) for part, (shape, _) in zip(parts, tensors, strict=True))
        return _Known(time, boundary)

    def _finish_transfers(self) -> None:
        if self._due is not None:  # the run took another turn than was foreseen: the peer has sent it
            self._take()
        for transfer in self._outgoing:
            transfer.wait()
        self._outgoing.clear()
