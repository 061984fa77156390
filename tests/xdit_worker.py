"""One rank of pipelines on xDiT's groups: ``xdit_worker.py FOLDER`` saves what each case gives."""

import sys
from pathlib import Path

import torch
import xdit_tiny

from hybridiff_xdit import HybridConfig, last_report
from hybridiff_xdit.xdit.batch import share_of_call
from hybridiff_xdit.xdit.groups import apply_on_groups

from xfuser import xFuserArgs  # isort: skip  # it imports only after ours
from xfuser.core.distributed import get_runtime_state, get_world_group

CONFIGS = {
    "cfg": HybridConfig(policy="cfg"),
    "cfg of ten": HybridConfig(policy="cfg"),
    "fixed": HybridConfig(plan="FFPPFPFF", guidance="reuse"),
    "adaptive": HybridConfig(speedup=2.2, kinds="FS"),
}


def main(folder: Path) -> None:
    results = {}
    for name in ("sd3", "sdxl"):
        engine_config, _ = xFuserArgs(model=name, use_cfg_parallel=True).create_config()
        for policy, config in CONFIGS.items():
            pipe = apply_on_groups(xdit_tiny.pipeline(name), config, engine_config, model=name)
            call = {**xdit_tiny.CALLS[name], **xdit_tiny.COMMON}
            if policy in ("adaptive", "cfg of ten"):
                call["num_inference_steps"] = 10  # the target allows no fewer
            for _ in range(2):  # the second call must not see the first
                made = share_of_call(pipe, {**call, "generator": xdit_tiny.generator()})
            results[name, policy] = torch.stack(made) if made else None, last_report(pipe)
    torch.save(results, folder / f"rank{get_world_group().rank}.pt")
    get_runtime_state().destroy_distributed_env()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
