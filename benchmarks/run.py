"""Time the strategies beside one another, in one run on the same devices.

    torchrun --nproc_per_node 2 benchmarks/run.py --scenario sdxl-1024 sd3-medium-1024 --out times.jsonl
    torchrun --nproc_per_node 8 benchmarks/run.py --strategy one-gpu cfg "cfg, ulysses" "adaptive 2.5, pairs"
    python benchmarks/report.py times.jsonl

Every repeat times each strategy once, in turn, so that a drift of the machine falls on all alike. The baseline
``one-gpu`` is the pipeline as it is, on rank 0, while the others wait on the host. On more than two ranks a strategy
runs on the first pair, or with ``ulysses`` on all of them for one picture (MMDiTs), or with ``pairs`` on all for a
picture a pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import group
import torch
import torch.distributed as dist
from scenarios import SCENARIOS

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid

CONFIGS: dict[str, HybridConfig] = {
    "cfg": HybridConfig(policy="cfg"),
    "paper": HybridConfig(policy="paper"),
    "fixed 8-48/2": HybridConfig(plan="8-48/2"),
    # By target: with random weights, what a tolerance saves says nothing of a trained model.
    "adaptive 2.5": HybridConfig(speedup=2.5),
    "adaptive 2.85": HybridConfig(speedup=2.85),
}
LAYOUTS = ("", ", ulysses", ", pairs")
STRATEGIES = ("one-gpu", *(f"{name}{layout}" for layout in LAYOUTS for name in CONFIGS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["sdxl-1024", "sd3-medium-1024"])
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=["one-gpu", "cfg", "paper"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="one more, profiled: a Chrome trace a strategy and rank"
    )
    parser.add_argument("--out", type=Path, default=Path("times.jsonl"), help="one JSON line a scenario and strategy")
    args = parser.parse_args()

    device = group.join()
    place = group.Place.of()
    is_gpu = device.type == "cuda"
    dtype = torch.float16 if is_gpu else torch.float32
    host = dist.new_group(backend="gloo")

    lines = []
    for name in args.scenario:
        scenario = SCENARIOS[name]
        pipe = scenario.pipeline(device, dtype)
        arguments = dict(scenario.arguments(device, dtype), num_inference_steps=args.steps)
        chosen = [name for name in args.strategy if scenario.family == "mmdit" or not name.endswith("ulysses")]
        split = group.ulysses(pipe) if any(name.endswith("ulysses") for name in chosen) else None
        measured: dict[str, Any] = {strategy: [] for strategy in chosen}
        reports = {}
        for turn in ["warm-up", *["timed"] * args.repeats, *(["traced"] if args.trace else [])]:
            for strategy in chosen:
                config, _, layout = strategy.partition(", ")
                remove_hybrid(pipe)
                if is_busy := dist.get_rank() == 0 if strategy == "one-gpu" else layout or place.first:
                    sequence = split if layout == "ulysses" else None
                    if strategy != "one-gpu":
                        apply_hybrid(pipe, CONFIGS[config], group=place.pair, sequence=sequence, model=name)
                call = partial(_call, pipe, arguments) if is_busy else _wait
                if turn == "traced":
                    label = re.sub(r"[^\w.-]+", "_", f"{name} {strategy} rank {dist.get_rank()}")
                    call = partial(_traced, call, args.trace / f"{label}.json")
                sample = _time(call, device, host)
                if turn == "timed":
                    measured[strategy].append(sample)
                reports[strategy] = last_report(pipe)
                remove_hybrid(pipe)
        for strategy, samples in measured.items():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, samples, group=host)
            report = reports[strategy]
            lines.append(
                {
                    "scenario": name,
                    "strategy": strategy,
                    "steps": args.steps,
                    "pictures": dist.get_world_size() // 2 if strategy.endswith("pairs") else 1,
                    "device": torch.cuda.get_device_name() if is_gpu else platform.machine(),
                    "dtype": str(dtype).removeprefix("torch."),
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                    "seconds": [max(s for s, _ in repeat) for repeat in zip(*gathered, strict=True)],
                    "peak_memory": [max(memory for _, memory in rank) for rank in gathered],
                    "plan": report and report["plan"],
                    "tau_1": report and report["tau_1"],
                    "speedup_bound": report and report["speedup_bound"],
                    "bytes_sent": report and report["bytes_sent"],
                }
            )
        del pipe
        if is_gpu:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dist.destroy_process_group()


def _call(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe(**arguments, generator=torch.Generator().manual_seed(0))


def _traced(function: Callable[[], None], file: Path) -> None:
    """Profile; steps are labelled with their kind. Open the file in chrome://tracing or https://ui.perfetto.dev."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        function()
    profiler.export_chrome_trace(str(file))


def _wait() -> None:
    """The share of the ranks that have none."""


def _time(function: Callable[[], None], device: torch.device, host: dist.ProcessGroup) -> tuple[float, int]:
    """Seconds from a common start until this rank's device is done, and its peak memory in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    dist.barrier(group=host)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    dist.barrier(group=host)
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
