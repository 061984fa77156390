"""Text is encoded once: each branch's ranks encode their own, and the embeddings are exchanged.

    uncond's ranks   negative prompt -> text encoders \\
                                                       both embeddings, on every rank
    cond's ranks     prompt          -> text encoders /

A diffusers pipeline's `encode_prompt` encodes one after the other. Asked for the prompt alone, without guidance, it
encodes any text just as it would have among both: the results are the same bits.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..ranks.agreement import differing, disagreement, fingerprint
from ..ranks.comm import Comm, checksum
from ..trees import tensors_of

_NUMBERS = ("", "_2", "_3")  # of the text encoders; each may be given a text of its own
_TEXTS = [f"{negative}prompt{number}" for negative in ("", "negative_") for number in _NUMBERS]
_EMBEDS = [f"{negative}{pooled}prompt_embeds" for negative in ("", "negative_") for pooled in ("", "pooled_")]
_OPTIONS = ["lora_scale", "clip_skip", "max_sequence_length"]
_FAMILIAR = {*_TEXTS, *_EMBEDS, *_OPTIONS, "device", "num_images_per_prompt", "do_classifier_free_guidance"}

Arguments = dict[str, Any]


class Encoding:
    """Answers a pipeline's `check_inputs` and `encode_prompt`.

    The call of the pipeline, which every rank makes, goes from the one to the other. A user's own `encode_prompt` may
    be one rank's alone, so it is the pipeline's.

    Args:
        pipe: a diffusers pipeline. It is not kept alive.
        comm: the ranks, uncond's first, then cond's.
        across: the group that splits a branch's tokens, if one does.
    """

    def __init__(self, pipe: Any, comm: Comm, across: Comm | None) -> None:
        self._pipe, self.comm, self.across = weakref.ref(pipe), comm, across
        self._signature = inspect.signature(pipe.encode_prompt)
        self._is_called = False  # whether the pipeline's call comes to encode its prompts next

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._pipe()

    def check_inputs(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own."""
        self._is_called = False
        checked = original(*args, **kwargs)
        self._is_called = True
        return checked

    def encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the pipeline's own returns.

        Raises:
            RuntimeError: the ranks differ in their texts or text encoders, or encoding failed on one of them, where the
                error is its own.
        """
        if not self._is_called:
            return original(*args, **kwargs)
        self._is_called = False
        given = self._signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        own = _own(arguments, self.pipe.config, is_uncond=self.comm.rank < self.comm.size // 2)
        try:
            embeds = original(**own) if own else original(*args, **kwargs)
        except Exception as error:
            self._differing(arguments, own, type(error).__name__)  # the others wait for this
            raise
        made = own and [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors_of(embeds)]
        if names := self._differing(arguments, own, made):
            raise disagreement(names)
        return self._exchange(embeds[::2], _device(self.pipe, arguments)) if own else embeds

    def _differing(self, arguments: Arguments, own: Arguments | None, made: Any) -> list[str]:
        """Compare what was asked for and what came of it; also where nothing is split, for another rank may split."""
        # The embeddings would tell, had each rank made them; who is given them all needs no encoders.
        parts = [getattr(self.pipe, f"text_encoder{number}", None) for number in _NUMBERS if own]
        encoders = [fingerprint(part, _device(self.pipe, arguments)) for part in parts if part is not None]
        facts = {
            "guidance on or off (--guidance_scale)": bool(arguments.get("do_classifier_free_guidance")),
            "prompts (--prompt, --negative_prompt)": (
                own is None,
                [arguments.get(name) for name in (*_TEXTS, *_OPTIONS)],
                [arguments.get(name) is None for name in _EMBEDS],
            ),
            "text encoders or their adapters (--model)": checksum([torch.zeros(1), *encoders]),
            "embeddings (number of pictures, dtype, or an error that another rank's log tells)": made,
        }
        return differing(facts, self.comm, self.across, _device(self.pipe, arguments))

    def _exchange(self, embeds: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Of each of this branch's embeddings cond's and uncond's, in the order that pipelines return them in."""
        both: list[torch.Tensor] = []
        for tensor in embeds:
            gathered = self.comm.all_gather(tensor.to(device).contiguous())
            both += gathered[self.comm.size // 2], gathered[0]
        return tuple(both)


def _own(arguments: Arguments, config: Any, is_uncond: bool) -> Arguments | None:
    """A branch's own arguments of `encode_prompt`; None where every rank is to call it as it is.

    That is where there is no negative prompt to encode, where embeddings are given, and where the texts do not fit
    together, which is the pipeline's to say, on every rank.
    """
    prompt, negative = arguments.get("prompt"), arguments.get("negative_prompt")
    if (
        not arguments.keys() <= _FAMILIAR
        or not arguments.get("do_classifier_free_guidance")
        or any(arguments.get(name) is not None for name in _EMBEDS)
        or (negative is None and config.get("force_zeros_for_empty_prompt"))  # zeros, made of the prompt's
        or not isinstance(prompt, str | list)
    ):
        return None
    cond, uncond = _texts(arguments, ""), _texts(arguments, "negative_")
    # One text beside a list of prompts is repeated by SDXL and SD3; SD 1.5 refuses it, unless it is the default.
    if isinstance(prompt, list) and (negative is None or "prompt_2" in arguments):
        uncond = {name: [text] * len(prompt) if isinstance(text, str) else text for name, text in uncond.items()}
    if not all(_fits(text, prompt) for text in (*cond.values(), *uncond.values()) if text is not None):
        return None
    if "clip_skip" in arguments:
        uncond["clip_skip"] = None  # it is for the prompt
    return {**arguments, **(uncond if is_uncond else cond), "do_classifier_free_guidance": False}


def _fits(text: Any, prompt: str | list[str]) -> bool:
    """Whether a text is a string as the prompt, or a list of as many."""
    return isinstance(text, str) if isinstance(prompt, str) else isinstance(text, list) and len(text) == len(prompt)


def _texts(arguments: Arguments, negative: str) -> Arguments:
    """A branch's texts, by the prompt's names. What is empty is None, but for the first: then the first is taken."""
    texts = {f"prompt{n}": arguments.get(f"{negative}prompt{n}") or None for n in _NUMBERS if f"prompt{n}" in arguments}
    first = arguments.get(f"{negative}prompt")
    return {**texts, "prompt": "" if first is None else first}


def _device(pipe: Any, arguments: Arguments) -> torch.device:
    return torch.device(arguments.get("device") or pipe._execution_device)
