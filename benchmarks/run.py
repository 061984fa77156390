"""Time the strategies beside one another, in one run on the same devices.

    torchrun --nproc_per_node 2 benchmarks/run.py --scenario sdxl-1024 sd3-medium-1024 --out times.jsonl
    torchrun --nproc_per_node 2 benchmarks/run.py --scenario sdxl-2048 --whole --strategy one-gpu cfg "cfg, vae"
    torchrun --nproc_per_node 8 benchmarks/run.py --strategy one-gpu cfg "cfg, ulysses" "adaptive 2.5, pairs"
    torchrun --nproc_per_node 1 benchmarks/run.py --strategy one-gpu "fixed 8-48/4, rank 0" "fixed 8-48/4, rank 1"
    python benchmarks/report.py times.jsonl

A strategy is a configuration and, after commas, how it is run:

    eager     without CUDA graphs; ``one-gpu`` is eager unless ``one-gpu, graphs`` is asked for
    compiled  the transformer blocks by ``torch.compile``
    vae       the VAE's decoder split over the ranks of a picture, by DistVAE; with ``--whole``
    ulysses   a branch's tokens split over half of the ranks, by xDiT's Ulysses attention (MMDiTs)
    ring      likewise, by its ring attention
    stages    as many stages as ranks
    pairs     a picture a pair
              With none of these, more than two ranks leave all but the first pair idle. Several of the first three take
              two ranks of a branch each: eight ranks are two branches with ``ulysses, ring`` or ``ulysses, stages``.
    rank 0    what rank 0 does, without a peer: the pictures are wrong and nothing is exchanged, all else is done.
              Needs one GPU; what a second one would change is the time of the exchanges. With ulysses, what the group
              does that has rank 0's part, on all ranks: half of the GPUs that the whole strategy takes.

More processes than GPUs share them, and ours exchange through the host: memory is a rank's, but times mean nothing.

``one-gpu`` is the pipeline as it is, on rank 0, while the others wait on the host. ``both branches`` pipelines both, as
AsyncDiff does (`both_branches.py`). ``xdit cfg``, ``xdit ulysses`` and the like are xDiT's own strategies on all
processes, where it has them for the model (`rivals.py`).

Each strategy has two blocks of repeats, each after a warm-up of its own, and the blocks take turns, so that a drift of
the machine falls on all alike. The *floor* of a strategy is the time of its graphs alone, replayed one after the other:
FULL steps times a branch's forward, plus PIPELINED steps times the slower rank's share. It is compared with the
denoising *loop*: from where the pipeline's progress bar begins to where it ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import group
import rivals
import timing
import torch
import torch.distributed as dist
from both_branches import both_branches
from scenarios import SCENARIOS

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.evaluate.graphs import Graphs
from hybridiff_xdit.ranks.comm import Comm
from hybridiff_xdit.seam import hooks
from hybridiff_xdit.seam.hooks import denoiser_of

CONFIGS: dict[str, HybridConfig | None] = {
    "one-gpu": None,
    "cfg": HybridConfig(policy="cfg"),
    "paper": HybridConfig(policy="paper"),
    "fixed 8-48/2": HybridConfig(plan="8-48/2"),
    "fixed 8-48/4": HybridConfig(plan="8-48/4"),
    # By target: with random weights, what a tolerance saves says nothing of a trained model.
    "adaptive 2.5": HybridConfig(speedup=2.5),
    "adaptive 2.85": HybridConfig(speedup=2.85),
    "adaptive 3.3": HybridConfig(speedup=3.3),
}
BOTH_BRANCHES = "both branches"
#: Its steps before both branches are pipelined: AsyncDiff's fewest.
WARM_UP = 1
WAYS = ("eager", "graphs", "compiled", "vae", "ulysses", "ring", "stages", "pairs", "rank 0", "rank 1")
BLOCKS = 2

logger = logging.getLogger(__name__)


class Strategy(NamedTuple):
    """What is run (of `CONFIGS` or `rivals`, or `BOTH_BRANCHES`), and the ways to run it, as on the command line."""

    name: str
    base: str
    ways: list[str]

    @classmethod
    def parse(cls, name: str) -> Strategy:
        """Read the command line's form.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        base, *ways = name.split(", ")
        allowed = {way for way in WAYS if base in CONFIGS or way == "vae"} - ({"vae"} if base == "one-gpu" else set())
        names = [*CONFIGS, BOTH_BRANCHES, *rivals.NAMES]
        if base not in names or not set(ways) <= allowed:
            raise argparse.ArgumentTypeError(
                f"{name!r}: give one of {', '.join(names)}, and after commas any of {', '.join(WAYS)} (after "
                f"{BOTH_BRANCHES!r} and xDiT's own, 'vae' alone)"
            )
        return cls(name, base, ways)

    @property
    def config(self) -> HybridConfig | None:
        return CONFIGS.get(self.base)

    @property
    def is_rival(self) -> bool:
        return self.base in rivals.NAMES

    def runs_here(self, place: group.Place) -> bool:
        """Whether this rank has a part in it."""
        if self.is_rival or self.degrees or "pairs" in self.ways:
            return True
        return place.first if self.needs_peer else dist.get_rank() == 0

    @property
    def alone(self) -> int | None:
        """The rank that runs without a peer."""
        return next((int(way[-1]) for way in self.ways if way.startswith("rank")), None)

    @property
    def needs_peer(self) -> bool:
        return self.base != "one-gpu" and self.alone is None

    @property
    def degrees(self) -> dict[str, int]:
        """Ranks of a branch along each axis that splits it."""
        return group.degrees(self.ways, dist.get_world_size())

    def is_offered(self, family: str) -> bool:
        """Whether the family can be run so, on so many processes."""
        if self.is_rival:
            return rivals.degrees(self.base, family) is not None
        degrees = self.degrees
        if not degrees:
            return True
        ranks = prod(degrees.values()) * group.branches(self.ways)
        is_whole = min(degrees.values()) > 1 and ranks == dist.get_world_size()
        return is_whole and (family == "mmdit" or degrees.keys() == {"stages"})

    @property
    def pictures(self) -> int:
        return dist.get_world_size() // 2 if "pairs" in self.ways else 1

    @property
    def depends_on_length(self) -> bool:
        """Whether a run of fewer steps does not do what a run of all does, and so does not warm up for it."""
        return "dbcache" in self.base or (self.config is not None and self.config.policy != "cfg")

    def plan(self, steps: int, report: dict[str, Any] | None) -> str:
        """Letters of its steps; F where each evaluates both branches as they are."""
        if self.base == BOTH_BRANCHES:
            return "F" * WARM_UP + "P" * (steps - WARM_UP)
        return report["plan"] if report else "F" * steps

    @contextmanager
    def applied(self, pipe: Any, place: group.Place, name: str, steps: int) -> Iterator[tuple[Any, Graphs | None]]:
        """Set the pipeline up, or one beside it for xDiT's strategy; yields what to call and what holds its graphs."""
        scenario = SCENARIOS[name]
        if self.is_rival:
            beside, is_split = scenario.beside(pipe), "vae" in self.ways
            with _kept_decoder(pipe), rivals.applied(self.base, beside, scenario.family, is_split, steps) as wrapped:
                yield wrapped, None
            return
        with ExitStack() as undo:
            if "compiled" in self.ways:
                undo.enter_context(_compiled(pipe))
            if "vae" in self.ways:
                undo.enter_context(_kept_decoder(pipe))
                group.split_decoder(pipe.vae, place.pair)
            yield pipe, undo.enter_context(self._graphs(pipe, place, name))

    @contextmanager
    def _graphs(self, pipe: Any, place: group.Place, name: str) -> Iterator[Graphs | None]:
        if self.base == BOTH_BRANCHES:
            with both_branches(pipe, WARM_UP, Comm(place.pair), is_timed=True) as graphs:
                yield graphs
            return
        if self.config is None:
            with _graphed(pipe) if "graphs" in self.ways else nullcontext() as found:
                yield found
            return
        layers = self.degrees.get("stages", 1)
        config = replace(self.config, cuda_graphs="eager" not in self.ways, stages=2 * layers)
        is_alone = self.alone is not None
        alone = partial(group.Alone, self.alone) if is_alone else hooks.Solo
        comm = group.ThroughHost if group.gpus_are_shared() else Comm
        with mock.patch.multiple(hooks, Solo=alone, Comm=comm):
            sequence, ranks = group.split_branches(pipe, self.degrees, group.branches(self.ways))
            apply_hybrid(pipe, config, group=ranks or place.pair, sequence=sequence, model=name, simulate=is_alone)
        try:
            yield hooks._SESSIONS[pipe].graphs(denoiser_of(pipe))
        finally:
            remove_hybrid(pipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["sdxl-1024", "sd3-medium-1024"])
    usual = [Strategy.parse(name) for name in ("one-gpu", "one-gpu, graphs", "cfg", "paper")]
    parser.add_argument("--strategy", nargs="+", type=Strategy.parse, default=usual)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=4, help="in all, spread evenly over the blocks")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of repeats; each strategy is set up anew for each")
    parser.add_argument(
        "--warm-up", type=int, metavar="STEPS", help="of a block's first call, where fewer do (default: all)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="from the prompt to the picture: with text encoders and VAE of real size"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a local diffusers folder, in place of random weights"
    )
    parser.add_argument("--idle", action="store_true", help="one more, profiled: how long the GPU runs no kernel")
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="one more, profiled: a Chrome trace a strategy and rank"
    )
    parser.add_argument("--out", type=Path, default=Path("times.jsonl"), help="one JSON line a scenario and strategy")
    args = parser.parse_args()
    strategies = {strategy.name: strategy for strategy in args.strategy}
    if not args.whole and (split := [name for name, strategy in strategies.items() if "vae" in strategy.ways]):
        parser.error(f"{', '.join(map(repr, split))}: nothing is decoded; add --whole.")

    device = group.join()
    loop = timing.Loop(device)
    host = dist.new_group(backend="gloo")
    place = group.Place.of()
    if dist.get_world_size() == 1 and (paired := [name for name, s in strategies.items() if s.needs_peer]):
        raise SystemExit(f"One process cannot run {', '.join(map(repr, paired))}: use two, or ', rank 0'.")

    lines: list[dict[str, Any]] = []
    for name in args.scenario:
        family = SCENARIOS[name].family
        chosen = {name: strategy for name, strategy in strategies.items() if strategy.is_offered(family)}
        left = [repr(name) for name in strategies if name not in chosen]
        if left and dist.get_rank() == 0:
            logger.warning("%s: not offered on %d processes: %s.", name, dist.get_world_size(), ", ".join(left))
        scenarios: list[dict[str, Any]] = []
        for scenarios in _compare(name, chosen, loop, device, host, place, args):
            if dist.get_rank() == 0:  # what is measured is kept, whatever comes next
                args.out.write_text("".join(json.dumps(line) + "\n" for line in lines + scenarios))
        lines += scenarios
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def _compare(
    scenario: str,
    strategies: dict[str, Strategy],
    loop: timing.Loop,
    device: torch.device,
    host: dist.ProcessGroup,
    place: group.Place,
    args: argparse.Namespace,
) -> Iterator[list[dict[str, Any]]]:
    """One line a strategy that has run so far, each time that one has."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe = SCENARIOS[scenario].pipeline(device, dtype, whole=args.whole, checkpoint=args.checkpoint)
    arguments = dict(SCENARIOS[scenario].arguments(pipe), num_inference_steps=args.steps)
    found = dict.fromkeys(strategies, _Found([], [], {}, None, None))
    lines: dict[str, dict[str, Any]] = {}
    for block in range(args.blocks):
        for name, strategy in strategies.items():
            gc.collect()  # xDiT's pipeline, if one was before, must be gone before the next one's memory is measured
            if device.type == "cuda":
                torch.cuda.empty_cache()
            runs_here = strategy.runs_here(place)
            with (
                strategy.applied(pipe, place, scenario, args.steps) if runs_here else nullcontext((None, None)) as (
                    callee,
                    graphs,
                )
            ):
                call = partial(_call, callee, arguments) if runs_here else _wait
                is_short = args.warm_up is not None and not strategy.depends_on_length
                steps = {"num_inference_steps": args.warm_up} if is_short else {}
                warm_up = partial(_call, callee, {**arguments, **steps}) if runs_here else _wait
                # The most memory until the loop's end, before a decoder has left its own behind.
                memory = timing.measure(warm_up, loop, device, host).memory
                spare = _bytes_beside(pipe, strategy) if memory else 0
                samples = [timing.measure(call, loop, device, host) for _ in range(args.repeats // args.blocks)]
                report = last_report(pipe)
                idle = timing.idle_share(call, loop, device) if args.idle and not block else found[name].idle
                found[name] = _Found(
                    found[name].samples + samples,
                    [*found[name].memory, memory - spare],
                    timing.seconds_of_pieces(graphs),
                    report,
                    idle,
                )
                if args.trace and not block:
                    label = re.sub(r"[^\w.-]+", "_", f"{scenario} {name} rank {dist.get_rank()}")
                    timing.trace(call, args.trace / f"{label}.json")
                callee = graphs = call = warm_up = None  # it ends with the block
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, found[name], group=host)
            lines[name] = {
                "scenario": scenario,
                "strategy": name,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                "dtype": str(dtype).removeprefix("torch."),
                "weights": str(args.checkpoint or "random"),
                "whole": args.whole,
                **_line(strategy, args.steps, gathered),
            }
            yield list(lines.values())


def _line(strategy: Strategy, steps: int, ranks: list[_Found]) -> dict[str, Any]:
    """What the ranks found of a strategy, together."""
    report = next((rank.report for rank in ranks if rank.report), None)
    times = list(zip(*(rank.samples for rank in ranks), strict=True))  # a row a repeat
    pieces = [rank.pieces for rank in ranks]
    return {
        "steps": steps,
        "pictures": strategy.pictures,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "seconds": [max(sample.seconds for sample in repeat) for repeat in times],
        "loop": [max(sample.loop for sample in repeat) for repeat in times],
        "after": [max(sample.after for sample in repeat) for repeat in times],
        "peak_memory": [max(rank.memory) for rank in ranks],
        "pieces": pieces,
        "floor": timing.floor(pieces, strategy.plan(steps, report)),
        "idle": [rank.idle for rank in ranks],
        "plan": report and report["plan"],
        "tau_1": report and report["tau_1"],
        "speedup_bound": report and report["speedup_bound"],
        "bytes_sent": report and report["bytes_sent"][: dist.get_world_size()],
    }


class _Found(NamedTuple):
    """Of one strategy on one rank."""

    samples: list[timing.Sample]
    memory: list[int]  # a block
    pieces: dict[str, float]
    report: dict[str, Any] | None
    idle: float | None


def _call(pipe: Any, arguments: dict[str, Any]) -> None:
    pipe(**arguments, generator=torch.Generator().manual_seed(0))


def _wait() -> None:
    """The share of the ranks that have none."""


def _bytes_beside(pipe: Any, strategy: Strategy) -> int:
    """Of the weights that lie on this device beside the strategy's denoiser: text encoders, VAE, and xDiT's twin."""
    parts = [part for name, part in pipe.components.items() if name.startswith("text") or name == "vae"]
    beside = [*parts, *([denoiser_of(pipe)] if strategy.is_rival else [])]
    return sum(weight.nbytes for part in beside if part is not None for weight in part.parameters())


@contextmanager
def _compiled(pipe: Any) -> Iterator[None]:
    from hybridiff_xdit.xdit.groups import compile_blocks

    denoiser = denoiser_of(pipe)
    before = {module: vars(module).get("forward") for module in denoiser.modules()}
    compile_blocks(denoiser)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None and "forward" in vars(module):
                del module.forward


@contextmanager
def _kept_decoder(pipe: Any) -> Iterator[None]:
    """A copy of the VAE's decoder stands in for it: DistVAE changes what it is given for good."""
    if pipe.vae is None:
        yield
        return
    decoder = pipe.vae.decoder
    pipe.vae.decoder = deepcopy(decoder)
    try:
        yield
    finally:
        pipe.vae.decoder = decoder


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


if __name__ == "__main__":
    main()
