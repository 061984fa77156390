"""xDiT's sequence parallelism (Ulysses, ring, or both) inside a branch."""

from __future__ import annotations

import torch

from ..comm import Comm
from ..sequence import Heads, SequenceSplit
from .compat import import_xfuser

import_xfuser()

from xfuser.core.distributed import get_sp_group  # noqa: E402
from xfuser.model_executor.layers.usp import USP  # noqa: E402


def sequence_split() -> SequenceSplit | None:
    """A split over xDiT's sequence group, by xDiT's attention; None where the group has one rank."""
    group = get_sp_group()
    return SequenceSplit(Comm(group.device_group), _attend) if group.world_size > 1 else None


def _attend(image: Heads, text: Heads | None) -> torch.Tensor:
    # Text tokens are on all ranks and come last: xDiT's "rear" joint tensors.
    joint = dict(zip(("joint_query", "joint_key", "joint_value"), text, strict=True)) if text else {}
    return USP(*image, **joint, joint_strategy="rear" if text else None)
