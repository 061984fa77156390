"""Where we touch xDiT: how to import it without a GPU, and the ledger of every name we rely on.

Features are detected, versions are not compared: the ledger's test (tests/test_xdit_compat.py) checks each name, with
the parameters we pass, against xfuser 0.5, 0.6 and 0.7. `seam.compat` has the ledger of diffusers' names.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..seam.compat import Seam, missing

#: Of what stands in for xfuser's names where there is no GPU.
_UNDO = ExitStack()


def has_accelerator() -> bool:
    """Whether torch has a device other than the CPU."""
    return torch.accelerator.is_available()


def count_gpus() -> int:
    """Accelerators of this machine. On CUDA this asks the driver's library and leaves CUDA itself untouched."""
    return torch.cuda.device_count() or torch.accelerator.device_count()


def import_xfuser() -> ModuleType:
    """Import xfuser; on a machine without a GPU make it run there, with gloo.

    Importing xfuser 0.5 to 0.7 asks for the version of "the" accelerator, and raises without one. It asks nothing
    further of Apple's MPS, so MPS stands in during the import, and only then.
    """
    if has_accelerator():
        return importlib.import_module("xfuser")
    from diffusers.utils.torch_utils import get_device

    get_device()  # diffusers may keep the first answer, which must not be MPS
    with _pretend_mps():
        xfuser = importlib.import_module("xfuser")
    envs: Any = importlib.import_module("xfuser.envs")
    restore_xfuser()
    # A CUDA build of torch on a machine without a GPU is no CUDA machine.
    _replace(envs, "_is_cuda", lambda: False)
    _replace(envs, "get_torch_distributed_backend", lambda: "gloo")
    _let_sequences_split()
    return xfuser


def flags_of_xdit() -> set[str]:
    """Every flag that xDiT's parsers name, read from their source: importing them takes seconds.

    Raises:
        ValueError: xDiT is not installed.
    """
    return set(re.findall(r'"(--\w+)"', (_folder_of_xdit() / "config" / "args.py").read_text()))


def models_of_xdit() -> set[str]:
    """Every name of a model of xDiT's runner, read likewise. Raises as `flags_of_xdit`."""
    files = (_folder_of_xdit() / "model_executor" / "models" / "runner_models").glob("*.py")
    return {name for file in files for name in re.findall(r'@register_model\("([^"]+)"\)', file.read_text())}


def _folder_of_xdit() -> Path:
    spec = importlib.util.find_spec("xfuser")
    if spec is None or spec.origin is None:
        raise ValueError("--parallel needs xDiT: pip install hybridiff_xdit[xdit].")
    return Path(spec.origin).parent


def restore_xfuser() -> None:
    """Put back xfuser's own names. (Without a GPU, little of it works with these.)"""
    _UNDO.close()


def _replace(owner: Any, name: str, value: Any) -> None:
    _UNDO.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _let_sequences_split() -> None:
    """Let xDiT's sequence parallelism run on the CPU: its exchanges are plain collectives, which gloo has.

    xDiT takes yunchang, of which it needs the two groups only, as absent there. Ring attention needs the logarithm of
    the softmax's sum, which PyTorch's flash attention for the CPU gives; it stands in for the one for CUDA.
    """
    from yunchang.globals import PROCESS_GROUP

    for name in ("xfuser.config.config", _STATE, "xfuser.core.distributed.group_coordinator"):
        _replace(importlib.import_module(name), "HAS_LONG_CTX_ATTN", True)
    _replace(importlib.import_module(_USP), "PROCESS_GROUP", PROCESS_GROUP)
    _let_flash_attention_run()


def attention_types() -> Any:
    """xDiT's enumeration of its attentions, wherever this release has it."""
    try:
        return _attention_registry().AttentionBackendType
    except ModuleNotFoundError:
        return importlib.import_module(_ATTENTION).AttentionBackendType


def _attention_registry() -> Any:
    return importlib.import_module(_SPECS)  # raises where attention is a table of functions


def _let_flash_attention_run() -> None:
    flash = attention_types().SDPA_FLASH
    try:
        registry = _attention_registry()
    except ModuleNotFoundError:
        table = importlib.import_module(_ATTENTION).ATTENTION_FUNCTION_REGISTRY
        _UNDO.callback(table.__setitem__, flash, table.get(flash))
        table[flash] = _flash_on_cpu
        return
    specs = dict(registry.REGISTRY)
    specs[flash] = replace(specs[flash], impl=_flash_of_call, _resolved=None)
    _UNDO.enter_context(registry.using(specs.values()))


def _flash_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, **kwargs: Any
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal)


def _flash_of_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Any) -> Any:
    return _flash_on_cpu(query, key, value, call.dropout_p, call.is_causal)


@contextmanager
def _pretend_mps() -> Iterator[None]:
    mps: Any = torch.backends.mps
    is_available = mps.is_available
    mps.is_available = lambda: True
    try:
        yield
    finally:
        mps.is_available = is_available


_ENVS = "xfuser.envs"
_CONFIG = "xfuser.config"
_GROUPS = "xfuser.core.distributed"
_BASE = "xfuser.model_executor.pipelines.base_pipeline"
_STATE = "xfuser.core.distributed.parallel_state"
_USP = "xfuser.model_executor.layers.usp"
_ATTENTION = "xfuser.core.distributed.attention_backend"
_SPECS = "xfuser.core.attention.registry"
_RUNNER = "xfuser.runner"
_MODELS = "xfuser.model_executor.models.runner_models.base_model"

_CPU = "xDiT runs on the CPU by itself"
_STRATEGY = "xDiT lets a package register a parallel strategy"
_NEVER = "public API, no end in sight"

LEDGER = (
    Seam(_ENVS, "_is_cuda", (), "replaced where there is no GPU: it looks at torch's build only", _CPU),
    Seam(_ENVS, "get_torch_distributed_backend", (), "replaced where there is no GPU, by gloo", _CPU),
    Seam(_CONFIG, "FlexibleArgumentParser", None, "xDiT's parser", _NEVER),
    Seam(_CONFIG, "FlexibleArgumentParser.parse_args", ("args",), "our flags join xDiT's", _NEVER),
    Seam(_CONFIG, "xFuserArgs.add_runner_args", ("parser",), "xDiT's flags", _NEVER),
    Seam("xfuser", "xFuserArgs", None, "type of the runner's arguments", _NEVER),
    Seam("xfuser", "EngineConfig", ("parallel_config", "runtime_config", "fast_attn_config"), "read", _NEVER),
    Seam(_CONFIG, "InputConfig", ("batch_size", "height", "width", "num_inference_steps", "seed"), "read", _NEVER),
    Seam(
        "xfuser.config.config",
        "ParallelConfig",
        ("dp_config", "sp_config", "pp_config", "tp_config", "fs_config"),
        "its degrees are checked",
        _NEVER,
    ),
    Seam(_GROUPS, "get_cfg_group", (), "the group of two that hybrid-cond runs on", _NEVER),
    Seam(_GROUPS, "get_ring_parallel_world_size", (), "ring attention is refused where it cannot be", _NEVER),
    Seam(_GROUPS, "get_sp_group", (), "the group that splits a branch's tokens", _NEVER),
    Seam(
        _USP,
        "USP",
        ("query", "key", "value", "joint_query", "joint_key", "joint_value", "joint_strategy"),
        "the attention of a split sequence",
        _NEVER,
    ),
    Seam(_USP, "PROCESS_GROUP", None, "set to yunchang's where there is no GPU", _CPU),
    Seam(_CONFIG + ".config", "HAS_LONG_CTX_ATTN", None, "set where there is no GPU", _CPU),
    Seam(_STATE, "HAS_LONG_CTX_ATTN", None, "set where there is no GPU", _CPU),
    Seam(_GROUPS + ".group_coordinator", "HAS_LONG_CTX_ATTN", None, "set where there is no GPU", _CPU),
    Seam(_GROUPS, "is_dp_last_group", (), "whether this rank hands out pictures", _NEVER),
    Seam(_GROUPS, "get_data_parallel_rank", (), "which share of the pictures is this rank's", _NEVER),
    Seam(_GROUPS, "get_data_parallel_world_size", (), "in how many shares the pictures are dealt out", _NEVER),
    Seam(_GROUPS, "get_world_group", (), "pictures are gathered on it", _NEVER),
    Seam(_GROUPS, "runtime_state", None, "the module of the next", _NEVER),
    Seam(
        _GROUPS + ".runtime_state",
        "UnetRuntimeState.sanity_check",
        (),
        "overridden in a class that stands in for it while ours is made: it allows two ranks",
        "xDiT's U-Net state allows data parallelism",
    ),
    Seam(_GROUPS, "get_runtime_state", (), "its attention is read; it is destroyed at the end", _NEVER),
    Seam(
        "xfuser.core.distributed.runtime_state",
        "RuntimeState.destroy_distributed_env",
        (),
        "called at the end without a GPU, where the runner's own cleanup synchronizes CUDA",
        _CPU,
    ),
    *(
        Seam("xfuser", name, parameters, "xDiT's own strategies on SD3 and SDXL, to compare with", _NEVER)
        for pipeline in ("xFuserStableDiffusion3Pipeline", "xFuserStableDiffusionXLPipeline")
        for name, parameters in (
            (pipeline, None),
            (f"{pipeline}.from_pretrained", ("pretrained_model_name_or_path", "engine_config")),
        )
    ),
    Seam(_BASE, "xFuserPipelineBaseWrapper", None, "its scheduler is diffusers' again", _STRATEGY),
    Seam(_GROUPS, "parallel_state", None, "the module of the next three", _NEVER),
    Seam(_STATE, "_CFG", None, "while a model of xDiT's runs it is a group of one", _STRATEGY),
    Seam(_STATE, "get_tp_group", (), "that group", _STRATEGY),
    Seam(_STATE, "model_parallel_is_initialized", (), "whether there are groups", _NEVER),
    Seam(
        _GROUPS + ".runtime_state",
        "initialize_runtime_state",
        ("pipeline", "engine_config"),
        "called for a script that has not made xDiT's groups",
        _NEVER,
    ),
    Seam("xfuser.core.utils.runner_utils", "is_last_process", (), "who has the pictures to tell of", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner", ("config",), "subclassed", _NEVER),
    Seam(
        _RUNNER,
        "xFuserModelRunner._select_model",
        ("model_name", "config"),
        "overridden: folders and hub ids beside xDiT's exact names",
        "xDiT's runner looks up a family, not a name",
    ),
    Seam(_RUNNER, "xFuserModelRunner.preprocess_args", ("input_args",), "called", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner.initialize", ("input_args",), "called", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner.run", ("input_args",), "called", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner.profile", ("input_args",), "called", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner.save", ("output", "timings", "profile"), "called", _NEVER),
    Seam(_RUNNER, "xFuserModelRunner.cleanup", (), "overridden without a GPU: it synchronizes CUDA", _CPU),
    Seam(_MODELS, "MODEL_REGISTRY", None, "looked up by name", _NEVER),
    Seam(
        "xfuser.model_executor.models.runner_models.stable_diffusion",
        "xFuserStableDiffusionModel",
        ("config",),
        "the one of its models in whose place diffusers' pipeline runs",
        "xDiT's SD3 runs diffusers' pipeline",
    ),
    Seam(
        "xfuser.model_executor.models.transformers.transformer_z_image",
        "xFuserZImageTransformer2DWrapper",
        None,
        "whether it takes what diffusers' pipeline calls it with",
        "xDiT's Z-Image runs with diffusers 0.42",
    ),
    Seam(_MODELS, "xFuserModel", ("config",), "subclassed", _NEVER),
    Seam(
        _MODELS, "xFuserModel._validate_args", ("input_args",), "overridden: flags without effect are refused", _NEVER
    ),
    Seam(
        _MODELS,
        "xFuserModel._validate_config",
        ("config",),
        "overridden: Cosmos3's tokens are not split",
        "its attention counts the text's tokens once",
    ),
    Seam(
        _MODELS,
        "xFuserModel.initialize",
        ("input_args",),
        "overridden: it makes the runtime state once more, and splits the VAE's decoder once more",
        "the runner leaves both to the pipeline's wrapper where there is one",
    ),
    Seam(
        _MODELS,
        "xFuserModel._compile_model",
        ("input_args",),
        "overridden: it compiles the whole denoiser, whose forward is hooked",
        "the runner leaves it to the pipeline's wrapper where there is one",
    ),
    Seam(_MODELS, "xFuserModel._customize_settings", ("config",), "overridden: settings by checkpoint", _NEVER),
    Seam(_MODELS, "xFuserModel._load_model", (), "overridden", _NEVER),
    Seam(_MODELS, "xFuserModel._run_pipe", ("input_args",), "overridden", _NEVER),
    Seam(
        _MODELS,
        "xFuserModel._split_prompts_for_dp",
        ("input_args",),
        "overridden: the pipelines deal out the pictures",
        "xDiT keeps their order and draws the noise of each",
    ),
    Seam(_MODELS, "xFuserModel._gather_dp_outputs", ("output",), "overridden: gathered call by call", "the same"),
    Seam(_MODELS, "xFuserModel.run", ("input_args",), "overridden without a GPU: it times by CUDA events", _CPU),
    Seam(_MODELS, "xFuserModel._run_timed_pipe", ("input_args",), "overridden without a GPU: as run", _CPU),
    Seam(
        _MODELS,
        "xFuserModel._post_load_and_state_initialization",
        ("input_args",),
        "overridden without a GPU: it moves the pipeline to CUDA",
        _CPU,
    ),
    Seam(_MODELS, "xFuserModel._run_pipe_batched", ("input_args",), "called without a GPU", _CPU),
    Seam(_MODELS, "xFuserModel._run_warmup_calls", ("input_args",), "called without a GPU", _CPU),
    Seam(_MODELS, "ModelCapabilities", ("use_cfg_parallel", "pipefusion_parallel_degree"), "what ours can do", _NEVER),
    Seam(
        _MODELS,
        "DefaultInputValues",
        ("height", "width", "num_inference_steps", "guidance_scale"),
        "defaults by checkpoint",
        _NEVER,
    ),
    Seam(_MODELS, "ModelSettings", ("model_name", "output_name", "model_output_type", "fps"), "the same", _NEVER),
    Seam(_MODELS, "DiffusionOutput", ("images", "videos", "pipe_args"), "what _run_pipe returns", _NEVER),
    Seam(_MODELS, "DiffusionOutput.get_outputs", (), "each picture with its call", _NEVER),
    Seam(_MODELS, "xFuserModel.get_output_name", ("input_args",), "where a picture lies", _NEVER),
)

#: What an xDiT that loads plugins has besides, which no release does (see ``integrations/xdit/patches``).
PLUGIN_LEDGER = (
    Seam("xfuser.plugins", "register_strategy", ("name", "strategy"), "called", _NEVER),
    Seam("xfuser.plugins", "ParallelStrategy", (), "subclassed", _NEVER),
    Seam("xfuser.plugins", "ParallelStrategy.add_args", ("parser",), "overridden", _NEVER),
    Seam("xfuser.plugins", "ParallelStrategy.configure", ("args", "config"), "overridden", _NEVER),
    Seam("xfuser.plugins", "ParallelStrategy.model_class", ("name", "model"), "overridden", _NEVER),
)

#: Attention is a table of functions up to 0.7, and specifications in a registry after it: one of the two is there.
ATTENTION_LEDGERS = tuple(
    (
        Seam(module, "AttentionBackendType.SDPA", None, "it takes float32, as two others", _NEVER),
        Seam(module, "AttentionBackendType.SDPA_MATH", None, "the same", _NEVER),
        Seam(module, "AttentionBackendType.SDPA_EFFICIENT", None, "the same", _NEVER),
        Seam(module, "AttentionBackendType.SDPA_FLASH", None, "replaced where there is no GPU", _CPU),
        *replaced,
    )
    for module, *replaced in (
        (_ATTENTION, Seam(_ATTENTION, "ATTENTION_FUNCTION_REGISTRY", None, "where it is replaced", _CPU)),
        (
            _SPECS,
            Seam(_SPECS, "REGISTRY", None, "what it is replaced by is made of it", _CPU),
            Seam(_SPECS, "using", ("specs",), "it is replaced by this", _CPU),
            Seam(_SPECS, "Spec", ("impl", "_resolved"), "the same", _CPU),
        ),
    )
)


def check_ledger() -> list[str]:
    """What is missing from the installed xfuser, as `seam.compat.missing` tells it."""
    import_xfuser()
    return [*missing(LEDGER), *min(map(missing, ATTENTION_LEDGERS), key=len)]
