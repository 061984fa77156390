"""One rank of pictures dealt out to pairs: ``torchrun xdit_batch_worker.py FOLDER [flags of xDiT]``.

Saves, by checkpoint and case, what each rank hands out.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import xdit_tiny

from hybridiff_xdit import HybridConfig, last_report
from hybridiff_xdit.xdit.options import build_parser
from hybridiff_xdit.xdit.pipelines import HybridStableDiffusion3Pipeline, HybridStableDiffusionXLPipeline

from xfuser import xFuserArgs  # isort: skip  # it imports only after ours
from xfuser.core.distributed import get_cfg_group, get_runtime_state, get_sp_group

PIPELINES = {"sd3": HybridStableDiffusion3Pipeline, "sdxl": HybridStableDiffusionXLPipeline}
CASES = {
    "one": {"prompt": "a cat", "negative_prompt": "ugly"},
    "three": {"prompt": ["a cat", "two dogs", "red"], "negative_prompt": ["ugly", "grey", "dull"]},
    "images": {"prompt": ["a cat", "two dogs"], "negative_prompt": "ugly", "num_images_per_prompt": 3},
}
COMMON = {**xdit_tiny.COMMON, "num_inference_steps": 6, "guidance_scale": 5.0}


def main(folder: Path, flags: list[str]) -> None:
    results = {}
    common = COMMON | ({"output_type": "pt"} if "--use_parallel_vae" in flags else {})
    for name, base in PIPELINES.items():
        if name == "sdxl" and "--ulysses_degree" in flags:
            continue
        given = ["--model", str(folder / name), "--prompt", "", "--use_cfg_parallel", *flags]
        engine_config, _ = xFuserArgs.from_cli_args(build_parser().parse_args(given)).create_config()
        pipe = base.with_config(HybridConfig(policy="cfg", report=folder / f"report-{name}")).from_pretrained(
            pretrained_model_name_or_path=folder / name, engine_config=engine_config, **xdit_tiny.ABSENT[name]
        )
        pipe.module.set_progress_bar_config(disable=True)
        for case, call in CASES.items():
            output = pipe(**call, **common, generator=xdit_tiny.generator())
            results[name, case] = output and output.images
        results[name, "plan"] = (last_report(pipe.module) or {}).get("plan")
    results["node"] = os.environ["GROUP_RANK"]
    results["ranks"] = get_cfg_group().ranks, get_sp_group().ranks
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
