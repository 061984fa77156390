"""What keeps the streams of a step from being evaluated apart, or before the pipeline asks for them."""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Any

from torch import nn

from ..trees import describe, modules_of

#: Whose attention processors are known to keep the samples of a batch apart.
_KNOWN = ("diffusers", "xfuser", "hybridiff_xdit")
#: Where processors are that keep what they see for the pipeline (SAG, Attend-and-Excite, LEDITS++), or have the frames
#: of a batch see one another (Text2Video-Zero).
_STORING = "diffusers.pipelines."
#: Denoisers that evaluate the samples of a batch apart, as was tried. Of others, a run tries it.
_APART = {
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "EasyAnimateTransformer3DModel",
    "HunyuanDiT2DModel",
    "I2VGenXLUNet",
    "LTX2VideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LatteTransformer3DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "PRXTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
    "StableAudioDiTModel",
    "UNet2DConditionModel",
    "UNet3DConditionModel",
    "UNetMotionModel",
    "ZImageTransformer2DModel",
}
#: Those that do not: OmniGen gives all the first one's positions, HiDream takes texts with the batch in another place.
_SEEING = {"OmniGenTransformer2DModel", "HiDreamImageTransformer2DModel"}


class Coupling(Enum):
    """Whether the samples of a batch may see one another."""

    NONE = "none"
    UNKNOWN = "unknown"  #: an attention processor of somebody's own: to be tried out
    SEEING = "seeing"  #: the denoiser evaluates its samples together
    COUPLED = "coupled"  #: perturbed-attention guidance, whose processors cut the batch themselves
    STORING = "storing"  #: of the whole batch something is kept, which the pipeline reads before its next call


def coupling_of(denoiser: nn.Module) -> Coupling:
    """What is known of a denoiser and its attention processors."""
    found = Coupling.SEEING if _SEEING & _names(denoiser) else Coupling.NONE
    for _, processor in attention_of(denoiser):
        if "PAG" in type(processor).__name__:
            return Coupling.COUPLED
        if type(processor).__module__.startswith(_STORING):
            return Coupling.STORING
        if _is_own(processor) and found is Coupling.NONE:
            found = Coupling.UNKNOWN
    return found


def is_apart(denoiser: nn.Module) -> bool:
    """Whether the denoiser is known to evaluate the samples of a batch apart, by its class."""
    return bool(_APART & _names(denoiser))


def _names(denoiser: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(getattr(denoiser, "_orig_mod", denoiser)).__mro__}


def memory_of(denoiser: nn.Module) -> Hashable:
    """What attention processors of somebody's own keep: equal where an evaluation has left nothing there."""
    own = [processor for _, processor in attention_of(denoiser) if _is_own(processor)]
    return describe(own, lambda tensor: (id(tensor), tensor._version), otherwise=id)


def _is_own(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] not in _KNOWN


def state_of(denoiser: nn.Module) -> Hashable:
    """What a pipeline may change of a denoiser between two calls of a step: hooks, processors and adapters in use.

    A guider that skips layers for one stream (skip-layer, perturbed-attention, auto-guidance) hooks the blocks before
    that call and unhooks them after it.
    """
    state: list[Any] = []
    module: Any
    for module in modules_of(denoiser):
        own = vars(module)
        registry = own.get("_diffusers_hook")
        if registry is not None:
            state += [id(module), *(id(hook) for hook in registry.hooks.values())]
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            state += [id(module), *own["_forward_hooks"], *own["_forward_pre_hooks"]]
        if "processor" in own or "processor" in own["_modules"]:
            state.append(id(module.processor))
        if "scaling" in own:
            state.append((repr(own["scaling"]), repr(own.get("_active_adapter")), own.get("_disable_adapters")))
    return tuple(state)


def moving_weights(denoiser: nn.Module) -> list[str]:
    """Names of the hooks that bring or cast the denoiser's weights when one of its modules is called."""
    found: set[str] = set()
    for module in modules_of(denoiser):
        own: dict[str, Any] = vars(module)
        if "_diffusers_hook" in own:
            found |= own["_diffusers_hook"].hooks.keys()
        if (weights := own["_parameters"]) and any(
            weight is not None and weight.is_meta for weight in weights.values()
        ):
            found.add("offloading")
    return sorted(found)


def settings_of(denoiser: nn.Module) -> list[str]:
    """Adapters in use with their scales, attention processors with their constants, and such hooks, as text."""
    found = moving_weights(denoiser)
    for module in modules_of(denoiser):
        own = vars(module)
        if "scaling" in own:
            found.append(repr([own.get(name) for name in ("scaling", "_active_adapter", "_disable_adapters")]))
        if (processor := _processor_in(own)) is not None:
            constants = vars(processor).items()
            scales = {name: value for name, value in constants if isinstance(value, float | int | list | str)}
            found.append(f"{type(processor).__name__} {scales}")
    return found


def attention_of(denoiser: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The modules that have an attention processor, each with it."""
    found = []
    for module in modules_of(denoiser):
        if (processor := _processor_in(vars(module))) is not None:
            found.append((module, processor))
    return found


def _processor_in(own: dict[str, Any]) -> Any:
    """The attention processor among a module's own attributes, if it has one.

    Asking the module itself (``hasattr``) takes twice as long.
    """
    return own.get("processor") or own["_modules"].get("processor")
