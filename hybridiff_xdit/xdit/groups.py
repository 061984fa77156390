"""`hybrid-cond` on xDiT's process groups.

The branches are the ranks of xDiT's CFG group, the tokens of a branch are split over its sequence group, and the
pictures are dealt out to its data parallel groups, each of which is such a pair of branches. With more than two stages
the ranks of a branch are xDiT's pipeline group (beside a split, those of equal place in the sequence groups), and those
of both branches a group made here. Every rank has whole latents; several prompts, several pictures a prompt and
callbacks are diffusers' own affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .. import HybridConfig, apply_hybrid
from .compat import import_xfuser
from .options import refuse_excluded
from .sequence import sequence_split

import_xfuser()

from xfuser import EngineConfig  # noqa: E402
from xfuser.core.distributed import (  # noqa: E402
    get_cfg_group,
    get_data_parallel_rank,
    parallel_state,
    runtime_state,
)
from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper  # noqa: E402


def apply_on_groups(
    pipe: Any, hybrid: HybridConfig, engine_config: EngineConfig, *, model: str | None = None, splits: bool = False
) -> Any:
    """`apply_hybrid` on the groups that xDiT makes for these degrees, unless it has made them already.

    Args:
        pipe: a diffusers pipeline, or xDiT's wrapper of one, on this rank's device. Its CFG parallelism is ours: call
            it within `one_branch`, where its code has some of its own.
        hybrid: the strategy. A report is written by the first data parallel group alone.
        engine_config: xDiT's, with ``use_cfg_parallel`` (but for one process); with more than two stages its PipeFusion
            degree is the number of ranks that a branch has.
        model: name for the report; default the checkpoint the pipeline was loaded from.
        splits: whether the denoiser splits its tokens over the sequence group itself, as xDiT's own do.

    Returns:
        The pipeline.

    Raises:
        ValueError: the degrees do not fit, or as `apply_hybrid` raises.
    """
    _check(engine_config, hybrid)
    if not parallel_state.model_parallel_is_initialized():
        with many_pairs():
            runtime_state.initialize_runtime_state(pipe, engine_config)
    if isinstance(pipe, xFuserPipelineBaseWrapper):  # whose scheduler deals in patches, of which there are none
        pipe.module.scheduler = getattr(pipe.scheduler, "module", pipe.scheduler)
    sequence = sequence_split(splits)
    group = stage_group(hybrid.stages, sequence.comm.size if sequence else 1)
    hybrid = replace(hybrid, report=None) if get_data_parallel_rank() else hybrid
    return apply_hybrid(pipe, hybrid, group=group, sequence=sequence, model=model)


@contextmanager
def one_branch() -> Iterator[None]:
    """Meanwhile xDiT's code sees a CFG group of one: a pipeline of its own then evaluates both branches on each rank.

    Which is what the strategy wants to be asked for: it deals them out.
    """
    group = parallel_state._CFG
    parallel_state._CFG = parallel_state.get_tp_group()  # a group of one: tensor parallelism is refused
    try:
        yield
    finally:
        parallel_state._CFG = group


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
    if options.keys().isdisjoint(("mode", "backend")):
        options["options"] = {**compile_apart(), **options.get("options", {})}
    for module in denoiser.modules():
        if type(module).__name__ in ("JointTransformerBlock", "BasicTransformerBlock"):
            module.forward = torch.compile(module.forward, **options)


def compile_apart() -> dict[str, bool]:
    """Inductor's options for ranks that evaluate different blocks at different times: they do not compare graphs."""
    import torch._inductor.config

    check = "aten_distributed_optimizations.spmd_check"
    return {check: False} if check in torch._inductor.config.get_config_copy() else {}


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
