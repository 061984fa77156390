"""Sequence parallelism within a branch: the ranks of a sequence group evaluate a branch, or stages of it, together.

Each of them has a shard of the image tokens, and all text tokens:

    pos_embed -> shard -> blocks (their attention exchanges) -> proj_out -> all tokens again

The latents, the predictions and every decision are whole, and the same bits, on all ranks: the group is one rank of the
strategy to everything else. The boundary between stages is made of shards and of all text, which the ranks of equal
place in the groups exchange. The attention itself is the host's (xDiT's Ulysses and ring).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import scaled_dot_product_attention

from ..ranks.comm import Comm
from .stages.anatomy import Anatomy

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SequenceParts(NamedTuple):
    """Where an SD3-type denoiser's image tokens begin and end, and the attentions in between.

    Attributes:
        embed: its output is all image tokens, [B, N, C].
        project: its output, of a shard, becomes the prediction of all, [B, N, C].
        attentions: the attention modules.
    """

    embed: nn.Module
    project: nn.Module
    attentions: list[Attention]


def sequence_parts(denoiser: Any) -> SequenceParts:
    """What sequence parallelism splits of a denoiser.

    Raises:
        ValueError: it is of another type.
    """
    try:
        pairs = [(block.attn, getattr(block, "attn2", None)) for block in denoiser.transformer_blocks]
        parts = denoiser.pos_embed, denoiser.proj_out, [attn for pair in pairs for attn in pair if attn]
    except AttributeError:
        raise ValueError(
            f"hybrid-cond: a {type(denoiser).__name__} has no sequence that it could split: drop --ulysses_degree and "
            "--ring_degree."
        ) from None
    return SequenceParts(*parts)


class SequenceSplit:
    """Splits the image tokens of a denoiser over a group.

    Args:
        comm: the sequence group.
        attention: ``attention(image, text)``, each a triple of query, key and value, [B, H, N / P, D] of this rank's
            shard and [B, H, S, D] of all text (or None); returns [B, H, N / P + S, D], text last. None where the
            denoiser's own forward splits its tokens and gathers its prediction, as those of xDiT do.
    """

    def __init__(self, comm: Comm, attention: Callable[[Heads, Heads | None], torch.Tensor] | None) -> None:
        self.comm = comm
        self.is_within = attention is None
        self._attention = attention
        self._undo: list[Callable[[], None]] = []

    def apply(self, anatomy: Anatomy) -> None:
        """Split from now on, until `remove`.

        Raises:
            ValueError: the denoiser works on no sequence, or an attention is not computed as diffusers' own SD3
                pipeline does.
        """
        parts = sequence_parts(anatomy.denoiser)
        odd = {type(attn.processor).__name__ for attn in parts.attentions} - {JointAttnProcessor2_0.__name__}
        if odd:
            raise ValueError(
                f"hybrid-cond: sequence parallelism takes JointAttnProcessor2_0, not {', '.join(sorted(odd))}: unload "
                "what put it there (fused projections, an IP-Adapter, PAG), or drop --ulysses_degree and --ring_degree."
            )
        anatomy.shards = self.comm.size
        self._undo.append(partial(setattr, anatomy, "shards", 1))

        def attend(image: Heads, text: Heads | None) -> torch.Tensor:
            return self._attend(
                image, text
            )  # not the method: graphs describe what a processor holds (`trees.describe`)

        for attn in parts.attentions:
            self._undo.append(partial(setattr, attn, "processor", attn.processor))
            attn.processor = _Processor(attend)  # type: ignore[assignment]
        self._undo.append(parts.embed.register_forward_hook(lambda module, args, tokens: self._shard(tokens)).remove)
        self._undo.append(parts.project.register_forward_hook(lambda module, args, tokens: self._whole(tokens)).remove)

    def remove(self) -> None:
        """Put everything back as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _shard(self, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        if count % self.comm.size:
            raise ValueError(
                f"hybrid-cond: {count} image tokens cannot be split over {self.comm.size} ranks: choose --height and "
                "--width such that they can, or lower --ulysses_degree or --ring_degree."
            )
        return tokens.chunk(self.comm.size, dim=1)[self.comm.rank].contiguous()

    def _whole(self, tokens: torch.Tensor) -> torch.Tensor:
        if isinstance(tokens, FakeTensor):  # the partition counts and measures one rank's shard, without exchanges
            return torch.cat([tokens] * self.comm.size, dim=1)
        return torch.cat(self.comm.all_gather(tokens.contiguous()), dim=1)

    def _attend(self, image: Heads, text: Heads | None) -> torch.Tensor:
        if isinstance(image[0], FakeTensor):
            query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True)) if text else image
            return scaled_dot_product_attention(query, key, value)
        assert self._attention is not None
        return self._attention(image, text)


class _Processor:
    """diffusers' ``JointAttnProcessor2_0`` with the attention given."""

    def __init__(self, attention: Callable[[Heads, Heads | None], torch.Tensor]) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def heads(tokens: torch.Tensor, projection: nn.Module, norm: nn.Module | None) -> torch.Tensor:
            split = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, H, N, D]
            return split if norm is None else norm(split)

        names = (("q", attn.norm_q), ("k", attn.norm_k), ("v", None))
        q, k, v = (heads(hidden_states, getattr(attn, f"to_{name}"), norm) for name, norm in names)
        text = None
        if encoder_hidden_states is not None:
            names = (("q", attn.norm_added_q), ("k", attn.norm_added_k), ("v", None))
            tq, tk, tv = (heads(encoder_hidden_states, getattr(attn, f"add_{name}_proj"), norm) for name, norm in names)
            text = tq, tk, tv
        out = self.attention((q, k, v), text).transpose(1, 2).flatten(2).to(q.dtype)  # [B, N (+ S), H * D]
        count = hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](out[:, :count]))
        if encoder_hidden_states is None:
            return image
        texts = out[:, count:]
        return image, texts if attn.context_pre_only else attn.to_add_out(texts)
