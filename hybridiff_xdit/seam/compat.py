"""Where we touch diffusers beyond its documented classes: the ledger of every name we rely on.

Features are detected, versions are not compared: the ledger's test (tests/test_compat.py) checks each name, with the
parameters we pass, against the lowest and the newest diffusers that we support. `xdit.compat` has a ledger of xfuser's
names, of the same kind. Nothing here imports either.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple


class Seam(NamedTuple):
    """One name of another package that we read, call, override or replace.

    Attributes:
        module: where it is.
        name: dotted name in the module. The last part may be an attribute that a method of the class sets.
        parameters: those that we pass, or that our override receives; None where it is no function.
        why: what we do with it.
        until: what upstream change would let us drop it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None
    why: str
    until: str


def missing(ledger: Iterable[Seam]) -> list[str]:
    """What the installed packages lack of a ledger, one line a name; empty when all is there."""
    return [problem for seam in ledger if (problem := _problem(seam))]


def _problem(seam: Seam) -> str | None:
    where = f"{seam.module}.{seam.name}"
    *path, last = seam.name.split(".")
    try:
        owner: Any = importlib.import_module(seam.module)
        for part in path:
            owner = getattr(owner, part)
        if not hasattr(owner, last) and inspect.isclass(owner) and _sets(owner, last):
            return None
        value = getattr(owner, last)
    except (ImportError, AttributeError) as error:
        return f"{where}: {error}"
    if seam.parameters is None:
        return None
    absent = set(seam.parameters) - set(inspect.signature(value).parameters)
    return f"{where}: no parameter {', '.join(sorted(absent))}" if absent else None


def _sets(cls: type, name: str) -> bool:
    """Whether a method of the class sets an attribute of this name."""
    functions = (inspect.unwrap(value) for base in cls.__mro__ for value in vars(base).values())
    return any(
        instruction.opname == "STORE_ATTR" and instruction.argval == name
        for function in functions
        if inspect.isfunction(function)
        for instruction in dis.get_instructions(function)
    )


_ATTENTION = "diffusers.models.attention_processor"
_BLOCKS = "diffusers.models.attention"
_UNETS = "diffusers.models.unets.unet_2d_blocks"

_NEVER = "public API, no end in sight"
_STATE = "a pipeline tells by public names how a call went"
_TOKENS = "diffusers' context parallelism has a plan for SD3"
_STAGES = "a denoiser of diffusers can be evaluated in parts"

LEDGER = (
    # A pipeline and its call.
    Seam("diffusers", "DiffusionPipeline._execution_device", None, "where a call puts its tensors", _STATE),
    Seam("diffusers", "DiffusionPipeline.progress_bar", (), "watched: each step's kind is shown on the bar", _NEVER),
    Seam("diffusers", "DiffusionPipeline.name_or_path", None, "names the model in the report", _NEVER),
    Seam("diffusers", "DiffusionPipeline.load_config", ("pretrained_model_name_or_path",), "class by hub id", _NEVER),
    *(
        seam
        for pipeline in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "WanPipeline")
        for seam in (
            Seam("diffusers", f"{pipeline}._num_timesteps", None, "hint of the number of steps", _STATE),
            Seam("diffusers", f"{pipeline}._interrupt", None, "whether a callback ended the run", _STATE),
            Seam(
                "diffusers",
                f"{pipeline}.__call__",
                ("callback_on_step_end", "guidance_scale", "num_inference_steps", "output_type", "generator"),
                "its arguments are compared between ranks; a callback may change w",
                _NEVER,
            ),
        )
    ),
    *(
        Seam("diffusers", f"{pipeline}.vae_scale_factor", None, "noise of all pictures, before they are dealt", _STATE)
        for pipeline in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline")
    ),
    Seam(
        "diffusers.utils.torch_utils",
        "randn_tensor",
        ("shape", "generator", "device", "dtype"),
        "draws that noise as a pipeline does",
        _NEVER,
    ),
    Seam(
        "diffusers.utils.torch_utils",
        "get_device",
        (),
        "asked before xfuser is imported as on MPS, where there is no GPU: diffusers may keep the answer",
        "xDiT runs on the CPU by itself",
    ),
    Seam("diffusers.utils.logging", "tqdm", None, "replaced while a pipeline is loaded: one bar in all", _STATE),
    # A scheduler.
    *(
        seam
        for scheduler in ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler")
        for seam in (
            Seam("diffusers", f"{scheduler}.set_timesteps", ("num_inference_steps",), "watched: a run begins", _NEVER),
            Seam(
                "diffusers",
                f"{scheduler}.step",
                ("model_output", "timestep", "sample", "return_dict"),
                "watched: a step ends; run on a copy",
                _NEVER,
            ),
        )
    ),
    Seam("diffusers", "FlowMatchEulerDiscreteScheduler.begin_index", None, "image-to-image begins here", _NEVER),
    Seam("diffusers", "DDIMScheduler.scale_model_input", (), "called on a copy", _NEVER),
    Seam(
        "diffusers",
        "CogVideoXDPMScheduler.step",
        ("old_pred_original_sample", "timestep_back"),
        "the caller keeps its history: ours does so for the copy",
        "it keeps its history itself",
    ),
    # A denoiser, whichever it is.
    Seam("diffusers.models.cache_utils", "CacheMixin.cache_context", ("name",), "watched: it names a call", _NEVER),
    Seam("diffusers.hooks", "HookRegistry._diffusers_hook", None, "looked up in a module: its registry", _STATE),
    Seam("diffusers.hooks", "HookRegistry.hooks", None, "whether a module is cached, cast or offloaded", _STATE),
    Seam(
        "diffusers.models.attention_dispatch",
        "_AttentionBackendRegistry.get_active_backend",
        (),
        "a CUDA graph holds for one attention backend",
        "the active backend can be asked for by a public name",
    ),
    Seam(_ATTENTION, "Attention.processor", None, "which attention it is; it is exchanged where tokens split", _NEVER),
    Seam(
        _ATTENTION,
        "PAGCFGIdentitySelfAttnProcessor2_0",
        None,
        "known by PAG in its name: it cuts the batch itself",
        "an attention processor tells whether it does",
    ),
    Seam("diffusers.utils", "USE_PEFT_BACKEND", None, "whether there are LoRA layers to scale", _STAGES),
    Seam("diffusers.utils", "scale_lora_layers", ("model", "weight"), "as the denoiser's forward does", _STAGES),
    Seam("diffusers.utils", "unscale_lora_layers", ("model", "weight"), "the same", _STAGES),
    # SD3's.
    Seam(
        "diffusers",
        "SD3Transformer2DModel.forward",
        ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
        "its cost is counted, and its presets are its own (by the class's name)",
        _NEVER,
    ),
    Seam("diffusers", "SD3Transformer2DModel", ("patch_size", "in_channels", "sample_size"), "read of config", _NEVER),
    *(
        Seam("diffusers", f"SD3Transformer2DModel.{part}", None, "its tokens are split there", _TOKENS)
        for part in ("pos_embed", "transformer_blocks", "proj_out")
    ),
    Seam(_BLOCKS, "JointTransformerBlock", None, "compiled", _NEVER),
    Seam(_BLOCKS, "JointTransformerBlock.attn", None, "its tokens are split", _TOKENS),
    Seam(_BLOCKS, "JointTransformerBlock.attn2", None, "the same", _TOKENS),
    Seam(
        _ATTENTION,
        "JointAttnProcessor2_0.__call__",
        ("attn", "hidden_states", "encoder_hidden_states", "attention_mask"),
        "ours stands in for it where tokens are split",
        _TOKENS,
    ),
    *(
        Seam(_ATTENTION, f"Attention.{part}", None, "used by ours", _TOKENS)
        for part in (
            *("heads", "context_pre_only", "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k"),
            *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
        )
    ),
    # U-Nets, in stages.
    Seam(
        "diffusers",
        "UNet2DConditionModel.forward",
        (
            *("sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond"),
            *("cross_attention_kwargs", "added_cond_kwargs"),
        ),
        "the arguments of its stages",
        _STAGES,
    ),
    Seam("diffusers", "UNet2DConditionModel", ("center_input_sample", "class_embeddings_concat"), "read", _NEVER),
    *(
        Seam("diffusers", f"UNet2DConditionModel.{part}", parameters, "evaluated as a stage's part", _STAGES)
        for part, parameters in {
            **dict.fromkeys(("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act")),
            **dict.fromkeys(("conv_out", "num_upsamplers", "time_embedding", "time_embed_act")),
            "get_time_embed": ("sample", "timestep"),
            "get_class_embed": ("sample", "class_labels"),
            "get_aug_embed": ("emb", "encoder_hidden_states", "added_cond_kwargs"),
            "process_encoder_hidden_states": ("encoder_hidden_states", "added_cond_kwargs"),
        }.items()
    ),
    *(
        Seam(_UNETS, f"{block}.{part}", None, "evaluated one by one", _STAGES)
        for block, parts in {
            "DownBlock2D": ("resnets", "downsamplers"),
            "CrossAttnDownBlock2D": ("resnets", "attentions", "downsamplers"),
            "UpBlock2D": ("resnets", "upsamplers"),
            "CrossAttnUpBlock2D": ("resnets", "attentions", "upsamplers"),
        }.items()
        for part in parts
    ),
    Seam(
        _UNETS,
        "UNetMidBlock2DCrossAttn.forward",
        ("hidden_states", "temb", "encoder_hidden_states", "cross_attention_kwargs"),
        "evaluated whole",
        _STAGES,
    ),
    Seam(
        "diffusers",
        "Transformer2DModel.forward",
        ("hidden_states", "encoder_hidden_states", "cross_attention_kwargs", "return_dict"),
        "evaluated as a block's attention",
        _STAGES,
    ),
    Seam("diffusers.models.resnet", "ResnetBlock2D.forward", ("input_tensor", "temb"), "evaluated", _STAGES),
    Seam("diffusers.models.upsampling", "Upsample2D.forward", ("hidden_states", "output_size"), "evaluated", _STAGES),
    Seam("diffusers", "UNet2DConditionModel.enable_freeu", ("s1",), "sets s1 of a block: it is refused", _STAGES),
    Seam(_BLOCKS, "BasicTransformerBlock", None, "compiled", _NEVER),
)


def check_ledger() -> list[str]:
    """What is missing from the installed diffusers, as `missing` tells it."""
    return missing(LEDGER)
