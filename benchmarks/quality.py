"""The study of fidelity: how far each way of saving time leads from the pictures of one GPU, on one small model.

    python benchmarks/quality.py --model benchmarks/models/emoji-sd3 --out rows.jsonl
    python benchmarks/frontier.py rows.jsonl --out benchmarks/results/study
    python benchmarks/quality.py --model benchmarks/models/emoji-sdxl --out quick.jsonl --quick    # on a CPU

The engine plays both ranks (``simulate=True``). One JSON line a row, written when the row is done: a run that is cut
off goes on where it stopped, when it is started again with the same file. ``--cells`` and ``--curves`` select rows by
patterns, and rows are done in the order of the patterns; ``--list`` shows them.

A *cell* is (steps, guidance, solver, dtype): its reference is the plain pipeline. A *curve* is a strategy with one
parameter. The speed-up bound is over one GPU: that of the plan (`Plan.speedup_bound`), a mean over the calls, as each
has a plan of its own; ``2T / n`` for n plain steps in place of T; and 2 over the evaluated share for those who skip
(`skippers`), as if two GPUs evaluated the branches side by side. In the main cell there is a second reference, the
nearly exact solution of the differential equation.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from models.sample import FILES, arguments, noise
from skippers import METHODS, skipping
from torch import Tensor

from hybridiff_xdit import HybridConfig, apply_hybrid, last_report, remove_hybrid
from hybridiff_xdit.config import TOLERANCE
from hybridiff_xdit.measures import psnr, ssim
from hybridiff_xdit.schedule.paper import PAPER_PRESETS

BOUNDS = (2.2, 2.5, 2.86, 3.33, 4.0, 5.0, 6.0)
TOLERANCES = tuple(TOLERANCE * factor for factor in (0.25, 0.5, 1, 2, 4))
FEWER = (48, 45, 40, 35, 30, 25, 20, 17)  # plain steps in place of 50
BETTER = (40, 30, 25, 20, 17)  # steps of a better solver
#: Every n-th step FULL, the others SKIPPED, over the whole of a run or its middle.
EVEN = ("14-34/2S", "20-40/2S", "10-40/2S", "16-46/2S", "6-46/2S", "10-40/3S", "8-47/3S", "8-48/4S", "8-48/5S",
        "6-48/6S")  # fmt: skip
WINDOWS = (5, 10, 20, 30)  # k of the published rule
EXACT = 400  # steps of UniPC, for the nearly exact solution
BATCH = 16  # pictures a call of ours
PLAIN_BATCH = 64  # of a strategy whose plan does not depend on the other pictures of its call

#: The parameters of those who skip.
SKIPPED = {
    "DBCache": (0.03, 0.06, 0.12, 0.24, 0.5),
    "DBCache + TaylorSeer": (0.03, 0.06, 0.12, 0.24, 0.5),
    "first block": (0.03, 0.06, 0.12, 0.24),
    "SeaCache": (0.1, 0.2, 0.4),
    "MagCache": (0.06, 0.12, 0.24),
    "DeepCache": (2, 3, 5),
    "Taylor 1": (2, 3, 4, 5),
    "Taylor 2": (2, 3, 4, 5),
    "Spectrum": (2, 3, 4, 5),
    "delta reuse": (0.8, 0.6, 0.4, 0.2),
}

#: Guidance scales that change during a run, by the share of it that is over and the step.
CHANGES: dict[str, Callable[[float, int], float]] = {
    "interval": lambda share, step: 5.0 if 0.2 <= share < 0.8 else 1.01,
    "spikes": lambda share, step: 10.0 if step % 10 == 9 else 5.0,
    "ramp": lambda share, step: 2.0 + 6.0 * share,
    "alternation": lambda share, step: 7.0 if step % 2 else 3.0,
}


@dataclass(frozen=True)
class Cell:
    """What the strategies of one comparison have in common.

    Attributes:
        guidance: the scale, or the name of one of `CHANGES`.
        solver: "first" (Euler or DDIM), "unipc" or "dpm" (DPM-Solver++ 2M).
    """

    steps: int = 50
    guidance: float | str = 5.0
    solver: str = "first"
    dtype: str = "float32"

    def __str__(self) -> str:
        guidance = self.guidance if isinstance(self.guidance, str) else f"w{self.guidance:g}"
        return f"T{self.steps}-{guidance}-{self.solver}-{self.dtype}"


class Plain(NamedTuple):
    """The pipeline as it is, with so many steps; the solver, if it is not the cell's."""

    steps: int
    solver: str | None = None


class Skip(NamedTuple):
    """A method of `skippers`."""

    method: str
    parameter: float


class Cap(NamedTuple):
    """One GPU in the cell's dtype beside one GPU in float32: no strategy is closer to float32 than about this."""


class Point(NamedTuple):
    """A strategy of a cell: the curve it lies on, its parameter there, and how it runs."""

    curve: str
    parameter: str | float | None
    run: HybridConfig | Plain | Skip | Cap


class Drawn(NamedTuple):
    """Pictures [N, 3, H, W] in [0, 1], float32 (a clip is its frames, one below the other), and each call's plan."""

    pictures: Tensor
    plans: list[str]
    bound: float
    error: float | None = None  # as estimated, the mean over the calls


# The points of a curve.


def targets(speedups: Iterable[float]) -> list[Point]:
    return [Point("ours, target", s, HybridConfig(policy="adaptive", speedup=s)) for s in speedups]


def tolerances(values: Iterable[float]) -> list[Point]:
    return [Point("ours, tolerance", t, HybridConfig(policy="adaptive", tolerance=t)) for t in values]


def even(patterns: Iterable[str]) -> list[Point]:
    return [Point("ours, evenly spaced", pattern, HybridConfig(plan=pattern)) for pattern in patterns]


def fewer(steps: Iterable[int]) -> list[Point]:
    return [Point("fewer plain steps", n, Plain(n)) for n in steps]


def better(solver: str, steps: Iterable[int]) -> list[Point]:
    return [Point(f"fewer steps, {solver}", n, Plain(n, solver)) for n in steps]


def paper(family: str, windows: Iterable[int]) -> list[Point]:
    """The published rule with windows of k steps, which must end within the run: that bounds tau_cap."""
    cap, steps = PAPER_PRESETS[family].tau_cap, Cell().steps
    return [
        Point("paper", k, HybridConfig(policy="paper", guidance="mixed", interval=k, tau_cap=min(cap, steps - k)))
        for k in windows
    ]


def one_gpu(cell: Cell) -> list[Point]:
    return [Point("one GPU", None, Plain(cell.steps))]


def skippers(pipe: Any, parameters: dict[str, tuple[float, ...]]) -> list[Point]:
    """Those who skip, where they run on this pipeline."""
    chosen = {name: values for name, values in parameters.items() if METHODS[name].applies(pipe)}
    return [Point(name, value, Skip(name, value)) for name, values in chosen.items() for value in values]


def study(pipe: Any) -> list[tuple[Cell, Point]]:
    """All rows, the most important first."""
    main = Cell()
    work = [
        (main, one_gpu(main) + tolerances(TOLERANCES) + targets(BOUNDS) + even(EVEN) + fewer(FEWER)),
        (main, skippers(pipe, SKIPPED) + [point for solver in solvers(pipe)[1:] for point in better(solver, BETTER)]),
        *((cell, grid_points(cell)) for cell in grid(pipe) if cell != main),
        *(
            (cell, one_gpu(cell) + tolerances(TOLERANCES[1:4]))
            for cell in (Cell(guidance=name) for name in changes(pipe))
        ),
        *(
            (cell, [*grid_points(cell), Point("cap", None, Cap())])
            for cell in (Cell(dtype="float16"), Cell(dtype="bfloat16"))
        ),
        *([(main, paper("mmdit" if "3" in type(pipe).__name__ else "unet", WINDOWS))] if is_published(pipe) else []),
    ]
    return [(cell, point) for cell, points in work for point in points]


def changes(pipe: Any) -> list[str]:
    """The changes of guidance that a pipeline can run: a callback must reach its scale."""
    return list(CHANGES) if type(pipe).__name__.startswith("StableDiffusion") else []


def is_published(pipe: Any) -> bool:
    """Whether the paper has a preset for the pipeline."""
    return type(pipe).__name__ in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline")


def solvers(pipe: Any) -> tuple[str, ...]:
    """Those that the pipeline takes. Qwen-Image's sets the noise levels, which DPM-Solver++ has no use for."""
    return ("first", "unipc") if type(pipe).__name__ == "QwenImagePipeline" else ("first", "unipc", "dpm")


def grid(pipe: Any) -> list[Cell]:
    """T x w x solver; those that differ from the main cell in one thing only come first."""
    cells = [Cell(t, w, s) for s in solvers(pipe) for w in (5.0, 3.0, 7.5) for t in (50, 30, 20)]
    main = Cell()
    return sorted(
        cells, key=lambda c: (c.steps != main.steps) + (c.guidance != main.guidance) + (c.solver != main.solver)
    )


def grid_points(cell: Cell) -> list[Point]:
    steps = [round(2 * cell.steps / bound) for bound in (2.1, 2.5, 3.0, 3.6)]
    return one_gpu(cell) + tolerances(TOLERANCES[1:4]) + fewer(steps)


def quick(pipe: Any) -> list[tuple[Cell, Point]]:
    """A few rows of each kind in short runs, for a CPU and for the tests."""
    main, other, half = Cell(10), Cell(8, 3.0, "unipc"), Cell(10, dtype="bfloat16")
    work = [
        (main, one_gpu(main) + targets((2.2, 2.5)) + tolerances((TOLERANCE, 8 * TOLERANCE)) + even(["4-8/2S"])),
        (main, fewer((9, 8, 7)) + skippers(pipe, {"Taylor 1": (2,), "delta reuse": (0.5,)}) + better("unipc", [8])),
        (other, one_gpu(other) + tolerances((TOLERANCE, 8 * TOLERANCE)) + fewer([7])),
        (half, [*one_gpu(half), Point("cap", None, Cap())]),
    ]
    return [(cell, point) for cell, points in work for point in points]


# Drawing.


class Studio:
    """Draws the prompts with one model, from the same noise for every strategy.

    Args:
        folder: of the model.
        count: of prompts.
        batch: pictures a call.
    """

    def __init__(self, folder: Path, count: int, batch: int, device: torch.device) -> None:
        self.folder, self.batch, self.device = folder, batch, device
        self._pipes: dict[str, tuple[Any, Any]] = {}  # by dtype, with its scheduler
        self._references: dict[tuple[Cell, Plain], Tensor] = {}
        self.pipe = self._pipe(Cell())
        file = FILES.get(type(self.pipe).__name__, "prompts.txt")
        self.prompts = (Path(__file__).parent / "models" / file).read_text().splitlines()[:count]

    def draw(self, cell: Cell, run: HybridConfig | Plain | Skip) -> Drawn:
        """All pictures."""
        pipe = self._pipe(cell, run.solver if isinstance(run, Plain) else None)
        steps = run.steps if isinstance(run, Plain) else cell.steps
        depends = run == Plain(cell.steps) or (isinstance(run, HybridConfig) and run.plan is None)
        batch = self.batch if depends else max(self.batch, PLAIN_BATCH)
        parts, plans, bounds, errors = [], [], [], []
        with _applied(pipe, run, steps) as bound:
            for start in range(0, len(self.prompts), batch):
                parts.append(self._call(pipe, cell, steps, range(start, min(start + batch, len(self.prompts)))))
                report = last_report(pipe)
                plans.append(report["plan"] if report else "")
                bounds.append(report["speedup_bound"] if report else bound(cell.steps))
                errors.append(report["estimated_error"] if report else None)
        error = None if None in errors else sum(errors) / len(errors)
        return Drawn(torch.cat(parts), plans, sum(bounds) / len(bounds), error)

    def reference(self, cell: Cell, run: Plain | None = None) -> Tensor:
        """The one-GPU pictures of a cell, or of other steps, drawn once."""
        run = run or Plain(cell.steps)
        if (cell, run) not in self._references:
            self._references[cell, run] = self.draw(cell, run).pictures
        return self._references[cell, run]

    def _call(self, pipe: Any, cell: Cell, steps: int, seeds: range) -> Tensor:
        change = CHANGES.get(str(cell.guidance))
        given = arguments(pipe, [self.prompts[i] for i in seeds], change(0.0, 0) if change else float(cell.guidance))
        if change:

            def after(pipe: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
                pipe._guidance_scale = change((step + 1) / steps, step + 1)
                return kept

            given["callback_on_step_end"] = after
        given |= {"num_inference_steps": steps, "latents": noise(pipe, seeds), "output_type": "pt"}
        drawn = pipe(**given)
        if "frames" not in drawn:
            return drawn.images.float()
        return torch.as_tensor(drawn.frames).float().transpose(1, 2).flatten(2, 3)  # [N, F, 3, H, W] before

    def _pipe(self, cell: Cell, solver: str | None = None) -> Any:
        """The pipeline with the cell's dtype and solver."""
        if cell.dtype not in self._pipes:
            dtype = getattr(torch, cell.dtype)
            pipe = DiffusionPipeline.from_pretrained(self.folder, torch_dtype=dtype, local_files_only=True)
            pipe.to(self.device).set_progress_bar_config(disable=True)
            self._pipes[cell.dtype] = pipe, pipe.scheduler
        pipe, scheduler = self._pipes[cell.dtype]
        pipe.scheduler = solver_of(scheduler, solver or cell.solver)
        return pipe


def solver_of(scheduler: Any, solver: str) -> Any:
    """That solver on the time steps of a pipeline's own scheduler; one evaluation a step."""
    config = scheduler.config
    better = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    if "beta_schedule" in config and not config.get("use_flow_sigmas"):
        names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing", "steps_offset")
        kept = {name: config[name] for name in names if name in config}
        if solver == "first":
            return DDIMScheduler(**kept, clip_sample=False, set_alpha_to_one=False)
        return better(**kept)
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if solver == "first" and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if solver == "first":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return better(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@contextmanager
def _applied(pipe: Any, run: HybridConfig | Plain | Skip, steps: int) -> Iterator[Callable[[int], float]]:
    """Have the pipeline run so; what says the bound in place of so many plain steps, where no plan does."""
    if isinstance(run, Plain):
        yield lambda whole: 2.0 * whole / steps
    elif isinstance(run, Skip):
        with skipping(pipe, run.method, run.parameter, steps) as work:
            yield lambda whole: 2.0 / work.share
    else:
        # The cut shall not depend on the machine.
        apply_hybrid(pipe, replace(run, balance="flops"), simulate=True)
        try:
            yield lambda whole: 2.0
        finally:
            remove_hybrid(pipe)


# Rows.


def row_of(studio: Studio, cell: Cell, point: Point, is_exact: bool) -> dict[str, Any]:
    """Draw and measure a point, if asked beside the nearly exact solution too."""
    start = time.perf_counter()
    if isinstance(point.run, Cap):
        drawn = Drawn(studio.reference(cell), [""], 2.0)
        reference = studio.reference(replace(cell, dtype="float32"))
    elif point.curve == "one GPU":
        drawn, reference = Drawn(studio.reference(cell), [""], 2.0), None
    else:
        drawn, reference = studio.draw(cell, point.run), studio.reference(cell)
    measured: dict[str, Any] = {}
    if reference is not None:
        measured = {"psnr": _summary(drawn.pictures, reference), "ssim": round(ssim(drawn.pictures, reference), 5)}
    if is_exact:
        measured["psnr_exact"] = _summary(drawn.pictures, studio.reference(cell, Plain(EXACT, "unipc")))
    return {
        **_key(studio, cell, point),
        "steps": cell.steps,
        "guidance_scale": cell.guidance,
        "solver": cell.solver,
        "dtype": cell.dtype,
        "bound": round(drawn.bound, 4),
        "plan": drawn.plans[0],  # of the first batch
        "plans": len(set(drawn.plans)),  # that differ
        "estimated_error": drawn.error,
        **measured,
        "batch": studio.batch,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _summary(pictures: Tensor, reference: Tensor) -> list[float]:
    """Mean and 5th percentile."""
    values = psnr(pictures, reference)
    return [round(values.mean().item(), 2), round(values.quantile(0.05).item(), 2)]


def _key(studio: Studio, cell: Cell, point: Point) -> dict[str, Any]:
    """What makes a row the same row."""
    return {
        "model": studio.folder.name,
        "cell": str(cell),
        "curve": point.curve,
        "parameter": point.parameter,
        "prompts": len(studio.prompts),
    }


def selected(work: list[tuple[Cell, Point]], cells: list[str], curves: list[str]) -> list[tuple[Cell, Point]]:
    """The rows that fit a pattern of each, in the order of the patterns of cells, then of curves."""

    def rank(text: str, patterns: list[str]) -> int:
        return next((i for i, pattern in enumerate(patterns) if fnmatch(text, pattern)), -1)

    ranked = [((rank(str(cell), cells), rank(point.curve, curves)), cell, point) for cell, point in work]
    return [(cell, point) for ranks, cell, point in sorted(ranked, key=lambda item: item[0]) if min(ranks) >= 0]


def run(studio: Studio, out: Path, work: list[tuple[Cell, Point]], seconds: float = float("inf")) -> None:
    """Append the rows that the file does not hold yet.

    Args:
        out: JSON lines.
        seconds: no row is begun after so many.
    """
    begin = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    facts = {
        "device": torch.cuda.get_device_name() if studio.device.type == "cuda" else f"CPU {platform.machine()}",
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    for cell, point in work:
        key = _key(studio, cell, point)
        if any(key.items() <= row.items() for row in done):
            continue
        if time.perf_counter() - begin > seconds:
            print("out of time: start again with the same file to go on")
            return
        row = row_of(studio, cell, point, is_exact=cell == Cell())
        with out.open("a") as file:
            file.write(json.dumps({**row, **facts}) + "\n")
        parameter = "" if point.parameter is None else f" {point.parameter}"
        measured = f"PSNR {row.get('psnr')}, {row['seconds']} s"
        print(f"{studio.folder.name}  {cell}  {point.curve}{parameter}: bound {row['bound']}, {measured}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a small model")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"), help="JSON lines, added to")
    parser.add_argument("--prompts", type=int, help="default 128; quick: 4")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures a call of ours")
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns, such as T50-w5-first-* *-float16")
    parser.add_argument("--curves", nargs="+", default=["*"], help="patterns, such as 'one GPU' 'ours*' fewer*")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--quick", action="store_true", help="short runs and few rows, for a CPU")
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studio = Studio(args.model, args.prompts or (4 if args.quick else 128), args.batch, device)
    work = selected((quick if args.quick else study)(studio.pipe), args.cells, args.curves)
    if args.list:
        print("\n".join(f"{cell}  {point.curve}  {point.parameter}" for cell, point in work), f"\n{len(work)} rows")
        return
    run(studio, args.out, work, args.seconds)


if __name__ == "__main__":
    main()
