"""The streams of a step, evaluated whole: dealt out to the ranks by their cost, and exchanged in one collective.

This needs nothing of the denoiser's inside, so FULL steps work with any. What every rank gets is, bit for bit, what one
process would have got by evaluating the streams one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from ..ranks.comm import Comm
from .calls import Call, Structure, part, split
from .graphs import Graphs

_ALIGNMENT = 16  # bytes of the header, and of the slot of each tensor in a payload

#: What a rank says of itself in the header of an exchange.
RUNNING, LEFT = 0, 1

#: What `Streams.evaluate` returns: by call and part what it returned; None where another rank evaluates it.
Outputs = list[list[Any]]


@dataclass(frozen=True)
class Asked:
    """One call of a step and how it is dealt out.

    Attributes:
        call: the call.
        count: streams that it asks for, as parts of a batch.
        owners: rank of each of them; None where every rank evaluates the call whole.
    """

    call: Call
    count: int = 1
    owners: tuple[int, ...] | None = None


def deal(costs: Sequence[float], ranks: int) -> tuple[int, ...]:
    """The rank of each stream: the dearest goes first, to the rank that has least to do so far."""
    load = [0.0] * ranks
    owners = [0] * len(costs)
    for stream in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[stream] = min(range(ranks), key=load.__getitem__)
        load[owners[stream]] += costs[stream]
    return tuple(owners)


class Streams:
    """Evaluates and exchanges streams.

    Args:
        comm: the ranks. A group of one evaluates all.
        across: the ranks that evaluate with this one what it evaluates, where tokens are split.
        graphs: how a denoiser's forward is launched, by the denoiser.
        is_apart: whether the parts of a batch are evaluated apart even where one process has all of them, as several
            ranks would.
    """

    def __init__(
        self, comm: Comm, across: Comm | None, graphs: Callable[[nn.Module], Graphs], is_apart: bool = False
    ) -> None:
        self.comm, self.across, self.graphs, self.is_apart = comm, across, graphs, is_apart
        self.ranks = 2 if is_apart else comm.size  # to which streams are dealt out; one process may play both

    def evaluate(self, asked: Sequence[Asked], watch: Any = None) -> Outputs:
        """This rank's share of a step's calls.

        Args:
            watch: told of cond's forward; see `stages.executor.Executor`.
        """
        for denoiser in {id(one.call.denoiser): one.call.denoiser for one in asked}.values():
            self.graphs(denoiser).look()
        firsts = accumulate((one.count for one in asked), initial=0)
        return [self._one(first, one, watch) for first, one in zip(firsts, asked, strict=False)]

    def _one(self, first: int, asked: Asked, watch: Any) -> list[Any]:
        call, count, owners = asked.call, asked.count, asked.owners
        is_all = owners is None or self.comm.size == 1
        mine = range(count) if is_all else [i for i, owner in enumerate(owners or ()) if owner == self.comm.rank]
        if owners is None or (len(mine) == count and not self.is_apart):
            return split(self._forward(call, watch, first), count, call.is_listed)
        outputs: list[Any] = [None] * count
        for i in mine:
            outputs[i] = self._forward(part(call, i, count), watch, first + i)
        return outputs

    def _forward(self, call: Call, watch: Any, number: int) -> Any:
        graphs = self.graphs(call.denoiser)
        if watch is not None and number == watch.cond:
            output, seen = graphs(watch.name, partial(watch.watch, call), call.inputs)
            watch.keep(seen)
            return output
        return graphs("forward", lambda inputs: call.evaluate(**inputs), call.inputs)

    # The exchange.

    def announce(self, header: torch.Tensor) -> torch.Tensor:
        """Exchange headers alone, int64 [2] each; [ranks, 2]."""
        return self._everywhere(torch.stack(self.comm.all_gather(header)))

    def exchange(
        self, outputs: Outputs, asked: Sequence[Asked], structures: Sequence[Sequence[Structure]], header: torch.Tensor
    ) -> tuple[Outputs, torch.Tensor]:
        """Give every rank every stream, by one exchange of [header | this rank's predictions].

        Args:
            outputs: this rank's.
            structures: of the streams, by call and part.
            header: int64 [2].

        Returns:
            The outputs of all streams, and the headers, [ranks, 2].
        """
        dealt = [(i, j) for i, one in enumerate(asked) if one.owners for j in range(one.count)]
        if self.comm.size == 1 or not dealt:
            return outputs, self.announce(header)
        mine = [
            _bytes(tensor)
            for i, j in dealt
            if outputs[i][j] is not None
            for tensor in structures[i][j].tensors(outputs[i][j])
        ]
        gathered = self.comm.all_gather(_padded([header.view(torch.uint8), *mine], self.size(asked, structures)))
        offsets = [_ALIGNMENT] * self.comm.size
        whole: Outputs = [list(parts) for parts in outputs]
        for i, j in dealt:
            rank = (asked[i].owners or ())[j]
            tensors = []
            for shape, dtype in structures[i][j].shapes:
                count = shape.numel() * dtype.itemsize
                piece = gathered[rank][offsets[rank] : offsets[rank] + count]
                tensors.append(piece.view(dtype).view(shape))
                offsets[rank] += _aligned(count)
            # Also this rank's own: what it goes on with has then been on the same way as the others'.
            whole[i][j] = structures[i][j].fill(tensors)
        return whole, self._everywhere(torch.stack([sent[:_ALIGNMENT].view(torch.int64) for sent in gathered]))

    def leave(self, asked: Sequence[Asked], structures: Sequence[Sequence[Structure]], header: torch.Tensor) -> Any:
        """Take part in an `exchange` with nothing to give; the headers."""
        return self.exchange([[None] * one.count for one in asked], asked, structures, header)[1]

    def _everywhere(self, headers: torch.Tensor) -> torch.Tensor:
        """Also the headers of the other places: if some ranks stopped and others went on, these would wait for ever."""
        return headers if self.across is None else torch.cat(self.across.all_gather(headers))

    def size(self, asked: Sequence[Asked], structures: Sequence[Sequence[Structure]]) -> int:
        """Bytes of a rank's payload: all send as much as the one that has most."""
        sizes = [_ALIGNMENT] * self.comm.size
        for i, one in enumerate(asked):
            for j, rank in enumerate(one.owners or ()):
                for shape, dtype in structures[i][j].shapes:
                    sizes[rank] += _aligned(shape.numel() * dtype.itemsize)
        return max(sizes)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return _padded([flat], _aligned(flat.numel()))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(pieces: list[torch.Tensor], size: int) -> torch.Tensor:
    """The pieces as one, of this size."""
    missing = size - sum(piece.numel() for piece in pieces)
    if len(pieces) == 1 and not missing:
        return pieces[0]
    return torch.cat([*pieces, pieces[0].new_zeros(missing)] if missing else pieces)
