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
from hybridiff_xdit.xdit.batch import share_of_call
from hybridiff_xdit.xdit.groups import apply_on_groups
from hybridiff_xdit.xdit.options import build_parser

from distvae.vae import parallelize_decoder  # isort: skip
from xfuser import xFuserArgs  # isort: skip  # it imports only after ours
from xfuser.core.distributed import get_cfg_group, get_runtime_state, get_sp_group, get_vae_parallel_group

CASES = {
    "one": {"prompt": "a cat", "negative_prompt": "ugly"},
    "three": {"prompt": ["a cat", "two dogs", "red"], "negative_prompt": ["ugly", "grey", "dull"]},
    "images": {"prompt": ["a cat", "two dogs"], "negative_prompt": "ugly", "num_images_per_prompt": 3},
}
COMMON = {**xdit_tiny.COMMON, "num_inference_steps": 2, "guidance_scale": 5.0}


def main(folder: Path, flags: list[str]) -> None:
    results = {}
    common = COMMON | ({"output_type": "pt"} if "--use_parallel_vae" in flags else {})
    for name in ("sd3", "sdxl"):
        if name == "sdxl" and "--ulysses_degree" in flags:
            continue
        given = ["--model", name, "--prompt", "", "--use_cfg_parallel", *flags]
        engine_config, _ = xFuserArgs.from_cli_args(build_parser().parse_args(given)).create_config()
        config = HybridConfig(policy="cfg", report=folder / f"report-{name}")
        pipe = apply_on_groups(xdit_tiny.pipeline(name), config, engine_config)
        if is_split := "--use_parallel_vae" in flags:
            parallelize_decoder(pipe.vae, get_vae_parallel_group().device_group)
        for case, call in CASES.items():
            call = {**call, **common, "generator": xdit_tiny.generator()}
            results[name, case] = share_of_call(pipe, call, decodes=is_split)
        results[name, "plan"] = (last_report(pipe) or {}).get("plan")
    results["node"] = os.environ["GROUP_RANK"]
    results["ranks"] = get_cfg_group().ranks, get_sp_group().ranks
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
