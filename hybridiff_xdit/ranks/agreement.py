"""What must be the same on every rank, compared by one small exchange before anything is built on it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..trees import modules_of
from .comm import Comm, bit_sum, checksum

#: Numbers that are read of a weight which lies elsewhere.
_FEW = 4096

#: Numbers in the exchange: a status, and one for each fact.
_SLOTS = 24
_HERE, _LEFT = 0, 1


def differing(facts: dict[str, Any], comm: Comm, across: Comm | None, device: torch.device) -> list[str]:
    """Names of the facts that are not the same on every rank; the same answer on all of them.

    What is exchanged has one size, whatever the facts are: ranks that differ cannot misread each other.

    Args:
        facts: by name, in the same order on all ranks. Those that are tensors are checksums, int64 [1] on any device,
            and are tensors on all ranks.
        comm: the ranks.
        across: a group of such groups (that split a branch's tokens), which must agree too.
        device: where the exchange takes place.

    Raises:
        RuntimeError: a rank has left instead (`leave`).
    """
    # Sums of tensors are on the device, digests of the rest on the host: one copy.
    sums = {name: fact.to(device) for name, fact in facts.items() if isinstance(fact, torch.Tensor)}
    digests = {name: _digest(fact) for name, fact in facts.items() if name not in sums}
    padding = [0] * (_SLOTS - 1 - len(facts))
    rest = torch.tensor([*digests.values(), *padding, _HERE], device=device, dtype=torch.int64)
    *values, statuses = _gather(torch.cat([*sums.values(), rest]), comm, across).T.tolist()
    if any(status == _LEFT for status in statuses):
        raise RuntimeError(
            "hybrid-cond: another rank ended its call with an error before the first step: look for it in its log."
        )
    return [name for name, value in zip([*sums, *digests], values, strict=False) if len(set(value)) > 1]


def leave(comm: Comm, across: Comm | None, device: torch.device) -> None:
    """Tell ranks that may be about to compare facts that this one is not going on."""
    _gather(torch.tensor([0] * (_SLOTS - 1) + [_LEFT], device=device), comm, across)


def _gather(mine: torch.Tensor, comm: Comm, across: Comm | None) -> torch.Tensor:
    gathered = torch.stack(comm.all_gather(mine))  # [ranks, slots]
    return gathered if across is None else torch.cat(across.all_gather(gathered))


def disagreement(names: list[str]) -> RuntimeError:
    """The error to raise, on every rank, where these facts differ."""
    return RuntimeError(
        f"hybrid-cond: the ranks started with different {'; '.join(names)}. Start every rank with the same arguments."
    )


def fingerprint(module: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Checksum of all weights and buffers of a module: int64 [1].

    Those that do not lie on ``device`` (because they are offloaded) are read at their beginning only, and those that
    are loaded when they are used are left out.
    """
    sums = []
    for part in modules_of(module):
        for weight in (*part._parameters.values(), *part._buffers.values()):
            if weight is not None and not weight.is_meta:
                is_here = weight.device.type == device.type
                sums.append(bit_sum(weight if is_here else weight.flatten()[:_FEW].contiguous()).to(device))
    return checksum(torch.stack(sums) if sums else torch.zeros(1, device=device))


def _digest(fact: Any) -> int:
    """63 bits of a value's text; the same in every process, unlike `hash`."""
    text = json.dumps(fact, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
