"""One rank of xDiT's pipelines under hybrid-cond: ``torchrun xdit_worker.py FOLDER`` saves what each case gives."""

import sys
from pathlib import Path

import torch
import xdit_tiny

from hybridiff_xdit import HybridConfig, last_report
from hybridiff_xdit.xdit.pipelines import HybridStableDiffusion3Pipeline, HybridStableDiffusionXLPipeline

from xfuser import xFuserArgs  # isort: skip  # it imports only after ours
from xfuser.core.distributed import get_runtime_state, get_world_group

PIPELINES = {"sd3": HybridStableDiffusion3Pipeline, "sdxl": HybridStableDiffusionXLPipeline}
CONFIGS = {
    "cfg": HybridConfig(policy="cfg"),
    "fixed": HybridConfig(plan="FFPPFPFF", guidance="reuse"),
    "adaptive": HybridConfig(speedup=2.2, kinds="FS"),
}


def main(folder: Path) -> None:
    results = {}
    for name, base in PIPELINES.items():
        engine_config, _ = xFuserArgs(model=str(folder / name), use_cfg_parallel=True).create_config()
        for policy, config in CONFIGS.items():
            pipe = base.with_config(config, name).from_pretrained(
                pretrained_model_name_or_path=folder / name,
                engine_config=engine_config,
                **xdit_tiny.ABSENT[name],
            )
            for _ in range(2):  # the second call must not see the first
                output = pipe(**xdit_tiny.CALLS[name], **xdit_tiny.COMMON, generator=xdit_tiny.generator())
            results[name, policy] = output and output.images, last_report(pipe.module)
    torch.save(results, folder / f"rank{get_world_group().rank}.pt")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
