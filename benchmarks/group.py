"""Joining the process group that torchrun describes: a GPU a process with NCCL, or the CPU with gloo.

Processes that outnumber the GPUs share them, and exchange through the host's memory: NCCL allows one process a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hybridiff_xdit.evaluate.tokens import SequenceSplit
from hybridiff_xdit.ranks.comm import Comm, Gathering, Transfer
from hybridiff_xdit.xdit.compat import import_xfuser


def join() -> torch.device:
    """Initialise the default group; return this rank's device, made the current one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo" if gpus_are_shared() else "nccl")
    return device


def gpus_are_shared() -> bool:
    """Whether there are more processes on this machine than GPUs."""
    return 0 < torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"])


class Place(NamedTuple):
    """Where this rank stands among N: in one of N / 2 pairs of branches, and in one of two groups that split a branch.

    Attributes:
        pair: this rank and the one of equal place in the other branch.
        first: whether that is the first pair.
    """

    pair: dist.ProcessGroup
    first: bool

    @classmethod
    def of(cls) -> Place:
        """Of all ranks; the first half is uncond, the second cond, as in xDiT."""
        size = dist.get_world_size()
        if size == 1:
            return cls(dist.group.WORLD, True)
        if size % 2:
            raise SystemExit(f"{size} processes: use an even --nproc_per_node, one process a branch or more.")
        pairs = [dist.new_group([i, i + size // 2]) for i in range(size // 2)]
        place = dist.get_rank() % (size // 2)
        return cls(pairs[place], place == 0)


class ThroughHost(Comm):
    """Exchanges tensors of GPUs by gloo, through the host's memory: slowly, and waiting for the GPU each time."""

    def gather(self, tensor: torch.Tensor) -> Gathering:
        on_host = super().gather(tensor.cpu()).wait()
        return Gathering(self, tensor, [part.to(tensor.device) for part in on_host], _Done())

    def send(self, tensor: torch.Tensor, dst: int) -> Transfer:
        return super().send(tensor.cpu(), dst)

    def receive(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        return tensor.copy_(super().receive(torch.empty_like(tensor, device="cpu"), src))


class Alone(Comm):
    """One rank of two whose peer is not there.

    In place of the peer's prediction stands this rank's own of the FULL step before: it is near, as the peer's would
    be, and it differs, so that a policy has something to measure. Other tensors are this rank's, or zeros.
    """

    def __init__(self, rank: int) -> None:
        self.group, self.rank, self.size, self.bytes_sent = None, rank, 2, 0
        self._before: torch.Tensor | None = None

    def gather(self, tensor: torch.Tensor) -> Gathering:
        self.bytes_sent += tensor.nbytes
        if tensor.dtype != torch.uint8:
            return Gathering(self, tensor, [tensor, tensor], _Done())
        before, self._before = self._before, tensor
        peer = tensor if before is None else torch.cat([tensor[:16], before[16:]])  # the header is a checksum of inputs
        return Gathering(self, tensor, [peer, tensor] if self.rank else [tensor, peer], _Done())

    def send(self, tensor: torch.Tensor, dst: int) -> Transfer:
        self.bytes_sent += tensor.nbytes
        return Transfer(self, dst, tensor, _Done())

    def receive(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        return tensor.zero_()


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""


def xdit_config(**flags: Any) -> Any:
    """xDiT's configuration of all processes by its flags. Groups of another one are gone: xDiT has one at a time."""
    xfuser: Any = import_xfuser()
    from xfuser.core import distributed

    parallel_state: Any = distributed.parallel_state
    if parallel_state._WORLD is None:
        distributed.init_distributed_environment(backend=dist.get_backend())
    if distributed.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    engine_config, _ = xfuser.xFuserArgs(model="", **flags).create_config()
    return engine_config


#: That may split a branch, in xDiT's order.
AXES = ("ulysses", "ring", "stages")


def branches(ways: Collection[str]) -> int:
    """That have ranks, of a strategy run in these ways (`run.py`)."""
    return 1 if "rank 0" in ways or "rank 1" in ways else 2


def degrees(ways: Collection[str], processes: int) -> dict[str, int]:
    """Ranks of a branch along each of the `AXES` that split it: all along one; of several, two each."""
    axes = [axis for axis in AXES if axis in ways]
    return dict.fromkeys(axes, processes // branches(ways) if len(axes) == 1 else 2)


def split_branches(
    pipe: Any, degrees: dict[str, int], branches: int
) -> tuple[SequenceSplit | None, dist.ProcessGroup | None]:
    """The split of a branch's tokens, on xDiT's groups, and the ranks of equal place in it; None: nothing is split.

    Args:
        degrees: see `degrees`.
        branches: how many have ranks: with one, all ranks are that branch's.
    """
    if not degrees:
        return None, None
    ulysses, ring, layers = (degrees.get(axis, 1) for axis in AXES)
    sequence = None
    if ulysses * ring > 1:
        flags = dict(ulysses_degree=ulysses, ring_degree=ring, pipefusion_parallel_degree=layers)
        sequence = split_tokens(pipe, use_cfg_parallel=branches == 2, **flags)
    from hybridiff_xdit.xdit.groups import stage_ranks

    ranks = stage_ranks(dist.get_world_size(), branches * layers, ulysses * ring)
    return sequence, dist.new_subgroups_by_enumeration(ranks)[0]


def split_tokens(pipe: Any, **flags: Any) -> SequenceSplit | None:
    """A split of a branch's tokens as xDiT's flags say, on xDiT's groups made for them; None where they say none."""
    engine_config = xdit_config(**flags)
    from hybridiff_xdit.xdit.sequence import sequence_split

    from xfuser.core import distributed  # isort: skip

    distributed.initialize_runtime_state(pipe, engine_config)
    return sequence_split()


def split_decoder(vae: Any, ranks: dist.ProcessGroup) -> None:
    """Split a VAE's decoder over a group of ranks, by DistVAE as xDiT has it; it is another module from then on."""
    from distvae.vae.parallel import parallelize_decoder

    parallelize_decoder(vae, ranks)
