"""What must be the same on every rank, compared by one small exchange before anything is built on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from ..trees import modules_of
from .comm import Comm, Gathering, bit_sum, checksum

#: Sums of the weights of each module, as last seen, and the objects, places and versions that they were then.
_SUMS: WeakKeyDictionary[torch.nn.Module, tuple[Any, Any, torch.Tensor]] = WeakKeyDictionary()

#: Numbers that are read of a weight which lies elsewhere.
_FEW = 4096

#: Numbers in the exchange: a status, and one for each fact.
_SLOTS = 24
_HERE, _LEFT = 0, 1


class Gone(RuntimeError):
    """Another rank has ended its call before the first step. Every rank that had not raises it, at the same place."""


def compare(facts: dict[str, Any], comm: Comm, across: Comm | None, device: torch.device) -> Callable[[], list[str]]:
    """Start to compare facts; what waits for the other ranks, and tells which are not the same on all of them.

    What is exchanged has one size, whatever the facts are: ranks that differ cannot misread each other.

    Args:
        facts: by name, in the same order on all ranks. Those that are tensors are checksums, int64 [1] on any device,
            and are tensors on all ranks.
        comm: the ranks.
        across: a group of such groups (that split a branch's tokens), which must agree too.
        device: where the exchange takes place.

    Raises:
        Gone: a rank has left instead (`leave`).
    """
    # Sums of tensors are on the device, digests of the rest on the host: one copy.
    sums = {name: fact.to(device) for name, fact in facts.items() if isinstance(fact, torch.Tensor)}
    digests = {name: _digest(fact) for name, fact in facts.items() if name not in sums}
    padding = [0] * (_SLOTS - 1 - len(facts))
    rest = torch.tensor([*digests.values(), *padding, _HERE], device=device, dtype=torch.int64)
    sent = comm.gather(torch.cat([*sums.values(), rest]))
    return partial(_read, [*sums, *digests], sent, across)


def _read(names: list[str], sent: Gathering, across: Comm | None) -> list[str]:
    *values, statuses = _everywhere(sent, across).T.tolist()
    if any(status == _LEFT for status in statuses):
        raise Gone(
            "hybrid-cond: another rank ended its call with an error before the first step: look for it in its log."
        )
    return [name for name, value in zip(names, values, strict=False) if len(set(value)) > 1]


def leave(comm: Comm, across: Comm | None, device: torch.device) -> None:
    """Tell ranks that may be about to compare facts that this one is not going on."""
    _everywhere(comm.gather(torch.tensor([0] * (_SLOTS - 1) + [_LEFT], device=device)), across)


def _everywhere(sent: Gathering, across: Comm | None) -> torch.Tensor:
    gathered = torch.stack(sent.wait())  # [ranks, slots]
    return gathered if across is None else torch.cat(across.all_gather(gathered))


def disagreement(names: list[str]) -> RuntimeError:
    """The error to raise, on every rank, where these facts differ."""
    return RuntimeError(
        f"hybrid-cond: the ranks started with different {'; '.join(names)}. Start every rank with the same arguments."
    )


def fingerprint(module: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Checksum of all weights and buffers of a module: int64 [1].

    Every weight's bits are summed when it is first seen (and after a change that PyTorch counts), and its norm is taken
    each time, in one pass for all: adapters are fused into weights behind PyTorch's back. Weights that do not lie on
    ``device`` (because they are offloaded) are read at their beginning only, and those that are loaded when they are
    used are left out.
    """
    weights = [
        weight
        for part in modules_of(module)
        for weight in (*part._parameters.values(), *part._buffers.values())
        if weight is not None and not weight.is_meta and weight.numel()
    ]
    # By reference, of which an object has one as long as it is kept: a new weight may lie where one was that is gone.
    refs = [ref(weight) for weight in weights]
    state = [(id(kept), weight.data_ptr(), weight._version) for kept, weight in zip(refs, weights, strict=True)]
    _, known, sums = _SUMS.get(module, ([], None, torch.zeros(1, dtype=torch.int64, device=device)))
    if weights and (known != state or sums.device != device):
        sums = torch.stack([_sum_of(weight, device) for weight in weights])
        _SUMS[module] = refs, state, sums
    here: dict[torch.dtype, list[torch.Tensor]] = {}
    for weight in weights:
        if weight.device.type == device.type and weight.is_floating_point() and weight.element_size() > 1:
            here.setdefault(weight.dtype, []).append(weight.detach())
    norms = [
        torch.stack(torch._foreach_norm(same, 2, dtype=torch.promote_types(dtype, torch.float32)))
        for dtype, same in here.items()
    ]
    return checksum([sums, *norms])


def _sum_of(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    is_here = weight.device.type == device.type
    return bit_sum(weight if is_here else weight.flatten()[:_FEW].contiguous()).to(device)


def _digest(fact: Any) -> int:
    """63 bits of a value's text; the same in every process, unlike `hash`."""
    text = json.dumps(fact, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
