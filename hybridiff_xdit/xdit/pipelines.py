"""xDiT's SD3 and SDXL pipelines with `hybrid-cond` in place of xDiT's CFG parallelism.

These run the diffusers pipeline that xDiT's wrap (as xDiT itself does on one process), with the denoiser hooked on
xDiT's CFG group, and its tokens split over xDiT's sequence group. With more than two stages the ranks of a branch are
xDiT's pipeline group (beside a split, those of equal place in the sequence groups), and those of both branches the
hook's. Every rank has whole latents; several prompts, several images a prompt and callbacks are then diffusers' own
affair. Pictures are dealt out to xDiT's data parallel groups, each of which is such a pair of branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .. import HybridConfig, apply_hybrid
from ..seam.hooks import denoiser_of
from .batch import deal
from .compat import import_xfuser
from .options import refuse_excluded
from .sequence import sequence_split

import_xfuser()

from xfuser import (  # noqa: E402
    EngineConfig,
    xFuserStableDiffusion3Pipeline,
    xFuserStableDiffusionXLPipeline,
)
from xfuser.config import InputConfig  # noqa: E402
from xfuser.core.distributed import (  # noqa: E402
    get_cfg_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    is_dp_last_group,
    runtime_state,
)
from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper  # noqa: E402


class HybridCond:
    """What the two pipelines share. ``with_config`` comes first, then xDiT's ``from_pretrained``."""

    hybrid = HybridConfig()
    model: str | None = None
    module: Any  # the diffusers pipeline
    engine_config: EngineConfig

    @classmethod
    def with_config(cls, hybrid: HybridConfig, model: str | None = None) -> Any:
        """This class, running `hybrid`, with a name for the report (default: the checkpoint it is loaded from)."""
        return type(cls.__name__, (cls,), {"hybrid": hybrid, "model": model, "__module__": cls.__module__})

    def __init__(self, pipeline: DiffusionPipeline, engine_config: EngineConfig) -> None:
        _check(engine_config, self.hybrid)
        # Past xDiT's SDXL wrapper, which would patch the U-Net for its own CFG parallelism.
        xFuserPipelineBaseWrapper.__init__(self, pipeline, engine_config)
        if engine_config.runtime_config.use_torch_compile:
            compile_blocks(denoiser_of(self.module))
        sequence = sequence_split()
        group = stage_group(self.hybrid.stages, sequence.comm.size if sequence else 1)
        hybrid = replace(self.hybrid, report=None) if get_data_parallel_rank() else self.hybrid
        apply_hybrid(self.module, hybrid, group=group, sequence=sequence, model=self.model)

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        """The diffusers pipeline's call, of this data parallel group's share of the pictures.

        As in xDiT, the last rank of each group hands out the group's pictures (perhaps none), the others return None.
        """
        is_last = is_dp_last_group()
        if not is_last and not self.engine_config.runtime_config.use_parallel_vae:
            kwargs["output_type"] = "latent"  # what nobody will see needs no decoding
        call: Any = {"prompt": prompt, **kwargs}
        if (groups := get_data_parallel_world_size()) > 1:
            call = deal(self.module, call, get_data_parallel_rank(), groups)
        output = self.module(**call) if call else ImagePipelineOutput(images=[])
        return output if is_last else None

    def prepare_run(self, input_config: InputConfig, steps: int | None = None, sync_steps: int = 1) -> None:
        """Warm up with a run of full length, whatever `steps` says: a plan belongs to a run's length."""
        self(
            [""] * input_config.batch_size,
            height=input_config.height,
            width=input_config.width,
            num_inference_steps=input_config.num_inference_steps,
            guidance_scale=input_config.guidance_scale,
            generator=torch.Generator(self.module._execution_device).manual_seed(input_config.seed),
            output_type=input_config.output_type,
        )

    def _convert_transformer_backbone(self, transformer: Any, *args: Any, **kwargs: Any) -> Any:
        return transformer

    def _convert_scheduler(self, scheduler: Any) -> Any:
        return scheduler


class HybridStableDiffusion3Pipeline(HybridCond, xFuserStableDiffusion3Pipeline):
    """SD3 and SD3.5 on two ranks, sequence groups, pipeline groups or products of these, one a branch."""


class HybridStableDiffusionXLPipeline(HybridCond, xFuserStableDiffusionXLPipeline):
    """SDXL on two ranks or two pipeline groups, one a branch."""

    def _init_runtime_state(self, pipeline: DiffusionPipeline, engine_config: EngineConfig) -> None:
        with many_pairs():
            super()._init_runtime_state(pipeline, engine_config)


#: Such groups, for as long as xDiT has its own: they end with these.
_STAGE_GROUPS: WeakKeyDictionary[Any, dict[tuple[int, int], Any]] = WeakKeyDictionary()


def stage_group(stages: int, shards: int = 1) -> dist.ProcessGroup:
    """The group of ranks that have a stage of the same picture and the same place in their sequence groups.

    Uncond's ranks come first. All processes must ask for it, and make all such groups in the same order.

    Args:
        stages: of a PIPELINED step.
        shards: ranks of a sequence group.
    """
    if stages == 2:
        return get_cfg_group().device_group
    made = _STAGE_GROUPS.setdefault(get_cfg_group(), {})
    if (stages, shards) not in made:
        groups = dist.new_subgroups_by_enumeration(stage_ranks(dist.get_world_size(), stages, shards))
        made[stages, shards] = groups[0]
    return made[stages, shards]


def stage_ranks(world_size: int, stages: int, shards: int) -> list[list[int]]:
    """The ranks of all such groups: xDiT numbers ranks by place in the sequence, stage, branch, data parallel group."""
    picture = stages * shards
    return [
        list(range(start + place, start + picture, shards))
        for start in range(0, world_size, picture)
        for place in range(shards)
    ]


def compile_blocks(denoiser: torch.nn.Module, **options: Any) -> None:
    """Compile a denoiser's transformer blocks one by one, with ``torch.compile(..., **options)``.

    Their forwards, not the modules: what chooses the steps stays Python, and so do the hooks that watch a block.
    """
    import torch._inductor.config

    # The ranks evaluate different blocks at different times; this check would have them compare their graphs.
    check = "aten_distributed_optimizations.spmd_check"
    if options.keys().isdisjoint(("mode", "backend")) and check in torch._inductor.config.get_config_copy():
        options["options"] = {check: False, **options.get("options", {})}
    for module in denoiser.modules():
        if type(module).__name__ in ("JointTransformerBlock", "BasicTransformerBlock"):
            module.forward = torch.compile(module.forward, **options)


@contextmanager
def many_pairs() -> Iterator[None]:
    """Meanwhile xDiT's state for U-Nets is made without its limit of two ranks: more pairs make more pictures."""
    limited = runtime_state.UnetRuntimeState
    runtime_state.UnetRuntimeState = type(limited.__name__, (limited,), {"sanity_check": lambda self: None})
    try:
        yield
    finally:
        runtime_state.UnetRuntimeState = limited


def _check(engine_config: EngineConfig, hybrid: HybridConfig) -> None:
    parallel = engine_config.parallel_config
    refuse_excluded(
        {
            "tensor_parallel_degree": parallel.tp_degree,
            "fully_shard_degree": parallel.fs_degree,
            "use_fast_attn": engine_config.fast_attn_config.use_fast_attn,
        }
    )
    degrees = parallel.dp_degree, parallel.ulysses_degree, parallel.ring_degree, parallel.pp_degree
    is_alone = set(degrees) == {1} and not hybrid.has_stages  # one process, where steps can be SKIPPED
    if parallel.cfg_degree != 2 and not is_alone:
        raise ValueError("hybrid-cond runs on xDiT's CFG group of two: add --use_cfg_parallel.")
    if parallel.pp_degree != hybrid.stages // 2:
        raise ValueError(
            f"hybrid-cond with --hybrid_stages {hybrid.stages} (HybridConfig.stages) has {hybrid.stages // 2} ranks a "
            f"branch, which xDiT counts as --pipefusion_parallel_degree, and that is {parallel.pp_degree}: make them "
            "agree. (--parallel hybrid-cond does.)"
        )
