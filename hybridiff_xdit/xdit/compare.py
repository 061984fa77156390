"""``xdit-hybrid compare``: a model's pictures plainly, exactly on the ranks, and at several tolerances, side by side.

The pipeline is diffusers' own, so it may be any that `apply_hybrid` takes. The first rank makes the plain pictures
while the others wait, and measures and writes: ``compare.md``, ``compare.jsonl`` and ``compare.png``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import statistics
import sys
import textwrap
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import TOLERANCE, HybridConfig
from ..seam.checkpoints import FamilyCheckpoint, resolve
from . import options, output, processes

logger = logging.getLogger(__name__)

PLAIN = "plain"
FACTORS = [digit * 10**power for power in range(4) for digit in (1, 2, 5)]  # by which a difference may be amplified
SHOWN = 4  # prompts, or frames of all videos together, in the picture
_CALL = ("height", "width", "num_inference_steps", "guidance_scale", "num_frames", "negative_prompt")


@dataclass
class Result:
    """What a strategy made of a prompt.

    Attributes:
        seconds: of the denoising, one a repeat.
        plan: a letter a step; None where the pipeline ran as it always does.
        bound: of the speed-up over one GPU.
        psnr: to the plain pictures, in dB, as the others are to them; of a video the mean over its frames.
        lpips: None where its weights are not on this disk.
    """

    strategy: str
    prompt: str
    seconds: list[float]
    plan: str | None
    bound: float | None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


def build_parser() -> argparse.ArgumentParser:
    """Parser of ``xdit-hybrid compare``."""
    parser = argparse.ArgumentParser(
        prog="xdit-hybrid compare",
        description="Make a model's pictures plainly, exactly on the ranks, and at the given tolerances and speed-ups. "
        "Writes a table (compare.md, compare.jsonl), and the pictures side by side with their amplified differences "
        "(compare.png).",
    )
    add = parser.add_argument
    add("--model", required=True, help="as for a run, or any other pipeline of diffusers: a folder, or a hub id")
    add("--prompt", nargs="+", default=[], help="one or more")
    add("--prompts", type=Path, metavar="FILE", help="more of them, one a line")
    add(*options.spellings("negative_prompt"))
    for name in ("height", "width", "num_inference_steps", "num_frames"):
        add(*options.spellings(name), type=int, metavar="N", help="default: as a run")
    add(*options.spellings("guidance_scale"), type=float, metavar="W", help="default: as a run")
    add("--seed", type=int, default=42, help="of every picture (default: 42)")
    add("--tolerances", type=float, nargs="+", default=[], metavar="T", help=f"default: {TOLERANCE}")
    add("--speedups", type=float, nargs="+", default=[], metavar="S", help="bounds of the speed-up, such as 2.5")
    add("--repeats", type=int, default=1, metavar="N", help="of each call, besides the first, which is a warm-up")
    add("--out", type=Path, required=True, metavar="DIR", help="is made if it is not there")
    options.add_launch_options(parser)
    return parser


def read(argv: list[str], gpus: int, processes: int | None = None) -> argparse.Namespace:
    """The flags, checked; ``prompt``, ``nproc_per_node`` and ``processes``, those of all nodes, are filled in.

    Args:
        argv: the flags.
        gpus: GPUs of this machine.
        processes: that there are; None if they are yet to be launched.

    Raises:
        ValueError: with the flag and the mend.
    """
    args = build_parser().parse_args(argv)
    if missing := [name for name in ("matplotlib", "torchmetrics") if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install hybridiff_xdit[compare].")
    lines = args.prompts.read_text().splitlines() if args.prompts and args.prompts.is_file() else []
    args.prompt += [line for line in lines if line.strip()]
    if not args.prompt:
        raise ValueError("no prompt: give --prompt, or --prompts with a file that has one a line.")
    if args.repeats < 1:
        raise ValueError("--repeats: give a whole number, 1 or more.")
    if not args.nproc_per_node:
        args.nproc_per_node = 1 if gpus == 1 or args.nnodes > 1 else 2
    if 0 < gpus < args.nproc_per_node:
        raise ValueError(f"--nproc_per_node {args.nproc_per_node}: there are {gpus} GPUs.")
    args.processes = processes or args.nproc_per_node * args.nnodes
    if args.nnodes > 1 and args.master_port is None:
        raise ValueError("--nnodes > 1 needs --master_addr and --master_port, the same on every node.")
    strategies(args)
    return args


def strategies(args: argparse.Namespace) -> dict[str, HybridConfig | None]:
    """What is compared, by name; None is the pipeline as it is.

    Raises:
        ValueError: a tolerance or a speed-up is out of range.
    """
    is_alone = args.processes == 1
    tolerances = args.tolerances or ([] if args.speedups else [TOLERANCE])
    targets = {f"speed-up {speedup:g}": HybridConfig(speedup=speedup) for speedup in args.speedups}
    for config in () if is_alone else targets.values():
        options.refuse_low(config)
    return {
        PLAIN: None,
        **({} if is_alone else {"exact": HybridConfig(policy="cfg")}),
        **{f"tolerance {tolerance:g}": HybridConfig(tolerance=tolerance) for tolerance in tolerances},
        **targets,
    }


def main(argv: list[str] | None = None) -> None:
    """Make the pictures and measure them; one process of them."""
    ranks, is_first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    args = read(sys.argv[1:] if argv is None else argv, 0, ranks)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    waiting = None
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        waiting = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # for one that works alone
    with output.loading(args.verbose):
        pipe, call = load(args, device)
    denoising = output.Denoising(pipe)
    results, made = [], {}
    for name, config in strategies(args).items():
        if is_first or config is not None:
            try:
                found, made[name] = make(pipe, denoising, name, config, call, args)
                results += found
            except ValueError as error:  # all ranks have it: this run has too few steps for the target, say
                if config is None:
                    raise
                logger.warning("%s is left out: %s", name, error)
        if waiting is not None:
            dist.barrier(waiting)
    if is_first:
        measure(results, made, device)
        args.out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        write(results, made, args, f"{name}, {ranks} process{'es' * (ranks > 1)}", call)
    if waiting is not None:
        dist.barrier(waiting)
        dist.destroy_process_group()


def load(args: argparse.Namespace, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call that are the same for every prompt.

    Raises:
        UsageError: there is no such model, or its pipeline has no such argument.
    """
    from diffusers import DiffusionPipeline

    call = {name: getattr(args, name) for name in _CALL if getattr(args, name) is not None}
    try:
        checkpoint = resolve(args.model)
    except ValueError as error:
        raise processes.UsageError(f"xdit-hybrid compare: error: {error}") from error
    if isinstance(checkpoint, FamilyCheckpoint):
        size = {"height": checkpoint.size, "width": checkpoint.size}
        call = {**size, "num_inference_steps": checkpoint.steps, "guidance_scale": checkpoint.guidance_scale, **call}
    pipe = DiffusionPipeline.from_pretrained(
        checkpoint.source,
        dtype=checkpoint.dtype if device.type == "cuda" else torch.float32,
        **dict.fromkeys(checkpoint.absent),
    )
    accepted = inspect.signature(pipe.__call__).parameters
    if wrong := [f"--{name}" for name in call if name not in accepted]:
        raise processes.UsageError(f"xdit-hybrid compare: error: {type(pipe).__name__} has no {', '.join(wrong)}.")
    return pipe.to(device), call


def make(
    pipe: Any,
    denoising: output.Denoising,
    name: str,
    config: HybridConfig | None,
    call: dict[str, Any],
    args: argparse.Namespace,
) -> tuple[list[Result], list[torch.Tensor]]:
    """A strategy's pictures of every prompt, each [frames, 3, H, W] in [0, 1], on the first rank alone."""
    from ..seam.hooks import apply_hybrid, last_report, remove_hybrid

    is_first = os.environ.get("RANK", "0") == "0"
    results, made = [], []
    if config is not None:
        apply_hybrid(pipe, config, model=args.model)
    try:
        for number, prompt in enumerate(args.prompt):
            seconds: list[float] = []
            for repeat in range(args.repeats + (number == 0)):
                is_warm_up = number == 0 and repeat == 0
                denoising.show(f"{name}, {'warm-up' if is_warm_up else f'prompt {number + 1} of {len(args.prompt)}'}")
                generator = torch.Generator(pipe._execution_device).manual_seed(args.seed)
                kind = "np" if is_first else "latent"  # what nobody will see needs no decoding
                drawn = pipe(prompt=prompt, **call, generator=generator, output_type=kind)
                seconds += [] if is_warm_up else [denoising.seconds]
            report = last_report(pipe) if config else None
            plan, bound = (report["plan"], report["speedup_bound"]) if report else (None, None)
            results.append(Result(name, prompt, seconds, plan, bound))
            if is_first:
                made.append(_frames(drawn))
    finally:
        if config is not None:
            remove_hybrid(pipe)
    return results, made


def _frames(drawn: Any) -> torch.Tensor:
    """The picture, or the frames of the video, of a pipeline's output: [frames, 3, H, W]."""
    found = np.array((drawn.frames if hasattr(drawn, "frames") else drawn.images)[0])  # [(F,) H, W, 3]
    return torch.from_numpy(found[None] if found.ndim == 3 else found).float().permute(0, 3, 1, 2).contiguous()


def measure(results: list[Result], made: dict[str, list[torch.Tensor]], device: torch.device) -> None:
    """Fill in how close every picture is to the plain one."""
    from ..measures import lpips, psnr, ssim

    perceptual = lpips(device)
    for index, result in enumerate(results):
        if result.strategy != PLAIN:
            number = index % len(made[PLAIN])
            ours, plain = (made[name][number][:, None].to(device) for name in (result.strategy, PLAIN))
            pairs = list(zip(ours, plain, strict=True))  # a frame at a time, [1, 3, H, W]
            result.psnr = statistics.fmean(psnr(*pair).item() for pair in pairs)
            result.ssim = statistics.fmean(ssim(*pair) for pair in pairs)
            result.lpips = statistics.fmean(perceptual(*pair) for pair in pairs) if perceptual else None


def write(
    results: list[Result],
    made: dict[str, list[torch.Tensor]],
    args: argparse.Namespace,
    where: str,
    call: dict[str, Any],
) -> None:
    """Write the table, as Markdown and as JSON lines, and the picture."""
    facts = {"model": args.model, "where": where, **call, "seed": args.seed, "repeats": args.repeats}
    rows = [json.dumps({**asdict(result), **facts}) for result in results]
    (args.out / "compare.jsonl").write_text("\n".join(rows) + "\n")
    frames, _, height, width = made[PLAIN][0].shape
    size = f"{width} x {height} px" + (f", {frames} frames" if frames > 1 else "")
    settings = ", ".join(f"{name} {value}" for name, value in call.items() if name not in ("height", "width"))
    text = (
        f"{args.model}, {size}, {settings}, seed {args.seed}; prompts: {len(args.prompt)}; {where}.\n\n"
        f"{table(results)}\n\n"
        f"Seconds are those of the denoising alone: the median of {args.repeats} repeat{'s' * (args.repeats > 1)} of "
        "each prompt, and in brackets the range. The first call of each strategy is a warm-up and is not counted. "
        "Plain runs on one process, while the others wait. PSNR, SSIM and LPIPS are to the plain pictures: the mean "
        "over the prompts, and of PSNR the lowest in brackets. PSNR counts up to 100 dB, which rounding alone has.\n"
    )
    (args.out / "compare.md").write_text(text)
    draw(results, made, args.prompt, args.out / "compare.png")
    output.say([table(results), str(args.out / "compare.png")])


def table(results: list[Result]) -> str:
    """The results as Markdown, a row a strategy."""
    has_lpips = any(result.lpips is not None for result in results)
    head = ["", "steps", "s denoising", "speed-up over plain", "bound", "PSNR, dB", "SSIM", *["LPIPS"] * has_lpips]
    rows = [head, ["---"] * len(head)]
    for name in dict.fromkeys(result.strategy for result in results):
        ours = [result for result in results if result.strategy == name]
        seconds = [value for result in ours for value in result.seconds]
        took, gain = f"{_median(ours):.2f} ({min(seconds):.2f} - {max(seconds):.2f})", f"{_gain(results, name):.2f}"
        if name == PLAIN:
            rows.append([name, "", took, "1", "1", *[""] * (len(head) - 5)])
            continue
        plans = [result.plan for result in ours if result.plan]
        steps = f"{output.counts(plans[0])}{' (first prompt)' if len(set(plans)) > 1 else ''}"
        psnr, ssim, lpips = (
            [value for result in ours if (value := getattr(result, field)) is not None]
            for field in ("psnr", "ssim", "lpips")
        )
        bound = statistics.fmean(result.bound for result in ours if result.bound)
        close = [f"{statistics.fmean(psnr):.1f} ({min(psnr):.1f})", f"{statistics.fmean(ssim):.4f}"]
        close += [f"{statistics.fmean(lpips):.4f}"] if lpips else []
        rows.append([name, steps, took, gain, f"{bound:.2f}", *close])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _median(results: list[Result]) -> float:
    return statistics.median(value for result in results for value in result.seconds)


def _gain(results: list[Result], name: str) -> float:
    """How many times as fast as plain a strategy was, in this run."""
    times = (_median([result for result in results if result.strategy == which]) for which in (PLAIN, name))
    return next(times) / next(times)


def draw(results: list[Result], made: dict[str, list[torch.Tensor]], prompts: list[str], path: Path) -> None:
    """Draw the pictures of each strategy in a row, and under each how it differs from the plain one, amplified."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shots = _shots(made[PLAIN])
    factor = _factor(made, shots)
    height, width = made[PLAIN][0].shape[-2:]
    column = 2.6  # inches
    row = column * height / width
    figure = Figure(figsize=(column * len(made), len(shots) * (2 * row + 0.75)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = np.ravel(figure.subfigures(len(shots), 1, squeeze=False))
    for part, (number, frame) in zip(parts, shots, strict=True):
        frames = len(made[PLAIN][number])
        title = f"{prompts[number]}{f'  (frame {frame + 1} of {frames})' if frames > 1 else ''}"
        part.suptitle("\n".join(textwrap.wrap(title, 24 * len(made))), fontsize=10)
        axes = part.subplots(2, len(made), squeeze=False)
        for name, above, below in zip(made, *axes, strict=True):
            for axis in (above, below):
                axis.set_axis_off()
            picture, plain = made[name][number][frame], made[PLAIN][number][frame]
            above.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            if name == PLAIN:
                above.set_title(PLAIN, fontsize=9)
                label = f"difference\nto plain,\n{factor} times\namplified"
                below.text(0.5, 0.5, label, ha="center", va="center", fontsize=9, transform=below.transAxes)
                continue
            result = next(r for r in results if (r.strategy, r.prompt) == (name, prompts[number]))
            above.set_title(f"{name}\n{_gain(results, name):.2f} times as fast, {result.psnr:.1f} dB", fontsize=9)
            below.imshow((factor * (picture - plain).abs()).permute(1, 2, 0).clamp(0, 1).numpy())
    figure.savefig(path, dpi=min(300, max(120, width / column)))


def _shots(made: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Which pictures are drawn: prompt and frame, at even distances where there are several."""
    each = max(1, SHOWN // len(made)) if len(made[0]) > 1 else 1
    shown = range(min(len(made), SHOWN))
    return [(number, round(frame)) for number in shown for frame in _even(len(made[number]), each)]


def _even(frames: int, count: int) -> list[float]:
    count = min(frames, count)
    return [(frames - 1) * (place / (count - 1) if count > 1 else 0.5) for place in range(count)]


def _factor(made: dict[str, list[torch.Tensor]], shots: list[tuple[int, int]]) -> int:
    """The largest round factor by which no more than one value in a thousand of the differences is clipped."""
    worst = max(
        float(np.quantile((pictures[number][frame] - made[PLAIN][number][frame]).abs().numpy(), 0.999))
        for pictures in made.values()
        for number, frame in shots
    )
    return max((factor for factor in FACTORS if factor * worst <= 1), default=1)


if __name__ == "__main__":
    output.quieten("--verbose" in sys.argv)
    processes.rank(main)
