"""The frontier: speed-up bound against closeness to the one-GPU pictures, on the small models, in one process.

    python benchmarks/quality.py --model benchmarks/models/emoji-sd3 --out frontier_emoji-sd3.jsonl
    python benchmarks/frontier.py frontier_emoji-sd3.jsonl --out benchmarks/results
    python benchmarks/quality.py --model benchmarks/models/emoji-sdxl --out /tmp/quick.jsonl --quick    # on a CPU

The engine plays both ranks (``simulate=True``). One JSON line a row, written when the row is done: a run that is cut
off goes on where it stopped, when it is started again with the same file. ``--cells`` and ``--curves`` select rows by
patterns, and rows are done in the order of the patterns; ``--list`` shows them.

A *cell* is (steps, guidance scale, solver, dtype): its reference is the plain pipeline in the same dtype. A *curve* is
a strategy with one parameter. The speed-up bound is that of the plan (`Plan.speedup_bound`), for n plain steps in place
of T it is ``2T / n``; an adaptive plan belongs to a call, so the bound is a mean over the batches.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from both_branches import both_branches
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from measures import Judge, psnr
from torch import Tensor

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.config import TOLERANCE
from hybridiff_xdit.ranks.comm import Solo
from hybridiff_xdit.schedule.paper import PAPER_PRESETS
from hybridiff_xdit.schedule.plan import DEFAULT_KINDS

PROMPTS = Path(__file__).parent / "models" / "prompts.txt"
SHOWN = (15, 16, 45, 47)  # prompts whose pictures are kept for the strip
TOLERANCES = tuple(TOLERANCE * factor for factor in (0.5, 1, 2, 4, 8))
SPEEDUPS = (2.05, 2.2, 2.35, 2.5, 2.7, 2.85, 3.0, 3.5, 4.0)
UNSKIPPED = (2.05, 2.3, 2.5, 2.7, 2.85)  # targets where no step may be SKIPPED
FEWER = (49, 48, 45, 42, 40, 37, 35, 33, 28, 25)  # plain steps in place of 50
WINDOWS = (1, 2, 5, 10, 20, 30)  # k of the published rule
PATTERNS = ("8-48/2", "8-47/3", "10-40/2S", "10-40/3S")


@dataclass(frozen=True)
class Cell:
    """What the strategies of one comparison have in common; ``solver`` is the order, ``first`` or ``second``."""

    steps: int = 50
    guidance: float = 5.0
    solver: str = "first"
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"T{self.steps}-w{self.guidance:g}-{self.solver}-{self.dtype}"


class Plain(NamedTuple):
    """The pipeline as it is, with so many steps."""

    steps: int


class BothBranches(NamedTuple):
    """Both branches pipelined after a warm-up of so many steps."""

    warm_up: int


class Cap(NamedTuple):
    """One GPU in the cell's dtype against one GPU in float32: no strategy is closer to float32 than about this."""


class Point(NamedTuple):
    """A strategy of a cell: the curve it lies on, its parameter there, and how it runs."""

    curve: str
    parameter: str | float | None
    run: HybridConfig | Plain | BothBranches | Cap
    is_shown: bool = False  # in the strip
    prompts: int | None = None  # only the first so many, one a call


class Drawn(NamedTuple):
    """Pictures [N, 3, H, W] in [0, 1], float32, and the plan of each batch."""

    pictures: Tensor
    plans: list[str]
    bound: float


# The points of a curve.


def one_gpu(cell: Cell) -> list[Point]:
    return [Point("one GPU", None, Plain(cell.steps), True)]


def fewer(steps: Iterable[int], shown: int | None = None) -> list[Point]:
    return [Point("fewer plain steps", n, Plain(n), n == shown) for n in steps]


def targets(speedups: Iterable[float], shown: float | None = None, kinds: str = DEFAULT_KINDS) -> list[Point]:
    configs = ((s, HybridConfig(policy="adaptive", speedup=s, kinds=kinds)) for s in speedups)
    curve = "ours, target" if kinds == DEFAULT_KINDS else f"ours, target, {kinds} only"
    return [Point(curve, s, config, s == shown) for s, config in configs]


def tolerances(values: Iterable[float], shown: float | None = None) -> list[Point]:
    configs = ((t, HybridConfig(policy="adaptive", tolerance=t)) for t in values)
    return [Point("ours, tolerance", t, config, t == shown) for t, config in configs]


def fixed(patterns: Iterable[str], guidance: str = "deferred") -> list[Point]:
    curve = "ours, fixed" if guidance == "deferred" else f"fixed, {guidance}"
    return [Point(curve, pattern, HybridConfig(plan=pattern, guidance=guidance)) for pattern in patterns]


def paper(family: str, cell: Cell, windows: Iterable[int], guidance: str = "mixed") -> list[Point]:
    """The published rule with windows of k steps, which must end within the run: that bounds tau_cap."""
    cap = PAPER_PRESETS[family].scaled(cell.steps).tau_cap
    curve = "paper" if guidance == "mixed" else f"paper, {guidance}"
    points = []
    for k in windows:
        config = HybridConfig(policy="paper", guidance=guidance, interval=k, tau_cap=min(cap, cell.steps - k))
        points.append(Point(curve, k, config, curve == "paper" and k in (5, 30)))
    return points


def every_full() -> list[Point]:
    """All steps FULL: the pictures of one GPU but for rounding, which evaluates the branches apart."""
    return [Point("cfg", None, HybridConfig(policy="cfg"))]


def study(family: str) -> list[tuple[Cell, Point]]:
    """All rows, the most important first."""
    main, half, brain = Cell(), Cell(dtype="float16"), Cell(dtype="bfloat16")
    cap = Point("cap", None, Cap())
    others = [
        *fixed(PATTERNS),
        *fixed(PATTERNS, "reuse"),
        *paper(family, main, [k for k in WINDOWS if k not in (5, 30)]),
        *paper(family, main, WINDOWS[2:], "none"),
        *paper(family, main, WINDOWS[2:], "reuse"),
        *(Point("both branches", n, BothBranches(n)) for n in (1, 5, 10)),
    ]
    work = [
        (main, one_gpu(main) + targets(SPEEDUPS, shown=2.85) + fewer(FEWER, shown=35)),
        (main, tolerances(TOLERANCES, shown=TOLERANCE) + paper(family, main, (5, 30))),
        (main, targets(UNSKIPPED, kinds="FP")),
        (half, [*one_gpu(half), cap, *every_full()]),
        (half, tolerances(TOLERANCES, shown=TOLERANCE) + targets(SPEEDUPS, shown=2.85)),
        (half, fewer(FEWER, shown=35) + paper(family, half, (5, 30))),
        (brain, [*one_gpu(brain), cap, *every_full()]),
        (brain, tolerances([TOLERANCE]) + targets((2.5, 2.85)) + fewer((40, 35))),
        (half, others),  # the plot takes them from here as long as the main cell has none
        *((cell, grid_points(cell)) for cell in grid("float16") if cell != half),
        (main, every_full() + others),
        *((cell, grid_points(cell)) for cell in grid("float32") if cell != main),
    ]
    return [(cell, point) for cell, points in work for point in points]


def grid(dtype: str) -> list[Cell]:
    """T x w x solver; those that differ from the main cell in one thing only come first."""
    cells = [Cell(t, w, s, dtype) for s in ("first", "second") for w in (5.0, 3.0, 7.5) for t in (50, 28, 20)]
    main = Cell(dtype=dtype)

    def differences(cell: Cell) -> int:
        return (cell.steps != main.steps) + (cell.guidance != main.guidance) + (cell.solver != main.solver)

    return sorted(cells, key=differences)


def grid_points(cell: Cell) -> list[Point]:
    steps = [round(2 * cell.steps / bound) for bound in (2.1, 2.7, 3.4, 4.2)]
    return one_gpu(cell) + tolerances(TOLERANCES[:4]) + fewer(steps)


def quick(family: str) -> list[tuple[Cell, Point]]:
    """A few rows of each kind in short runs, for a CPU and for the tests."""
    main, other = Cell(steps=10), Cell(steps=8, guidance=3.0, solver="second")
    half = Cell(steps=10, dtype="bfloat16")
    work = [
        (main, one_gpu(main) + targets((2.1, 2.2), shown=2.2) + fewer((9, 8, 7), shown=8)),
        (main, tolerances((TOLERANCE, 4 * TOLERANCE), shown=TOLERANCE) + paper(family, main, (1, 2))),
        (main, fixed(["4-9/2"]) + fixed(["4-9/2"], "reuse") + paper(family, main, [1], "none")),
        (main, [Point("both branches", 2, BothBranches(2))]),
        (other, one_gpu(other) + tolerances((TOLERANCE, 4 * TOLERANCE)) + fewer([7])),
        (half, [*one_gpu(half), Point("cap", None, Cap())]),
    ]
    return [(cell, point) for cell, points in work for point in points]


def singles(count: int) -> list[tuple[Cell, Point]]:
    """A plan a picture beside a plan a batch: the main cell's first prompts, one a call."""
    points = targets((2.5, 2.85)) + tolerances([TOLERANCE])
    return [(Cell(), point._replace(curve=f"{point.curve}, one a call", prompts=count)) for point in points]


# Drawing.


class Studio:
    """Draws the prompts with one model: the same noise and the same text embeddings for every strategy of a dtype.

    Args:
        folder: of the model.
        captions: the prompts.
        batch: pictures a call of the pipeline.
    """

    def __init__(self, folder: Path, captions: list[str], batch: int, device: torch.device) -> None:
        self.folder, self.captions, self.batch, self.device = folder, captions, batch, device
        self._pipes: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {}  # pipeline, its scheduler, embeddings
        self._references: dict[Cell, Tensor] = {}

    def draw(self, cell: Cell, run: HybridConfig | Plain | BothBranches, batch: int, count: int) -> Drawn:
        """Pictures of the first ``count`` prompts."""
        pipe, embeds = self._pipe(cell)
        steps = run.steps if isinstance(run, Plain) else cell.steps
        parts, plans, bounds = [], [], []
        with _applied(pipe, run):
            for start in range(0, count, batch):
                stop = min(start + batch, count)
                with both_branches(pipe, run.warm_up, Solo()) if isinstance(run, BothBranches) else nullcontext():
                    pictures = pipe(
                        num_inference_steps=steps,
                        guidance_scale=cell.guidance,
                        latents=_noise(pipe, start, stop),
                        output_type="pt",
                        **{name: tensor[start:stop] for name, tensor in embeds.items()},
                    ).images
                parts.append(pictures.float())
                report = last_report(pipe)
                plans.append(report["plan"] if report else "")
                bounds.append(report["speedup_bound"] if report else 2.0 * cell.steps / steps)
        return Drawn(torch.cat(parts), plans, sum(bounds) / len(bounds))

    def reference(self, cell: Cell) -> Tensor:
        """The one-GPU pictures of a cell, drawn once."""
        if cell not in self._references:
            self._references[cell] = self.draw(cell, Plain(cell.steps), self.batch, len(self.captions)).pictures
        return self._references[cell]

    def _pipe(self, cell: Cell) -> tuple[Any, dict[str, Tensor]]:
        """The pipeline with the cell's dtype and solver, and the prompts' embeddings."""
        if cell.dtype not in self._pipes:
            dtype = getattr(torch, cell.dtype)
            pipe = DiffusionPipeline.from_pretrained(self.folder, torch_dtype=dtype, local_files_only=True)
            pipe.to(self.device).set_progress_bar_config(disable=True)
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            texts = {name: self.captions for name in ("prompt", "prompt_2", "prompt_3")[: 3 if _is_mmdit(pipe) else 2]}
            with torch.no_grad():
                embeds = dict(zip(names, pipe.encode_prompt(**texts), strict=True))
            self._pipes[cell.dtype] = pipe, pipe.scheduler, embeds
        pipe, scheduler, embeds = self._pipes[cell.dtype]
        pipe.scheduler = scheduler if cell.solver == "first" else _second_order(pipe, scheduler)
        return pipe, embeds


def _noise(pipe: Any, start: int, stop: int) -> Tensor:
    """Noise of the prompts, [N, C, H, W]: drawn in float32, because the generator's stream depends on the dtype."""
    denoiser = pipe.transformer if _is_mmdit(pipe) else pipe.unet
    side = denoiser.config.sample_size
    shape = (1, denoiser.config.in_channels, side, side)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(start, stop)])
    return noise.to(pipe.device, denoiser.dtype)


def _is_mmdit(pipe: Any) -> bool:
    return hasattr(pipe, "transformer")


def _second_order(pipe: Any, first_order: Any) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M: one evaluation a step, as the first-order solvers."""
    if _is_mmdit(pipe):
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return DPMSolverMultistepScheduler.from_config(first_order.config)


@contextmanager
def _applied(pipe: Any, run: HybridConfig | Plain | BothBranches) -> Iterator[None]:
    if not isinstance(run, HybridConfig):
        yield
        return
    # The cut shall not depend on the machine.
    apply_hybrid(pipe, replace(run, balance="flops"), simulate=True)
    try:
        yield
    finally:
        remove_hybrid(pipe)


# Rows.


def row_of(studio: Studio, judge: Judge, cell: Cell, point: Point) -> tuple[dict[str, Any], Tensor]:
    """Draw and measure a point; also its pictures."""
    start = time.perf_counter()
    count = point.prompts or len(studio.captions)
    if isinstance(point.run, Cap):
        drawn = Drawn(studio.reference(cell), [""], 2.0)
        measured: dict[str, Any] = judge.beside(drawn.pictures, studio.reference(_in_float32(cell)))
    elif point.curve == "one GPU":
        drawn = Drawn(studio.reference(cell), [""], 2.0)
        measured = judge.alone(drawn.pictures)
    elif point.prompts:
        drawn = studio.draw(cell, point.run, 1, count)
        together = studio.draw(cell, point.run, count, count)
        reference = studio.reference(cell)[:count]
        means = (round(psnr(pictures, reference).mean().item(), 2) for pictures in (drawn.pictures, together.pictures))
        measured = dict(zip(("psnr_mean", "psnr_mean_together"), means, strict=True))
        measured["bound_together"] = round(together.bound, 4)
    else:
        drawn = studio.draw(cell, point.run, studio.batch, count)
        measured = {**judge.beside(drawn.pictures, studio.reference(cell)), **judge.alone(drawn.pictures)}
    return {
        **_key(studio.folder, cell, point, count),
        "steps": cell.steps,
        "guidance_scale": cell.guidance,
        "solver": cell.solver,
        "dtype": cell.dtype,
        "bound": round(drawn.bound, 4),
        "plan": drawn.plans[0],  # of the first batch
        "plans": len(set(drawn.plans)),  # that differ
        **measured,
        "batch": 1 if point.prompts else studio.batch,
        "seconds": round(time.perf_counter() - start, 2),
    }, drawn.pictures


def _in_float32(cell: Cell) -> Cell:
    return Cell(cell.steps, cell.guidance, cell.solver)


def _key(folder: Path, cell: Cell, point: Point, prompts: int) -> dict[str, Any]:
    """What makes a row the same row."""
    return {
        "model": folder.name,
        "cell": str(cell),
        "curve": point.curve,
        "parameter": point.parameter,
        "prompts": prompts,
    }


def selected(work: list[tuple[Cell, Point]], cells: list[str], curves: list[str]) -> list[tuple[Cell, Point]]:
    """The rows that fit a pattern of each, in the order of the patterns of cells, then of curves."""

    def rank(text: str, patterns: list[str]) -> int:
        return next((i for i, pattern in enumerate(patterns) if fnmatch(text, pattern)), -1)

    ranked = [((rank(str(cell), cells), rank(point.curve, curves)), cell, point) for cell, point in work]
    return [(cell, point) for ranks, cell, point in sorted(ranked, key=lambda item: item[0]) if min(ranks) >= 0]


def run(
    folder: Path,
    out: Path,
    work: list[tuple[Cell, Point]],
    *,
    prompts: int,
    batch: int,
    seconds: float = float("inf"),
    clip: Path | None = None,
) -> None:
    """Append the rows that the file does not hold yet, and keep the pictures of the strip beside it (.npz).

    Args:
        folder: of the model.
        out: JSON lines.
        prompts: how many of the list.
        batch: pictures a call.
        seconds: no row is begun after so many.
        clip: folder of a CLIP checkpoint.
    """
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    captions = PROMPTS.read_text().splitlines()[:prompts]
    studio, judge = Studio(folder, captions, batch, device), Judge(captions, device, clip)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    shown_file = out.with_suffix(".npz")
    shown = dict(np.load(shown_file)) if shown_file.exists() else {}
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}",
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "torchmetrics")},
    }
    for cell, point in work:
        key = _key(folder, cell, point, point.prompts or prompts)
        if any(key.items() <= row.items() for row in done):
            continue
        if time.perf_counter() - begin > seconds:
            print("out of time: start again with the same file to go on")
            return
        row, pictures = row_of(studio, judge, cell, point)
        with out.open("a") as file:
            file.write(json.dumps({**row, **facts}) + "\n")
        if point.is_shown:
            few = pictures[[i for i in SHOWN if i < prompts] or [0]].permute(0, 2, 3, 1)
            shown[f"{cell}/{point.curve}/{point.parameter}"] = (255 * few).round().byte().cpu().numpy()
            np.savez_compressed(shown_file, **shown)  # type: ignore[arg-type]
        parameter = "" if point.parameter is None else f" {point.parameter}"
        print(
            f"{cell}  {point.curve}{parameter}: bound {row['bound']}, PSNR {row.get('psnr')}, {row['seconds']} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of emoji-sd3 or emoji-sdxl")
    parser.add_argument("--out", type=Path, default=Path("frontier.jsonl"), help="JSON lines, added to")
    parser.add_argument("--prompts", type=int, help="default 256; quick: 4")
    parser.add_argument("--batch", type=int, default=64, help="pictures a call")
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns, such as T50-w5-first-* *-float16")
    parser.add_argument("--curves", nargs="+", default=["*"], help="patterns, such as 'one GPU' 'ours*' fewer*")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--quick", action="store_true", help="short runs and few rows, for a CPU")
    parser.add_argument("--single", type=int, metavar="N", help="only: a plan a picture, for the first N prompts")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP checkpoint, for the CLIP score")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    args = parser.parse_args()
    family = "mmdit" if (args.model / "transformer").exists() else "unet"
    work = singles(args.single) if args.single else quick(family) if args.quick else study(family)
    work = selected(work, args.cells, args.curves)
    if args.list:
        print("\n".join(f"{cell}  {point.curve}  {point.parameter}" for cell, point in work), f"\n{len(work)} rows")
        return
    prompts = args.prompts or (4 if args.quick else 256)
    run(args.model, args.out, work, prompts=prompts, batch=args.batch, seconds=args.seconds, clip=args.clip)


if __name__ == "__main__":
    main()
