"""Checks of patched copies of xfuser: ``xdit_patches_worker.py [PATH CHECK]...``, PATH being folders to put in front.

Each check has a process of its own, forked from one that has not imported xfuser. It writes its error to a file of its
name, which is empty without one.
"""

import gc
import os
import sys
import traceback
from pathlib import Path

import peft  # noqa: F401  # once for all checks, as what is not used of the next
import pytest
import torch
import torch._dynamo
import transformers  # noqa: F401
from diffusers import DiffusionPipeline  # noqa: F401
from nursery import free_port

CALL = {"model": "emoji-sd3", "prompt": ["a cup of tea"], "seed": 42, "num_inference_steps": 4}
PLAN = "FSFF"


def runs_without_an_accelerator() -> None:
    _upstream_tests("core/test_envs.py")
    from xfuser import envs

    assert envs.get_device(0) == torch.device("cpu")
    assert envs.get_torch_distributed_backend() == "gloo"
    _run_tiny()


def loads_plugins() -> None:
    _upstream_tests("unit/test_plugins.py")
    os.environ["XDIT_PLUGINS"] = "tiny"
    _run_tiny()


def has_no_flag_without_the_entry_point() -> None:
    _upstream_tests("unit/test_plugins.py", "core/test_cli.py")
    assert not {"--parallel", "--hybrid_plan"} & _flags()
    from xfuser import cli

    with pytest.raises(SystemExit) as ended:  # no process is started
        cli.main(["--model", "emoji-sd3", "--prompt", "cat", "--parallel", "hybrid-cond"])
    assert ended.value.code == 2
    assert "hybridiff_xdit.xdit.plugin" not in sys.modules


def has_the_strategy_with_the_entry_point() -> None:
    os.environ["XDIT_PLUGINS"] = "another"
    assert not {"--parallel", "--hybrid_plan"} & _flags()
    del os.environ["XDIT_PLUGINS"]
    from xfuser.cli import get_nproc_from_strategy
    from xfuser.plugins import load_plugins

    load_plugins.cache_clear()
    assert {"--parallel", "--hybrid_plan", "--hybrid-plan"} <= _flags()
    flags = ["--model", "emoji-sd3", "--prompt", "cat", "--parallel", "hybrid-cond"]
    assert get_nproc_from_strategy(flags) == 2
    assert get_nproc_from_strategy([*flags, "--hybrid-stages=4", "--data-parallel-degree", "2"]) == 8
    with pytest.raises(SystemExit):
        get_nproc_from_strategy([*flags, "--tensor_parallel_degree", "2"])
    assert "hybridiff_xdit.xdit.models" not in sys.modules
    _python_and_the_command_agree()


def _python_and_the_command_agree() -> None:
    """On one rank each: xDiT's runner called from Python, and `xdit-hybrid` on an xfuser that loads plugins."""
    from xfuser.runner import xFuserModelRunner

    from hybridiff_xdit.xdit import compat

    assert not [*compat.check_ledger(), *compat.missing(compat.PLUGIN_LEDGER)]
    child = os.fork()  # each with a process group of its own
    _as_the_only_rank()
    if not child:
        from hybridiff_xdit.xdit import runner

        flags = ["--prompt", *CALL["prompt"], "--num_inference_steps", "4", "--parallel", "hybrid-cond"]
        runner.main(["--model", CALL["model"], *flags, "--hybrid_plan", PLAN, "--output_directory", "command"])
        os._exit(0)
    os.mkdir("python")
    config = {**CALL, "parallel": "hybrid-cond", "hybrid_plan": PLAN, "output_directory": "python"}
    runner = xFuserModelRunner(config)
    input_args = runner.preprocess_args(config)
    runner.initialize(input_args)
    output, _ = runner.run(input_args)
    runner.save(output=output)
    runner.cleanup()
    assert not os.waitpid(child, 0)[1]
    (python,), (command,) = (list(Path(name).glob("*.png")) for name in ("python", "command"))
    assert python.read_bytes() == command.read_bytes()


def _upstream_tests(*files: str) -> None:
    tests = [f"{sys.path[0]}/tests/{file}" for file in files]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    assert not pytest.main(["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", sys.path[0], *tests])


def _flags() -> set[str]:
    from xfuser.config import FlexibleArgumentParser, xFuserArgs

    parser = xFuserArgs.add_runner_args(FlexibleArgumentParser())
    return {flag for action in parser._actions for flag in action.option_strings}


def _as_the_only_rank() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def _run_tiny() -> None:
    """Run a model of the runner from the beginning to the end. With plugins, one has registered it."""
    _as_the_only_rank()
    import tiny_plugin
    from xfuser.runner import xFuserModelRunner

    if "XDIT_PLUGINS" not in os.environ:
        tiny_plugin.register()
    config = {"model": "tiny", "prompt": "cat", "height": 8, "width": 8}
    runner = xFuserModelRunner(config)
    runner.initialize(config)
    output, timings = runner.run(config)
    assert len(output.images) == 1 and timings[0] > 0
    runner.cleanup()


def main(arguments: list[str]) -> None:
    gc.freeze()  # a collection in a child does not walk through what it inherits
    for path, check in zip(arguments[::2], arguments[1::2], strict=True):
        child = os.fork()
        if not child:
            error = ""
            try:
                sys.path[:0] = path.split(os.pathsep)
                globals()[check]()
            except BaseException:
                error = traceback.format_exc()
            Path(check).write_text(error)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
