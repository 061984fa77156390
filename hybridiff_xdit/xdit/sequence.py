"""xDiT's sequence parallelism (Ulysses, ring, or both) inside a branch."""

from __future__ import annotations

import torch

from ..evaluate.tokens import Heads, SequenceSplit
from ..ranks.comm import Comm
from .compat import attention_types, import_xfuser

import_xfuser()

from xfuser.core.distributed import get_ring_parallel_world_size, get_runtime_state, get_sp_group  # noqa: E402
from xfuser.model_executor.layers.usp import USP  # noqa: E402

AttentionBackendType = attention_types()

#: xDiT's attentions that take float32 on a GPU. Its own choice without flash-attn, cuDNN's, would return nan.
_TAKE_FLOAT32 = (AttentionBackendType.SDPA, AttentionBackendType.SDPA_MATH, AttentionBackendType.SDPA_EFFICIENT)


def sequence_split(splits: bool = False) -> SequenceSplit | None:
    """A split over xDiT's sequence group, by xDiT's attention; None where the group has one rank.

    Args:
        splits: whether the denoiser is one of xDiT's, which splits its tokens itself.
    """
    group = get_sp_group()
    return SequenceSplit(Comm(group.device_group), None if splits else _attend) if group.world_size > 1 else None


def check_attention(device: torch.device, dtype: torch.dtype) -> None:
    """Check that xDiT's attention can work on a denoiser's tokens.

    Raises:
        ValueError: they are float32, on a GPU, and the attention takes half precision alone; or ring attention is to
            merge its outputs, and it gives no more than these.
    """
    backend, is_ring = get_runtime_state().attention_backend, get_ring_parallel_world_size() > 1
    if backend == AttentionBackendType.SDPA and is_ring:
        raise ValueError(
            "hybrid-cond: ring attention cannot merge what xDiT's attention SDPA returns: add --attention_backend "
            "sdpa_flash, or split the tokens by --ulysses_degree."
        )
    if device.type == "cuda" and dtype == torch.float32 and backend not in _TAKE_FLOAT32:
        raise ValueError(
            f"hybrid-cond: the denoiser is float32, which xDiT's attention {backend.name} does not take: load it with "
            "torch_dtype=torch.float16 or bfloat16, or add --attention_backend sdpa"
            f"{' and split the tokens by --ulysses_degree alone' if is_ring else ''}."
        )


def _attend(image: Heads, text: Heads | None) -> torch.Tensor:
    check_attention(image[0].device, image[0].dtype)
    # Text tokens are on all ranks and come last: xDiT's "rear" joint tensors.
    joint = dict(zip(("joint_query", "joint_key", "joint_value"), text, strict=True)) if text else {}
    return USP(*image, **joint, joint_strategy="rear" if text else None)
