"""Bytes between the ranks of a server, and how a rank learns that another has ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist

#: A server may be idle for as long as this. That a rank has ended is noticed by `Messages.watch`.
_IDLE = timedelta(days=365)


class Messages:
    """Two gloo groups of all processes. All of them must make it at the same time.

    Raises:
        RuntimeError: from any message, the other rank has ended.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_IDLE)
        self._watching = dist.new_group(backend="gloo", timeout=_IDLE)

    def watch(self, lost: Callable[[int], None]) -> None:
        """Have a function called, from another thread, when the process of a rank ends.

        The first rank watches all others, and these watch the first.
        """
        for peer in range(1, self.size) if self.rank == 0 else [0]:
            Thread(target=self._wait_for_end, args=(peer, lost), daemon=True).start()

    def _wait_for_end(self, peer: int, lost: Callable[[int], None]) -> None:
        with suppress(RuntimeError):  # nobody ever sends: it ends when the connection does, with the process
            dist.recv(torch.empty(1), peer, group=self._watching)
        lost(peer)

    def tell(self, data: bytes = b"") -> bytes:
        """The first rank's bytes, on every rank."""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._group)
        sent = _tensor(data) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(sent, 0, group=self._group)
        return sent.numpy().tobytes()

    def send(self, data: bytes) -> None:
        """Send bytes to the first rank."""
        dist.send(torch.tensor([len(data)]), 0, group=self._group)
        if data:
            dist.send(_tensor(data), 0, group=self._group)

    def receive(self, rank: int) -> bytes:
        """The bytes that a rank sends to the first."""
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank, group=self._group)
        data = torch.empty(int(size), dtype=torch.uint8)
        if size:
            dist.recv(data, rank, group=self._group)
        return data.numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
