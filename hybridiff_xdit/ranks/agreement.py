"""What must be the same on every rank, compared by one small exchange before anything is built on it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ..trees import modules_of
from .comm import Comm, checksum


def differing(facts: dict[str, Any], comm: Comm, across: Comm | None, device: torch.device) -> list[str]:
    """Names of the facts that are not the same on every rank; the same answer on all of them.

    What is exchanged has eight bytes a fact, whatever the facts are: ranks that differ cannot misread each other.

    Args:
        facts: by name, in the same order on all ranks. Those that are tensors are checksums, int64 [1] on any device,
            and are tensors on all ranks.
        comm: the ranks.
        across: a group of such groups (that split a branch's tokens), which must agree too.
        device: where the exchange takes place.
    """
    # Sums of tensors are on the device, digests of the rest on the host: one copy.
    sums = {name: fact.to(device) for name, fact in facts.items() if isinstance(fact, torch.Tensor)}
    digests = {name: _digest(fact) for name, fact in facts.items() if name not in sums}
    mine = torch.cat([*sums.values(), torch.tensor(list(digests.values()), device=device, dtype=torch.int64)])
    gathered = torch.stack(comm.all_gather(mine))  # [ranks, facts]
    if across is not None:
        gathered = torch.cat(across.all_gather(gathered))
    values = zip([*sums, *digests], gathered.T.tolist(), strict=True)
    return [name for name, value in values if len(set(value)) > 1]


def disagreement(names: list[str]) -> RuntimeError:
    """The error to raise, on every rank, where these facts differ."""
    return RuntimeError(
        f"hybrid-cond: the ranks started with different {'; '.join(names)}. Start every rank with the same arguments."
    )


def fingerprint(module: torch.nn.Module) -> torch.Tensor:
    """Checksum of how many weights a module has, and of the first 4096 numbers of the first and of the last of them.

    int64 [1]. Weights that are loaded when they are used cannot be read, and are left out.
    """
    weights = [weight for part in modules_of(module) for weight in part._parameters.values() if weight is not None]
    ends = [weight.flatten()[:4096] for weight in (weights[0], weights[-1]) if not weight.is_meta]
    return checksum((*ends, torch.tensor([len(weights)])))


def _digest(fact: Any) -> int:
    """63 bits of a value's text; the same in every process, unlike `hash`."""
    text = json.dumps(fact, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
