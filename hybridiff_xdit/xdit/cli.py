"""``xdit-hybrid``: xDiT's ``xdit`` with ``--parallel`` and ``--hybrid_*``.

Checks the flags, counts the processes, and starts torchrun on `hybridiff_xdit.xdit.runner`, or, for ``xdit-hybrid
compare`` and ``xdit-hybrid serve``, on the module of that name. ``xdit-hybrid plan`` prints what the cost model says of
the layouts that so many GPUs allow, and starts nothing. This process imports neither xDiT nor diffusers: each of the
others must.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import NoReturn

import torch

from .. import planner
from ..config import HybridConfig
from ..schedule.plan import StepKind
from ..seam.checkpoints import resolve_family
from . import compare, options, processes, serve
from .compat import count_gpus
from .output import quieten


def main(argv: list[str] | None = None) -> int:
    """Check the flags and start the processes, whose exit status is then this command's."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plan"]:
        return plan(argv[1:])
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    if argv[:1] == ["serve"]:
        return _serve(argv[1:])
    if argv[:1] == ["models"]:
        return models(argv[1:])
    try:
        if {"-h", "--help"} & {*argv}:
            quieten(is_verbose=False)
            options.build_parser().print_help()
            return 0
        args, argv = _read(argv)
    except ValueError as error:
        _refuse("xdit-hybrid", error)
    return _run(processes.start("hybridiff_xdit.xdit.runner", args, argv), args.verbose)


def _read(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a run, checked, and the argument list for its processes, with the layout where it was left open.

    Raises:
        ValueError: with the flag and the mend.
    """
    gpus = count_gpus()
    args = options.read_launch_flags(argv)
    if options.leaves_layout_open(args, argv, gpus):
        chosen, why = options.choose_layout(args, gpus, _device_name())
        print(f"xdit-hybrid: {why}", file=sys.stderr)
        argv = [*argv, *chosen]  # for the processes, too: each reads the same flags
        args = options.read_launch_flags(argv)
    options.prepare(args, gpus)
    if args.nnodes > 1 and args.master_port is None:
        raise ValueError("--nnodes > 1 needs --master_addr and --master_port, the same on every node.")
    return args, argv


def _serve(argv: list[str]) -> int:
    try:
        own, argv = serve.read(argv)
        args, argv = _read(argv)
        serve.check(args)
    except ValueError as error:
        _refuse("xdit-hybrid serve", error)
    return _run(processes.start("hybridiff_xdit.xdit.serve", args, [*serve.flags(own), *argv]), args.verbose)


def _compare(argv: list[str]) -> int:
    try:
        args = compare.read(argv, count_gpus())
    except ValueError as error:
        _refuse("xdit-hybrid compare", error)
    return _run(processes.start("hybridiff_xdit.xdit.compare", args, argv), args.verbose)


def models(argv: list[str]) -> int:
    """Print what there is for each model of xDiT's runner."""
    parser = argparse.ArgumentParser(
        prog="xdit-hybrid models",
        description="List the models of xDiT's runner: how many streams a step evaluates by default, how xDiT splits "
        "the work by itself, what --parallel hybrid-cond deals out or saves and combines with, and "
        "whether that is tested. --model also takes a hub id or a folder of any diffusers pipeline.",
    )
    parser.parse_args(argv)
    quieten(is_verbose=False)
    from . import catalogue  # it imports xDiT

    print(catalogue.table())
    return 0


def plan(argv: list[str]) -> int:
    """Print the layouts with what the cost model predicts of them, best first."""
    parser = plan_parser()
    args = parser.parse_args(argv)
    gpus = args.gpus or count_gpus() or 8
    try:
        checkpoint = resolve_family(args.model)
        height, width = ((side or args.size or checkpoint.size) for side in (args.height, args.width))
        steps = args.steps or checkpoint.steps
        config = HybridConfig(speedup=args.hybrid_speedup, plan=args.hybrid_plan)
        options.refuse_low(config)
        kinds = planner.expected_plan(config, steps)
        cost = planner.cost_of(checkpoint, height, width)
        if args.calibrate:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            speed, source = planner.calibrate(checkpoint, height, width, device), f"measured on this {device.type}"
        else:
            speed, source = planner.speed_of(cost.kind, args.device or _device_name() or "H100")
    except ValueError as error:
        _refuse("xdit-hybrid plan", error)
    machine = planner.Machine(
        args.gpus_per_node,
        planner.NVLINK._replace(bandwidth=args.nvlink * 1e9),
        planner.NETWORK._replace(bandwidth=args.network * 1e9),
    )
    predictions = planner.rank_layouts(cost, speed, machine, kinds, gpus, args.images)
    best = " ".join(planner.best(predictions).layout.flags())
    print(
        f"{args.model}, {height} x {width} px, pictures: {args.images}, GPUs: up to {gpus}, speed: {source}\n"
        f"{steps} steps: {', '.join(f'{kinds.count(kind)} {kind.name}' for kind in StepKind)}. "
        f"Denoising alone; one GPU takes {planner.one_gpu(cost, speed, steps):.2f} s a picture.\n\n"
        f"{planner.table(predictions[: args.rows], machine)}\n\n"
        f"The best that runs: --parallel hybrid-cond {best}".rstrip()
    )
    return 0


def plan_parser() -> argparse.ArgumentParser:
    """Parser of ``xdit-hybrid plan``."""
    parser = argparse.ArgumentParser(
        prog="xdit-hybrid plan",
        description="Predict every layout of a number of GPUs by a cost model, and print them, best first. Needs no "
        "GPU and no weights. The equations are in hybridiff_xdit/planner/cost.py.",
    )
    parser.add_argument("--model", required=True, help="as for a run, or sdxl, sd3-medium, sd3.5-medium, sd3.5-large")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="default: those of this machine, or 8")
    parser.add_argument("--size", type=_positive, metavar="PX", help="height and width in pixels (default: as a run)")
    parser.add_argument("--height", type=_positive, metavar="PX", help="where it is not --size")
    parser.add_argument("--width", type=_positive, metavar="PX", help="where it is not --size")
    parser.add_argument("--images", type=_positive, metavar="N", default=1, help="pictures made at a time (default: 1)")
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: as a run")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--hybrid_speedup",
        "--speedup",
        type=float,
        metavar="S",
        help="bound of the adaptive policy, whose SKIPPED steps are counted from it "
        f"(default: {planner.TYPICAL_SPEEDUP}, about what the default tolerance comes to)",
    )
    kinds.add_argument("--hybrid_plan", "--plan", metavar="PLAN", help="in its place: a plan such as 8-48/4")
    parser.add_argument("--rows", type=_positive, metavar="N", default=12, help="of the table, at most (default: 12)")
    speed = parser.add_argument_group("the machine")
    source = speed.add_mutually_exclusive_group()
    source.add_argument(
        "--device", choices=list(planner.SPEEDS), help="whose stored figures (default: this GPU's, or H100 without one)"
    )
    source.add_argument("--calibrate", action="store_true", help="time the denoiser on this GPU, with random weights")
    speed.add_argument("--gpus_per_node", type=_positive, metavar="N", default=8, help="joined by NVLink (default: 8)")
    for name, link in (("nvlink", planner.NVLINK), ("network", planner.NETWORK)):
        speed.add_argument(
            f"--{name}",
            type=_bandwidth,
            default=link.bandwidth / 1e9,
            metavar="GB/s",
            help=f"a GPU's bandwidth one way (default: {link.bandwidth / 1e9:.0f})",
        )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def _bandwidth(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive number of GB/s")
    return value


def _device_name() -> str:
    """Name of this machine's GPU; of another accelerator the kind; without one empty."""
    if not torch.cuda.is_available():
        return str(torch.accelerator.current_accelerator() or "")
    # Asked in another process: this one stays while the ranks run, and must not hold memory on their GPU.
    question = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str], is_verbose: bool) -> int:
    return processes.run(command, is_verbose)


def _refuse(command: str, error: ValueError) -> NoReturn:
    sys.stderr.write(f"{command}: error: {error}\n")
    sys.exit(processes.USAGE)


if __name__ == "__main__":
    sys.exit(main())
