"""The flags ``--parallel`` and ``--hybrid_*``, and what they mean in xDiT's own flags.

xfuser is imported only where its parser is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch

from .. import planner
from ..config import HybridConfig
from ..schedule.policies import POLICIES
from ..seam.checkpoints import Checkpoint, FamilyCheckpoint, resolve
from .compat import flags_of_xdit, import_xfuser, models_of_xdit

STRATEGIES = ("cfg", "sequence", "pipefusion", "hybrid-cond")

#: xDiT's degrees whose product, with 2 for CFG, is the number of processes.
PROCESS_DEGREES = (
    "data_parallel_degree",
    "ulysses_degree",
    "ring_degree",
    "pipefusion_parallel_degree",
    "tensor_parallel_degree",
)
SEQUENCE_DEGREES = ("ulysses_degree", "ring_degree")
COMBINED_DEGREES = ("data_parallel_degree", *SEQUENCE_DEGREES)
# What hybrid-cond cannot be combined with so far. The last ones would be taken in silence and do nothing.
_EXCLUDED_DEGREES = (
    *(name for name in PROCESS_DEGREES if name not in COMBINED_DEGREES),
    "text_encoder_tp_degree",
    "fully_shard_degree",
)
_EXCLUDED_FLAGS = (
    "use_onediff",
    "use_fast_attn",
    "use_teacache",
    "use_fbcache",
    "cache_method",
    # They count evaluations, of which a SKIPPED step has none.
    "use_hybrid_attn_schedule",
    "use_hybrid_gemm_schedule",
    "vsa_drop_rates",
)

_DETAILS: dict[str, dict[str, Any]] = {"cache_method": {}, "vsa_drop_rates": {"nargs": "+", "type": float}}

#: xDiT's flags for models of other kinds: from pictures, of videos. (The others that our models lack, xDiT refuses.)
_IDLE_FLAGS = ("input_images", "resize_input_images", "num_frames", "guidance_scale_2", "flow_shift")

#: Flags that describe what is to be made. A model need not read all of them.
INPUTS = (
    *("negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2"),
    *("max_sequence_length", "input_images", "flow_shift"),
)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from on, off)")
    return text == "on"


def _flag(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a field of `HybridConfig`."""
    flag = dict(field.metadata)
    if flag.pop("is_switch", False):
        flag |= {"type": _switch, "metavar": "{on,off}"}
    policy = next((name for name, known in POLICIES.items() if field.name in _names(known.settings)), None)
    return {**flag, "help": f"{flag['help']} (Policy {policy}.)" if policy else flag["help"]}


#: The options that most people use: those of the README.
MAIN_OPTIONS = ("policy", "tolerance", "speedup", "plan", "cuda_graphs", "report")


def table(names: Iterable[str]) -> str:
    """A table of options in Markdown: a row for each of these fields of `HybridConfig`."""
    fields = {field.name: field for field in dataclasses.fields(HybridConfig)}
    rows = [f"| `--hybrid_{name}` | {_flag(fields[name])['help']} |" for name in names]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def _names(settings: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


def build_parser() -> argparse.ArgumentParser:
    """Parser of the runner: xDiT's flags, ours and the launcher's. What is wrong, it raises as a ValueError."""
    flags_of_xdit()
    import_xfuser()
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)  # which is told once for all ranks

    parser = Parser(
        prog="xdit-hybrid",
        usage="%(prog)s --model MODEL --prompt PROMPT [--parallel STRATEGY] [--hybrid_...] [flags of xdit]\n"
        "       %(prog)s plan --model MODEL [--gpus N] [--size PIXELS] ...   (see %(prog)s plan --help)\n"
        "       %(prog)s compare --model MODEL --prompt PROMPT --out DIR ... (see %(prog)s compare --help)\n"
        "       %(prog)s serve --model MODEL --parallel hybrid-cond ...      (see %(prog)s serve --help)\n"
        "       %(prog)s models                                              (what there is for each model of xDiT's)",
        description="Make pictures with one of xDiT's parallel strategies or with hybrid-cond, on as many processes as "
        "the strategy needs. Takes what `xdit` takes.",
        conflict_handler="resolve",  # an xDiT that has loaded our plugin has some of these flags
    )
    xFuserArgs.add_runner_args(parser)
    add_options(parser)
    add_launch_options(parser)
    parser.add_argument(*spellings("save_timings"), action="store_true", help="write timings.json beside the pictures")
    return parser


def read_launch_flags(argv: list[str]) -> argparse.Namespace:
    """The flags that decide about the processes, read without xDiT's parser, which takes seconds to import.

    Of the others the names are checked; their values are the runner's to check.
    """
    parser = argparse.ArgumentParser(prog="xdit-hybrid", usage="%(prog)s --help", add_help=False, allow_abbrev=False)
    add_options(parser)
    add_launch_options(parser)
    _add_degrees(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", nargs="*")
    parser.add_argument(*spellings("attention_backend"))
    for name in ("height", "width", "num_inference_steps", "batch_size"):
        parser.add_argument(*spellings(name), type=int)
    for name in (*_IDLE_FLAGS, "max_sequence_length"):
        parser.add_argument(*spellings(name), nargs="*")
    args, others = parser.parse_known_args(argv)
    known = {"--save_timings", *flags_of_xdit()}
    given = (arg.partition("=")[0].replace("-", "_").replace("__", "--", 1) for arg in others if arg.startswith("--"))
    known |= {flag.replace("--", "--no_", 1) for flag in known}
    if unknown := [name for name in given if name not in known]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the processes to a parser."""
    launch = parser.add_argument_group("launch", "as for torchrun, and what is printed")
    launch.add_argument("--nnodes", type=int, default=1)
    launch.add_argument("--node_rank", type=int, default=0)
    launch.add_argument("--master_addr", default="127.0.0.1")
    launch.add_argument("--master_port", type=int, help="default: a free one; needed with --nnodes")
    launch.add_argument("--nproc_per_node", type=int, help="default: what the strategy needs")
    launch.add_argument("--verbose", action="store_true", help="show what xDiT, diffusers and transformers log, too")


def prepare(args: argparse.Namespace, gpus: int, world_size: int | None = None) -> HybridConfig | None:
    """Check the flags together and turn ``--parallel`` into xDiT's, in place.

    Args:
        args: flags of `build_parser`. ``nproc_per_node`` is filled in.
        gpus: GPUs of this machine.
        world_size: processes that there are; None if they are yet to be launched.

    Returns:
        The strategy's configuration; None for one of xDiT's own strategies.

    Raises:
        ValueError: with the flag and the mend.
    """
    hybrid = read_config(args)
    apply_strategy(args, hybrid)
    if hybrid and (world_size or args.nproc_per_node or gpus) == 1 and _may_be_alone(args, hybrid):
        args.use_cfg_parallel = False  # one GPU: SKIPPED steps save time there too
    elif hybrid:
        refuse_low(hybrid)
    if args.nproc_per_node is None:
        args.nproc_per_node = (world_size or count_processes(args)) // args.nnodes
    check_processes(args, world_size or args.nproc_per_node * args.nnodes, args.nproc_per_node, gpus)
    checkpoint = find(args.model)
    if isinstance(checkpoint, FamilyCheckpoint):
        refuse_idle(args, checkpoint.family)
        split = [f"--{name}" for name in SEQUENCE_DEGREES if getattr(args, name) > 1]
        if hybrid and checkpoint.family == "sdxl" and split:
            raise ValueError(f"SDXL's U-Net has no sequence to split: drop {' and '.join(split)}.")
    return hybrid


def find(model: str) -> Checkpoint | None:
    """The checkpoint that ``--model`` means; None for a name of xDiT's runner that is none of ours.

    Raises:
        ValueError: it can be neither.
    """
    try:
        return resolve(model)
    except ValueError:
        if model in models_of_xdit():
            return None
        raise


def refuse_low(hybrid: HybridConfig) -> None:
    """Refuse a target that two ranks exceed with every step FULL.

    Raises:
        ValueError: with the flag and the mend.
    """
    if hybrid.speedup is not None and hybrid.speedup < 2:
        raise ValueError(
            f"speedup={hybrid.speedup} (--hybrid_speedup): give a number from 2, which is every step FULL on two GPUs."
        )


def _may_be_alone(args: argparse.Namespace, hybrid: HybridConfig) -> bool:
    return args.nnodes == 1 and not hybrid.has_stages and all(getattr(args, name) == 1 for name in PROCESS_DEGREES)


def leaves_layout_open(args: argparse.Namespace, argv: list[str], gpus: int) -> bool:
    """Whether it is `choose_layout`'s to say how the GPUs of this machine are used.

    It is not where a degree, a number of stages or of processes is given (1 too), nor with two GPUs or fewer.
    """
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv if arg.startswith("--")}
    is_chosen = given & {*PROCESS_DEGREES, "hybrid_stages"} or any(getattr(args, name) > 1 for name in PROCESS_DEGREES)
    is_launched = args.nproc_per_node is not None or args.nnodes > 1
    return args.parallel == "hybrid-cond" and gpus > 2 and not is_chosen and not is_launched


def choose_layout(args: argparse.Namespace, gpus: int, device: str) -> tuple[list[str], str]:
    """The flags of the planner's best layout for these pictures, and a line that says so.

    Args:
        args: flags of `build_parser`.
        gpus: that may be used.
        device: name of a GPU.

    Raises:
        ValueError: with the flag and the mend.
    """
    config, checkpoint = read_config(args), find(args.model)
    assert config is not None, "the layout is open under hybrid-cond only"
    if not isinstance(checkpoint, FamilyCheckpoint):
        return [], (
            f"of {gpus} GPUs 2 are used, a branch each: the planner does not know this model. Give --ulysses_degree "
            f"{gpus // 2} to split its tokens over {gpus // 2 * 2}, or --data_parallel_degree for several prompts."
        )
    images = len(args.prompt) if isinstance(args.prompt, list) else 1
    if args.batch_size:
        images = min(images, args.batch_size)
    cost = planner.cost_of(checkpoint, args.height or checkpoint.size, args.width or checkpoint.size)
    speed, source = planner.speed_of(cost.kind, device)
    plan = planner.expected_plan(config, args.num_inference_steps or checkpoint.steps)
    predictions = planner.rank_layouts(cost, speed, planner.Machine(), plan, gpus, images)
    # Ring attention merges what xDiT's own choice on these GPUs returns (flash or cuDNN's attention); not all do.
    best = planner.best(predictions, may_ring=args.attention_backend is None and torch.version.hip is None)
    flags = best.layout.flags()
    line = (
        f"of {gpus} GPUs {best.layout.gpus} are used ({' '.join(flags) or 'a branch each'}): the fastest for "
        f"{images} picture{'s' * (images > 1)} at a time, {best.seconds:.2g} s each by the planner with an {source}'s "
        "figures. Give --data_parallel_degree, --ulysses_degree or --ring_degree to choose; `xdit-hybrid plan` shows "
        "the rest."
    )
    return flags, line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--parallel`` and ``--hybrid_*`` to a parser."""
    group = parser.add_argument_group("hybridiff-xdit")
    group.add_argument("--parallel", choices=STRATEGIES, help="parallel strategy")
    add_hybrid_options(group)


def add_hybrid_options(group: argparse._ArgumentGroup) -> None:
    """Add ``--hybrid_*`` to a group of flags, each in the underscore and the dash spelling."""
    for field in dataclasses.fields(HybridConfig):
        group.add_argument(*spellings(f"hybrid_{field.name}"), default=None, **_flag(field))


def read_config(args: argparse.Namespace) -> HybridConfig | None:
    """The `HybridConfig` that the flags ask for; None unless ``--parallel hybrid-cond``.

    Raises:
        ValueError: a ``--hybrid_*`` flag is wrong, or given with another strategy.
    """
    given = {name: getattr(args, f"hybrid_{name}", None) for name in _names(HybridConfig)}
    if args.parallel == "hybrid-cond":
        return HybridConfig(**{name: value for name, value in given.items() if value is not None})
    if flags := [f"--hybrid_{name}" for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(flags)} need --parallel hybrid-cond: add it, or drop them.")
    return None


def apply_strategy(args: argparse.Namespace, hybrid: HybridConfig | None) -> None:
    """Turn ``--parallel`` into xDiT's own flags, in place.

    With more than two stages, xDiT's PipeFusion degree counts the ranks of a branch: xDiT then makes groups and numbers
    ranks as for its own strategies. Its PipeFusion itself is not used.

    Raises:
        ValueError: hybrid-cond is combined with something that it does not support.
    """
    if args.parallel in ("cfg", "hybrid-cond"):
        args.use_cfg_parallel = True
    if args.parallel == "sequence" and args.ulysses_degree * args.ring_degree == 1:
        args.ulysses_degree = 2
    if args.parallel == "pipefusion" and args.pipefusion_parallel_degree == 1:
        args.pipefusion_parallel_degree = 2
    if hybrid is not None:
        refuse_excluded(vars(args))
        args.pipefusion_parallel_degree = hybrid.stages // 2


def refuse_idle(args: argparse.Namespace, family: str) -> None:
    """Raise a ValueError that names the flags which have no effect on a model of this family."""
    names = (*_IDLE_FLAGS, "max_sequence_length") if family == "sdxl" else _IDLE_FLAGS
    if idle := [f"--{name}" for name in names if getattr(args, name, None)]:
        raise ValueError(f"{' and '.join(idle)}: no effect on a model of the family {family}. Drop what has none.")


def refuse_excluded(flags: Mapping[str, Any]) -> None:
    """Raise a ValueError that names what hybrid-cond cannot be combined with so far."""
    bad = [f"--{name} {flags[name]}" for name in _EXCLUDED_DEGREES if (flags.get(name) or 1) > 1]
    bad += [f"--{name}" for name in _EXCLUDED_FLAGS if flags.get(name)]
    if str(flags.get("attention_backend")).lower() == "aiter_vsa":
        bad.append("--attention_backend aiter_vsa")
    if bad:
        raise ValueError(
            f"--parallel hybrid-cond cannot be combined with {', '.join(bad)} so far: drop "
            f"{'it' if len(bad) == 1 else 'them'}."
        )


def count_processes(args: argparse.Namespace) -> int:
    """Processes that xDiT's degrees ask for."""
    return math.prod(getattr(args, name) for name in PROCESS_DEGREES) * (2 if args.use_cfg_parallel else 1)


def check_processes(args: argparse.Namespace, world_size: int, processes_here: int, gpus: int) -> None:
    """Refuse what xDiT would only trip over later.

    Args:
        args: flags after `apply_strategy`.
        world_size: processes that there are, or that are to be launched.
        processes_here: those of them on this machine.
        gpus: GPUs of this machine.

    Raises:
        ValueError: the processes, or the lack of a GPU, do not fit the strategy.
    """
    needed = count_processes(args)
    strategy = f"--parallel {args.parallel}" if args.parallel else "the parallel degrees"
    if world_size != needed:
        mend = f"use --nproc_per_node={needed}"
        if args.parallel == "hybrid-cond" and world_size % needed == 0:
            more = world_size // needed
            mend += f", or --ulysses_degree {more * args.ulysses_degree} (one picture of an MMDiT)"
            mend += f", or --hybrid_stages {more * 2 * args.pipefusion_parallel_degree} (one picture)"
            mend += f", or --data_parallel_degree {more * args.data_parallel_degree} (several pictures at once)"
        raise ValueError(f"{strategy} needs {needed} processes, not {world_size}: {mend}.")
    if 0 < gpus < processes_here:
        raise ValueError(
            f"{strategy} starts {processes_here} processes here, one a GPU, and there are {gpus} GPUs: "
            "make more visible, or hide them all (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    if not gpus and args.parallel != "hybrid-cond":  # whose sequence parallelism `compat` makes run there
        split = (*SEQUENCE_DEGREES, "pipefusion_parallel_degree")
        if bad := [f"--{name}" for name in split if getattr(args, name) > 1]:
            raise ValueError(
                f"xDiT runs {' and '.join(bad)} on GPUs only, and there is none: use --parallel cfg or hybrid-cond."
            )


def read_degrees(argv: list[str]) -> argparse.Namespace:
    """The flags of xDiT's that matter to a strategy, read from an argument list whose rest is left alone."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_degrees(parser)
    return parser.parse_known_args(argv)[0]


def _add_degrees(parser: argparse.ArgumentParser) -> None:
    """Add those of xDiT's flags that matter to a strategy."""
    for name in (*_EXCLUDED_DEGREES, *COMBINED_DEGREES):
        parser.add_argument(*spellings(name), type=int, default=1)
    for name in _EXCLUDED_FLAGS:
        details = _DETAILS.get(name, {"action": "store_true"})
        parser.add_argument(*spellings(name), **details)
    parser.add_argument(*spellings("use_cfg_parallel"), action="store_true")


def spellings(name: str) -> list[str]:
    """A flag in the underscore and the dash spelling."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
