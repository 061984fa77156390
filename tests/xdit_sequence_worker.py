"""One rank of SD3 with its tokens split: ``xdit_sequence_worker.py FOLDER PIPELINE [flags of xDiT]``.

Saves what each case gives, or the error that it raises, by its name.
"""

import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from ranks import waiting_at_once

from hybridiff_xdit import HybridConfig, last_report, remove_hybrid
from hybridiff_xdit.xdit.batch import share_of_call
from hybridiff_xdit.xdit.groups import apply_on_groups, stage_group
from hybridiff_xdit.xdit.options import build_parser

from xfuser import xFuserArgs  # isort: skip  # it imports only after ours
from xfuser.core.distributed import get_cfg_group, get_pp_group, get_runtime_state, get_sp_group

CASES = {
    "cfg": HybridConfig(policy="cfg"),
    "reuse": HybridConfig(plan="FFPPFPFFPF", guidance="reuse"),
    "deferred": HybridConfig(plan="FFPPFSFFPF", guidance="deferred"),
    "adaptive": HybridConfig(tolerance=3.0),
}


def main(folder: Path, name: str, flags: list[str]) -> None:
    flags = ["--model", name, "--prompt", "", "--use_cfg_parallel", *flags]
    engine_config, _ = xFuserArgs.from_cli_args(build_parser().parse_args(flags)).create_config()
    stages = 2 * engine_config.parallel_config.pp_degree
    results, pipe = {}, tiny.pipeline(name)

    def latents(**kwargs):
        return tiny.call(pipe, "sd3", **kwargs)

    def apply(case: str) -> None:
        apply_on_groups(pipe, replace(CASES[case], stages=stages), engine_config)

    for case in CASES:
        apply(case)
        latents(seed=3)  # the second call must not see the first
        results[case] = latents(), last_report(pipe)
        if case == "reuse":
            with waiting_at_once():
                results["waiting"] = latents()
    processors = lambda: {type(p).__name__ for p in pipe.transformer.attn_processors.values()}  # noqa: E731
    made = share_of_call(pipe, {**tiny.prompt("sd3"), "height": 32, "width": 32, "generator": torch.Generator()})
    results["group"] = dist.get_process_group_ranks(stage_group(stages, get_sp_group().world_size))
    results["xdit's"] = get_cfg_group().ranks, get_pp_group().ranks, bool(made)
    results["processors"] = [processors(), remove_hybrid(pipe) and processors()]
    results["plain"] = latents()
    apply("deferred")

    def fails(**kwargs) -> str:
        try:
            latents(**kwargs)
        except (RuntimeError, ValueError) as error:
            return str(error)
        return "no error"

    def drift(pipe, step, time, tensors):
        return {"latents": tensors["latents"] + (0.1 if step == 3 and dist.get_rank() == 1 else 0)}

    results["seed"] = fails(seed=int(dist.get_rank() in (1, dist.get_world_size() // 2 + 1)))
    results["tokens"] = fails(height=20, width=20)  # 5 x 5 tokens
    results["drift"] = fails(callback_on_step_end=drift)
    torch.save(results, folder / f"{name}-{dist.get_rank()}.pt")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
