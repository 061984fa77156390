"""Time the strategies beside one another, in one run on the same devices.

    torchrun --nproc_per_node 2 benchmarks/run.py --scenario sdxl-1024 sd3-medium-1024 --out times.jsonl
    torchrun --nproc_per_node 8 benchmarks/run.py --strategy one-gpu cfg "cfg, ulysses" "adaptive 2.5, pairs"
    torchrun --nproc_per_node 1 benchmarks/run.py --strategy one-gpu "fixed 8-48/4, rank 0" "fixed 8-48/4, rank 1"
    python benchmarks/report.py times.jsonl

A strategy is a configuration and, after commas, how it is run:

    eager     without CUDA graphs; ``one-gpu`` is eager unless ``one-gpu, graphs`` is asked for
    ulysses   on all ranks for one picture (MMDiTs); without it, more than two ranks leave all but the first pair idle
    pairs     on all ranks, a picture a pair
    rank 0    what rank 0 does, without a peer: the pictures are wrong and nothing is exchanged, all else is done.
              Needs one GPU; what a second one would change is the time of the exchanges.

``one-gpu`` is the pipeline as it is, on rank 0, while the others wait on the host. ``xdit cfg``, ``xdit ulysses`` and
``xdit pipefusion`` are xDiT's own strategies on all processes, where it has them for the model (`rivals.py`).

Each strategy has two blocks of repeats, each after a warm-up of its own, and the blocks take turns, so that a drift of
the machine falls on all alike. The *floor* of a strategy is the time of its graphs alone, replayed one after the other:
FULL steps times a branch's forward, plus PIPELINED steps times the slower rank's share. It is compared with the
denoising *loop*: the pipeline's call from where its progress bar begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import group
import rivals
import torch
import torch.distributed as dist
from scenarios import SCENARIOS

from hybridiff_xdit import HybridConfig, apply_hybrid, hybrid, last_report, remove_hybrid
from hybridiff_xdit.graphs import Graphs
from hybridiff_xdit.hybrid import denoiser_of

CONFIGS: dict[str, HybridConfig | None] = {
    "one-gpu": None,
    "cfg": HybridConfig(policy="cfg"),
    "paper": HybridConfig(policy="paper"),
    "fixed 8-48/2": HybridConfig(plan="8-48/2"),
    "fixed 8-48/4": HybridConfig(plan="8-48/4"),
    # By target: with random weights, what a tolerance saves says nothing of a trained model.
    "adaptive 2.5": HybridConfig(speedup=2.5),
    "adaptive 2.85": HybridConfig(speedup=2.85),
}
WAYS = ("eager", "graphs", "ulysses", "pairs", "rank 0", "rank 1")
BLOCKS = 2


class Strategy(NamedTuple):
    """A configuration (None: the pipeline as it is, or xDiT's) and the ways to run it, as named on the command line."""

    name: str
    config: HybridConfig | None
    ways: list[str]
    rival: str | None = None

    @classmethod
    def parse(cls, name: str) -> Strategy:
        """Read the command line's form.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        config, *ways = name.split(", ")
        if name in rivals.NAMES:
            return cls(name, None, [], name)
        if config not in CONFIGS or not set(ways) <= set(WAYS):
            names = ", ".join([*CONFIGS, *rivals.NAMES])
            raise argparse.ArgumentTypeError(
                f"{name!r}: give one of {names}, and after commas any of {', '.join(WAYS)}"
            )
        return cls(name, CONFIGS[config], ways)

    def runs_here(self, place: group.Place) -> bool:
        """Whether this rank has a part in it."""
        if not self.needs_peer:
            return dist.get_rank() == 0
        return self.rival is not None or "ulysses" in self.ways or "pairs" in self.ways or place.first

    @property
    def alone(self) -> int | None:
        """The rank that runs without a peer."""
        return next((int(way[-1]) for way in self.ways if way.startswith("rank")), None)

    @property
    def needs_peer(self) -> bool:
        return self.rival is not None or (self.config is not None and self.alone is None)

    def is_offered(self, family: str) -> bool:
        """Whether the family can be run so."""
        if self.rival is not None:
            return rivals.degrees(self.rival, family) is not None
        return family == "mmdit" or "ulysses" not in self.ways

    @property
    def pictures(self) -> int:
        return dist.get_world_size() // 2 if "pairs" in self.ways else 1

    @contextmanager
    def applied(
        self, pipe: Any, place: group.Place, scenario: str, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Any, Graphs | None]]:
        """Set the pipeline up, or one for xDiT's strategy; yields what to call and what holds its graphs."""
        if self.rival is not None:
            family, another = SCENARIOS[scenario].family, SCENARIOS[scenario].pipeline(device, dtype)
            yield rivals.apply(self.rival, another, family, dtype), None
            return
        if self.config is None:
            with _graphed(pipe) if "graphs" in self.ways else nullcontext() as graphs:
                yield pipe, graphs
            return
        config = replace(self.config, cuda_graphs="eager" not in self.ways)
        is_alone = self.alone is not None
        with mock.patch.object(hybrid, "Solo", partial(group.Alone, self.alone)) if is_alone else nullcontext():
            sequence = group.ulysses(pipe) if "ulysses" in self.ways else None
            apply_hybrid(pipe, config, group=place.pair, sequence=sequence, model=scenario, simulate=is_alone)
        try:
            yield pipe, getattr(pipe, hybrid._SESSION).graphs
        finally:
            remove_hybrid(pipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["sdxl-1024", "sd3-medium-1024"])
    usual = [Strategy.parse(name) for name in ("one-gpu", "one-gpu, graphs", "cfg", "paper")]
    parser.add_argument("--strategy", nargs="+", type=Strategy.parse, default=usual)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=4, help="in all, half of them in each block")
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="one more, profiled: a Chrome trace a strategy and rank"
    )
    parser.add_argument("--out", type=Path, default=Path("times.jsonl"), help="one JSON line a scenario and strategy")
    args = parser.parse_args()
    strategies = {strategy.name: strategy for strategy in args.strategy}

    Loop.watch()
    device = group.join()
    host = dist.new_group(backend="gloo")
    place = group.Place.of()
    if dist.get_world_size() == 1 and (paired := [name for name, s in strategies.items() if s.needs_peer]):
        raise SystemExit(f"One process cannot run {', '.join(map(repr, paired))}: use two, or ', rank 0'.")
    dtype = torch.float16 if device.type == "cuda" else torch.float32

    if dist.get_rank() == 0:
        args.out.write_text("")
    for scenario in args.scenario:
        pipe = SCENARIOS[scenario].pipeline(device, dtype)
        family = SCENARIOS[scenario].family
        chosen = {name: strategy for name, strategy in strategies.items() if strategy.is_offered(family)}
        lines = _compare(pipe, scenario, chosen, device, dtype, host, place, args)
        del pipe
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            with args.out.open("a") as out:
                out.writelines(json.dumps(line) + "\n" for line in lines)
    dist.destroy_process_group()


def _compare(
    pipe: Any,
    scenario: str,
    strategies: dict[str, Strategy],
    device: torch.device,
    dtype: torch.dtype,
    host: dist.ProcessGroup,
    place: group.Place,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One line a strategy."""
    arguments = dict(SCENARIOS[scenario].arguments(device, dtype), num_inference_steps=args.steps)
    samples: dict[str, list[Sample]] = {name: [] for name in strategies}
    pieces: dict[str, dict[str, float]] = {}
    reports = {}
    for block in range(BLOCKS):
        for name, strategy in strategies.items():
            runs_here = strategy.runs_here(place)
            applied = strategy.applied(pipe, place, scenario, device, dtype) if runs_here else nullcontext()
            with applied as found:
                callee, graphs = found or (None, None)
                call = partial(_call, callee, arguments) if runs_here else _wait
                _time(call, device, host)
                samples[name] += [_time(call, device, host) for _ in range(args.repeats // BLOCKS)]
                pieces[name] = _time_pieces(graphs)
                if args.trace and block == 0:
                    label = re.sub(r"[^\w.-]+", "_", f"{scenario} {name} rank {dist.get_rank()}")
                    _time(partial(_traced, call, args.trace / f"{label}.json"), device, host)
                reports[name] = last_report(pipe)
            if strategy.rival is not None:  # its pipeline must be gone before the next one's memory is measured
                applied = found = callee = call = None
                gc.collect()
                torch.cuda.empty_cache()
    lines = []
    for name in strategies:
        gathered: list[Any] = [None] * dist.get_world_size()
        mine = (samples[name], pieces[name], reports[name])
        dist.all_gather_object(gathered, mine, group=host)
        report = next((report for *_, report in gathered if report), None)
        # Beside xDiT's pipeline lies ours.
        weights = denoiser_of(pipe).parameters()
        spare = sum(t.nbytes for t in weights) if strategies[name].rival and device.type == "cuda" else 0
        plan = report and report["plan"]
        lines.append(
            {
                "scenario": scenario,
                "strategy": name,
                "steps": args.steps,
                "pictures": strategies[name].pictures,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                "dtype": str(dtype).removeprefix("torch."),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "seconds": [max(s.seconds for s in repeat) for repeat in zip(*(g[0] for g in gathered), strict=True)],
                "loop": [max(s.loop for s in repeat) for repeat in zip(*(g[0] for g in gathered), strict=True)],
                "peak_memory": [max(sample.memory for sample in g[0]) - spare for g in gathered],
                "pieces": [g[1] for g in gathered],
                "floor": _floor([g[1] for g in gathered], plan or "F" * args.steps),
                "plan": plan,
                "tau_1": report and report["tau_1"],
                "speedup_bound": report and report["speedup_bound"],
                "bytes_sent": report and report["bytes_sent"][: dist.get_world_size()],
            }
        )
    return lines


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


@contextmanager
def _graphed(pipe: Any) -> Iterator[Graphs]:
    """The pipeline as it is, but for its denoiser's forward (batch 2B), which is called by graph."""
    denoiser: Any = denoiser_of(pipe)
    forward, graphs = denoiser.forward, Graphs(denoiser)
    with torch.no_grad():
        graphs.begin(next(denoiser.parameters()).device)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        graphs.look()
        return graphs("forward", lambda args, kwargs: forward(*args, **kwargs), args, {**kwargs, "return_dict": False})

    denoiser.forward = replayed
    try:
        yield graphs
    finally:
        del denoiser.forward
        graphs.clear()


class Sample(NamedTuple):
    """Seconds until this rank's device is done, from a common start and from the loop's, and peak memory in bytes."""

    seconds: float
    loop: float
    memory: int


class Loop:
    """Where the denoising loop begins: every diffusers pipeline asks for its progress bar there."""

    began = 0.0

    @classmethod
    def watch(cls) -> None:
        original = diffusers.DiffusionPipeline.progress_bar

        def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
            cls.began = time.perf_counter()
            return original(self, *args, **kwargs)

        diffusers.DiffusionPipeline.progress_bar = progress_bar  # type: ignore[method-assign]


def _time(function: Callable[[], None], device: torch.device, host: dist.ProcessGroup) -> Sample:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    dist.barrier(group=host)
    start = Loop.began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    end = time.perf_counter()
    dist.barrier(group=host)
    return Sample(end - start, end - Loop.began, torch.cuda.max_memory_reserved() if device.type == "cuda" else 0)


def _time_pieces(graphs: Graphs | None) -> dict[str, float]:
    """Seconds of each captured piece, replayed on its own: the median of 10, after one to warm up."""
    times = {}
    for name, replay in (graphs.captured() if graphs else {}).items():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
        for mark in marks:
            replay()
            mark.record()
        torch.cuda.synchronize()
        times[name] = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks[1:])) / 1e3
    return times


def _floor(pieces: list[dict[str, float]], plan: str) -> float | None:
    """Seconds of a plan's graphs; None where a kind of step was not captured on every rank with a part in it."""
    pieces = [times for times in pieces if times]
    forward = [max((t for name, t in times.items() if name.startswith("forward")), default=0.0) for times in pieces]
    share = [sum(t for name, t in times.items() if name.startswith("units")) for times in pieces]
    counts = (("F", forward), ("P", share))
    if any(plan.count(kind) and not all(times or [0]) for kind, times in counts):
        return None
    return sum(plan.count(kind) * max(times, default=0.0) for kind, times in counts)


if __name__ == "__main__":
    main()
