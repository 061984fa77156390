"""PSNR of the strategies to the one-GPU pictures, beside fewer plain steps at equal time, on the small models.

    torchrun --nproc_per_node 2 benchmarks/quality.py --model benchmarks/models/emoji-sd3 --prompts 64

Fewer plain steps at equal time: a run of ``n_full + n_pipelined / 2`` FULL steps takes the time of the plan's run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import group
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

STEPS = 50  # of the reference and of every plan

CONFIGS = {
    "paper, mixed": HybridConfig(policy="paper"),
    "paper, none": HybridConfig(policy="paper", guidance="none"),
    "paper, reuse": HybridConfig(policy="paper", guidance="reuse"),
    "8-48/2, reuse": HybridConfig(plan="8-48/2"),
    "8-48/2, mixed": HybridConfig(plan="8-48/2", guidance="mixed"),
    "8-47/3, reuse": HybridConfig(plan="8-47/3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of emoji-sd3 or emoji-sdxl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines too")
    args = parser.parse_args()

    device = group.join()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    names = (Path(__file__).parent / "models" / "prompts.txt").read_text().splitlines()[: args.prompts]

    def pictures(steps: int) -> torch.Tensor:
        """[N, H, W, 3] in [0, 1]."""
        parts = []
        for start in range(0, len(names), args.batch):
            batch = names[start : start + args.batch]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
            arguments: dict[str, Any] = dict(num_inference_steps=steps, generator=generators, output_type="np")
            parts.append(torch.as_tensor(pipe(batch, guidance_scale=args.guidance_scale, **arguments).images))
        return torch.cat(parts)

    reference, plain, rows = pictures(STEPS), {}, []
    for name, config in CONFIGS.items():
        apply_hybrid(pipe, config)
        values = psnr(pictures(STEPS), reference)
        report = last_report(pipe)
        assert report is not None
        remove_hybrid(pipe)
        steps = round(2 * STEPS / report["speedup_bound"])
        if steps not in plain:
            plain[steps] = psnr(pictures(steps), reference)
        rows.append(
            {
                "model": args.model.name,
                "config": name,
                "bound": round(report["speedup_bound"], 3),
                "tau_1": report["tau_1"],
                "psnr": summary(values),
                "plain_steps": steps,
                "psnr_plain": summary(plain[steps]),
            }
        )
    if dist.get_rank() == 0:
        print(f"| {args.model.name}: config | speed-up bound | PSNR dB, mean (5th percentile) | plain steps, PSNR |")
        print("| --- | --- | --- | --- |")
        for row in rows:
            ours, fewer = ("{:.1f} ({:.1f})".format(*row[key]) for key in ("psnr", "psnr_plain"))
            print(f"| {row['config']} | {row['bound']} | {ours} | {row['plain_steps']}: {fewer} |")
        if args.out:
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.destroy_process_group()


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each picture, [N]; pictures in [0, 1]."""
    return -10 * (pictures - reference).square().mean((1, 2, 3)).clamp(min=1e-12).log10()


def summary(values: torch.Tensor) -> tuple[float, float]:
    """Mean and 5th percentile."""
    return round(values.mean().item(), 2), round(values.quantile(0.05).item(), 2)


if __name__ == "__main__":
    main()
