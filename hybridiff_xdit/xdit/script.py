"""Runs an unmodified xDiT example script with ``--parallel`` and ``--hybrid_*`` understood.

The script never sees those flags. It gets xDiT's own (``--use_cfg_parallel`` and the like), and, under hybrid-cond,
our pipelines by the names of xDiT's: names in the ``xfuser`` module of this process, nothing on disk.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from .. import HybridConfig
from . import options
from .compat import count_gpus, import_xfuser


def main(argv: list[str] | None = None) -> None:
    """Run ``SCRIPT [flags of the script] [--parallel ...] [--hybrid_* ...]``."""
    parser = build_parser()
    args, script_args = _split(parser, sys.argv[1:] if argv is None else argv)
    try:
        hybrid, script_args = _translate(args, script_args)
    except ValueError as error:
        parser.exit(2, f"hybridiff_xdit.launch: error on rank {os.environ.get('RANK', '0')}: {error}\n")
    import_xfuser()
    sys.argv = [args.script, *script_args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(args.script)))  # as `python SCRIPT` does
    with replaced_pipelines(hybrid) if hybrid is not None else nullcontext():
        runpy.run_path(args.script, run_name="__main__")


def build_parser() -> argparse.ArgumentParser:
    """Parser of our flags; the script's own are left to the script."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridiff_xdit.launch",
        description="Run an xDiT example script (sd3_example.py, sdxl_example.py), under torchrun, with these flags "
        "beside its own.",
        allow_abbrev=False,
    )
    options.add_options(parser)
    parser.add_argument("script", metavar="SCRIPT", help="its own flags follow")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _split(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, which may stand before or after SCRIPT, and what is left for the script."""
    args = parser.parse_args(argv)
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_options(ours)
    given = {name: value for name, value in vars(args).items() if value is not None}
    after, script_args = ours.parse_known_args(args.script_args)
    return argparse.Namespace(**{**vars(after), **given}), script_args


def _translate(args: argparse.Namespace, script_args: list[str]) -> tuple[HybridConfig | None, list[str]]:
    """The strategy's configuration, and the script's flags with those of xDiT's that the strategy stands for."""
    hybrid = options.read_config(args)
    flags = options.read_degrees(script_args)
    before = dict(vars(flags))
    flags.parallel = args.parallel
    options.apply_strategy(flags, hybrid)
    if hybrid is not None:
        world_size, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        options.check_processes(flags, world_size, here, count_gpus())
    changed = {name: getattr(flags, name) for name, value in before.items() if getattr(flags, name) != value}
    for name, value in changed.items():
        script_args = [*script_args, f"--{name}", *([] if value is True else [str(value)])]
    return hybrid, script_args


@contextmanager
def replaced_pipelines(hybrid: HybridConfig) -> Iterator[None]:
    """Meanwhile our pipelines go by the names of xDiT's, and its other pipelines are refused."""
    import xfuser
    from xfuser.model_executor.pipelines.base_pipeline import xFuserPipelineBaseWrapper

    from .pipelines import HybridCond, HybridStableDiffusion3Pipeline, HybridStableDiffusionXLPipeline

    init = xFuserPipelineBaseWrapper.__init__

    def guarded(self: object, *args: object, **kwargs: object) -> None:
        if not isinstance(self, HybridCond):
            raise ValueError(
                f"--parallel hybrid-cond runs SD3 and SDXL pipelines, not {type(self).__name__}: use --parallel cfg."
            )
        init(self, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (xfuser, "xFuserStableDiffusion3Pipeline", HybridStableDiffusion3Pipeline.with_config(hybrid)),
            (xfuser, "xFuserStableDiffusionXLPipeline", HybridStableDiffusionXLPipeline.with_config(hybrid)),
            (xFuserPipelineBaseWrapper, "__init__", guarded),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield
