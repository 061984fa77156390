"""The few exchanges between the ranks, on a given process group.

With two stages, both predictions of a FULL step travel by a collective, the rest point to point. On NCCL these are two
communicators, so neither waits for the other. Every rank issues all its operations in one common order, so that a
group whose communicator serves both (one that was initialised with ``device_id``) is slower, but does not hang.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from ..trees import tensors_of

#: Numbers that a checksum takes at a time: its temporaries are eight bytes a number.
_MOST_NUMBERS = 1 << 22


class Transfer:
    """An asynchronous send. `wait` blocks the device's stream (with NCCL), not the host."""

    def __init__(self, comm: Comm, peer: int, tensor: torch.Tensor, work: Any) -> None:
        self._comm, self._peer, self._tensor, self._work = comm, peer, tensor, work  # the tensor must live till then

    def wait(self) -> None:
        """Complete it."""
        with self._comm.guard(self._peer):
            self._work.wait()


class Gathering:
    """An asynchronous gathering of a tensor from every rank."""

    def __init__(self, comm: Comm, tensor: torch.Tensor, gathered: list[torch.Tensor], work: Any) -> None:
        self._comm, self._tensor, self._gathered, self._work = comm, tensor, gathered, work

    def wait(self) -> list[torch.Tensor]:
        """Every rank's tensor, in order of rank. As `Transfer.wait`, it blocks the device's stream (with NCCL)."""
        with self._comm.guard():
            self._work.wait()
        return self._gathered


class Comm:
    """A process group of this strategy, and the bytes that this rank has sent on it.

    Args:
        group: the ranks in order of branch (rank 0 uncond, rank 1 cond); None is the default group.

    Raises:
        RuntimeError: from any exchange, naming the rank that did not answer (it died, or left the run).
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.bytes_sent = 0

    def gather(self, tensor: torch.Tensor) -> Gathering:
        """Start to gather every rank's tensor (same shape and dtype on all); it must not change meanwhile."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self.bytes_sent += tensor.nbytes * (self.size - 1)
        with self.guard():
            work = dist.all_gather(gathered, tensor, group=self.group, async_op=True)
        return Gathering(self, tensor, gathered, work)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor (same shape and dtype on all), in order of rank."""
        return self.gather(tensor).wait()

    def send(self, tensor: torch.Tensor, dst: int) -> Transfer:
        """Start to send; the tensor must not change until the transfer is waited for."""
        self.bytes_sent += tensor.nbytes
        with self.guard(dst):
            return Transfer(self, dst, tensor, dist.isend(tensor, self.global_rank(dst), group=self.group))

    def receive(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Receive into ``tensor``, and return it. As `Transfer.wait`, it blocks the device's stream (with NCCL)."""
        with self.guard(src):
            dist.recv(tensor, self.global_rank(src), group=self.group)
        return tensor

    def global_rank(self, rank: int) -> int:
        """Number among all processes of a rank of the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @contextmanager
    def guard(self, peer: int | None = None) -> Iterator[None]:
        """Say which rank is missing when an exchange fails."""
        try:
            yield
        except RuntimeError as error:
            others = [peer] if peer not in (None, self.rank) else [r for r in range(self.size) if r != self.rank]
            names = " or ".join(str(self.global_rank(rank)) for rank in others)
            raise RuntimeError(
                f"hybrid-cond: rank {names} did not answer rank {self.global_rank(self.rank)}: it died, or left the "
                "run. Look for the first error in its log. (So it is with gloo, after the time that "
                "init_process_group(timeout=...) gives. NCCL has no such error: after that time it ends the process.)"
            ) from error


class Solo(Comm):
    """A group of one, for a process that plays every rank: nothing is sent."""

    def __init__(self) -> None:
        self.group, self.rank, self.size, self.bytes_sent = None, 0, 1, 0

    def gather(self, tensor: torch.Tensor) -> Gathering:
        return Gathering(self, tensor, [tensor], SimpleNamespace(wait=lambda: None))


def checksum(value: Any) -> torch.Tensor:
    """Order-sensitive checksum of the bits of every tensor in a nest: int64, shape [1], on the first tensor's device.

    Integer arithmetic, so that it does not depend on the order of summation and equal bits give equal sums.
    (`torch.hash_tensor` would not do: it combines by XOR, in which the two halves of a batch cancel.)
    """
    tensors = list(tensors_of(value))
    total = torch.zeros(1, dtype=torch.int64, device=tensors[0].device)
    count = 0
    for tensor in tensors:
        for piece in _bits(tensor).to(total.device).split(_MOST_NUMBERS):
            weights = torch.arange(2 * count + 1, 2 * (count + piece.numel()), 2, device=total.device)
            total += (piece * weights).sum()
            count += piece.numel()
    return total


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's bits in words of 64, or of less where its size asks for it: int64, 0-d, without a temporary."""
    flat = _flat(tensor)
    size = flat.numel() * flat.element_size()
    is_whole = size % 8 == 0 and flat.data_ptr() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return (flat.view(torch.int64) if is_whole else _bits(tensor)).sum(dtype=torch.int64)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return _flat(tensor).view(torch.int16 if tensor.element_size() > 1 else torch.uint8)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    # A tensor of one element counts as contiguous with any stride, with which its bits cannot be viewed.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
