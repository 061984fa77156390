"""`xdit-hybrid`, without starting the processes: flags, process counts, refusals."""

import argparse
import dataclasses
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xdit_tiny
from nursery import launch, run_module

from hybridiff_xdit import HybridConfig
from hybridiff_xdit.seam.checkpoints import resolve
from hybridiff_xdit.xdit import cli, compat, options, output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(xdit_tiny.save("sd3", tmp_path_factory.mktemp("sd3")))


@pytest.fixture
def launched(monkeypatch):
    """The torchrun command instead of its run."""
    commands = []
    monkeypatch.setattr(cli, "_run", lambda command, is_verbose: commands.append(command) or 0)
    return commands


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("", 1),
        ("--parallel cfg", 2),
        ("--use-cfg-parallel", 2),
        ("--use_cfg_parallel --data-parallel-degree=2", 4),
        ("--parallel hybrid-cond", 2),
        ("--parallel=hybrid-cond --use_cfg_parallel", 2),
        ("--parallel hybrid-cond --hybrid-plan=8-48/2 --hybrid_guidance reuse", 2),
        ("--parallel hybrid-cond --nproc_per_node 2", 2),
        ("--parallel hybrid-cond --ulysses_degree 2 --ring-degree 2", 8),
        ("--parallel hybrid-cond --data_parallel_degree 4", 8),
        ("--parallel hybrid-cond --data_parallel_degree 2 --ulysses-degree=4", 16),
        ("--parallel hybrid-cond --hybrid_stages 2", 2),
        ("--parallel hybrid-cond --hybrid_stages 4", 4),
        ("--parallel hybrid-cond --hybrid-stages=4 --data_parallel_degree 2", 8),
        ("--parallel hybrid-cond --hybrid_stages 4 --ulysses_degree 2", 8),
        ("--parallel hybrid-cond --hybrid_stages 6 --ulysses_degree 2 --ring_degree 2 --data_parallel_degree 3", 72),
    ],
)
def test_processes_are_counted(launched, model, flags, processes):
    assert cli.main(["--model", model, "--prompt", "a cat", *flags.split()]) == 0
    assert f"--nproc_per_node={processes}" in launched[0]
    assert launched[0][-len(flags.split()) :] == flags.split() or not flags


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("--parallel sequence", 2),
        ("--parallel sequence --ring_degree 4", 4),
        ("--parallel pipefusion", 2),
        ("--parallel pipefusion --pipefusion-parallel-degree=4 --use_cfg_parallel", 8),
        ("--parallel cfg --ulysses_degree 2", 4),
    ],
)
def test_processes_are_counted_where_there_are_gpus(launched, model, monkeypatch, flags, processes):
    monkeypatch.setattr(cli, "count_gpus", lambda: 8)
    cli.main(["--model", model, "--prompt", "a cat", *flags.split()])
    assert f"--nproc_per_node={processes}" in launched[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--parallel hybrid-cond --hybrid_policy best", ("--hybrid_policy", "paper")),
        ("--parallel hybrid-cond --hybrid_guidance best", ("--hybrid_guidance", "mixed")),
        ("--parallel hybrid-cond --hybrid_plan FPX", ("--hybrid_plan", "START-END/GAP")),
        ("--parallel hybrid-cond --hybrid_kinds PS", ("--hybrid_kinds", "FPS")),
        ("--parallel hybrid-cond --hybrid_tolerance 0", ("--hybrid_tolerance", "positive number")),
        ("--parallel hybrid-cond --hybrid_speedup 1.5", ("--hybrid_speedup", "from 2")),
        ("--parallel hybrid-cond --hybrid_speedup 2.5 --hybrid_tolerance 0.1", ("--hybrid_speedup", "not both")),
        ("--parallel hybrid-cond --hybrid_plan FSF --hybrid_guidance mixed", ("--hybrid_guidance", "deferred")),
        ("--parallel cfg --hybrid_tolerance 0.1", ("--hybrid_tolerance", "--parallel hybrid-cond")),
        ("--parallel hybrid-cond --hybrid_interval 5", ("--hybrid_interval", "use paper")),
        ("--parallel hybrid-cond --hybrid_policy paper --hybrid_interval 0", ("--hybrid_interval", "1 or more")),
        ("--parallel hybrid", ("--parallel", "hybrid-cond")),
        ("--hybrid_policy paper", ("--hybrid_policy", "--parallel hybrid-cond")),
        ("--parallel cfg --hybrid_interval 5", ("--hybrid_interval", "--parallel hybrid-cond")),
        ("--parallel hybrid-cond --pipefusion-parallel-degree 2", ("--pipefusion_parallel_degree 2", "drop it")),
        ("--parallel hybrid-cond --tensor_parallel_degree=2 --use_teacache", ("--use_teacache", "drop them")),
        ("--parallel hybrid-cond --cache_method dbcache", ("--cache_method", "drop it")),
        ("--parallel hybrid-cond --use-hybrid-attn-schedule", ("--use_hybrid_attn_schedule", "drop it")),
        ("--parallel hybrid-cond --vsa_drop_rates 0.2 0.4", ("--vsa_drop_rates", "drop it")),
        ("--parallel hybrid-cond --attention_backend AITER_VSA", ("--attention_backend aiter_vsa", "drop it")),
        (
            "--parallel hybrid-cond --hybrid_stages 4 --ulysses_degree 2 --pipefusion_parallel_degree 2",
            ("--pipefusion_parallel_degree 2", "drop it"),
        ),
        (
            "--parallel hybrid-cond --hybrid_stages=4 --fully_shard_degree=2 --tensor_parallel_degree=2",
            ("--fully_shard_degree 2", "--tensor_parallel_degree 2", "drop them"),
        ),
        ("--parallel hybrid-cond --ulysses_degree 2 --nproc_per_node 2", ("needs 4 processes, not 2",)),
        ("--parallel hybrid-cond --nproc_per_node 8", ("--ulysses_degree 4 (", "--data_parallel_degree 4 (")),
        (
            "--parallel hybrid-cond --ulysses_degree 2 --nproc_per_node 8",
            ("--ulysses_degree 4", "--hybrid_stages 4 (", "_parallel_degree 2 ("),
        ),
        ("--parallel hybrid-cond --hybrid_stages 3", ("--hybrid_stages", "even number")),
        (
            "--parallel hybrid-cond --hybrid_stages 4 --ulysses_degree 2 --nproc_per_node 4",
            ("needs 8 processes, not 4",),
        ),
        ("--parallel hybrid-cond --hybrid_stages 4 --nproc_per_node 2", ("needs 4 processes, not 2",)),
        (
            "--parallel hybrid-cond --hybrid_stages 4 --nproc_per_node 8",
            ("--ulysses_degree 2 (", "--hybrid_stages 8 (", "_parallel_degree 2 ("),
        ),
        ("--parallel hybrid-cond --nproc_per_node 8", ("--hybrid_stages 8 (",)),
        ("--parallel cfg --hybrid_stages 4", ("--hybrid_stages", "--parallel hybrid-cond")),
        ("--parallel hybrid-cond --model emoji-sdxl --ring_degree 2", ("--ring_degree", "no sequence", "drop")),
        (
            "--parallel hybrid-cond --model emoji-sdxl --hybrid_stages 4 --ulysses_degree 2",
            ("no sequence", "drop --ulysses_degree"),
        ),
        ("--parallel hybrid-cond --nproc_per_node 3", ("needs 2 processes, not 3", "--nproc_per_node=2")),
        ("--parallel hybrid-cond --model nothing", ("--model nothing", "emoji-sd3")),
        ("--parallel sequence", ("--ulysses_degree", "GPU", "hybrid-cond")),
        ("--parallel cfg --nnodes 2", ("--master_port",)),
        ("--no_such_flag", ("--no_such_flag",)),
    ],
)
def test_wrong_flags_end_before_the_launch(launched, model, monkeypatch, capfd, flags, words):
    monkeypatch.setattr(cli, "count_gpus", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--model", model, "--prompt", "a cat", *flags.split()])
    message = capfd.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(word in message for word in words), message
    assert not launched


def nproc(command):
    return int(next(word for word in command if word.startswith("--nproc_per_node=")).partition("=")[2])


#: One picture of SD3-medium is worth 8 GPUs, one of SDXL, which has no tokens to split, 2; pictures share. SD3.5-large
#: has 38 heads, which 4 ranks of Ulysses do not divide.
LARGE = "--model sd3-medium --height 2048 --width 2048 --prompt cat"


@pytest.mark.parametrize(
    ("flags", "gpus", "chosen"),
    [
        (LARGE, 8, "--ulysses_degree 4"),
        (LARGE, 4, "--ring_degree 2"),
        (f"{LARGE} --attention_backend sdpa", 4, "--ulysses_degree 2"),
        (LARGE, 7, "--ring_degree 2"),  # 3 ranks cannot share the tokens
        ("--model sd3-medium --prompt cat", 8, "--ulysses_degree 4"),
        ("--model sd3-medium --prompt cat --width 2048", 8, "--ulysses_degree 4"),
        ("--model sd3-medium --prompt cat dog owl --batch_size 2", 8, "--data_parallel_degree 2 --ring_degree 2"),
        ("--model sd3.5-large --prompt cat", 8, "--ulysses_degree 2 --ring_degree 2"),
        ("--model sdxl --height 2048 --width 2048 --prompt cat", 8, ""),
        (f"{LARGE} --hybrid_plan 8-48/4", 8, "--ulysses_degree 4"),
    ],
)
def test_hybrid_cond_alone_takes_the_planners_best(launched, monkeypatch, capsys, flags, gpus, chosen):
    monkeypatch.setattr(cli, "count_gpus", lambda: gpus)
    monkeypatch.setattr(cli, "_device_name", lambda: "NVIDIA H100 80GB HBM3")
    argv = ["--parallel", "hybrid-cond", *flags.split()]
    assert cli.main(argv) == 0
    assert launched[0][launched[0].index("hybridiff_xdit.xdit.runner") + 1 :] == [*argv, *chosen.split()]
    used = 2 * math.prod(map(int, chosen.split()[1::2]))
    assert nproc(launched[0]) == used <= gpus
    (line,) = capsys.readouterr().err.splitlines()
    assert f"of {gpus} GPUs {used} are used ({chosen or 'a branch each'})" in line


@pytest.mark.parametrize(
    ("flags", "gpus", "processes"),
    [
        ("", 2, 2),
        ("", 0, 2),
        ("--ulysses_degree 2", 8, 4),
        ("--ulysses-degree=1", 8, 2),
        ("--data-parallel-degree 2", 8, 4),
        ("--data_parallel_degree 1", 8, 2),
        ("--hybrid_stages 4", 8, 4),
        ("--hybrid-stages=2", 8, 2),
        ("--nproc_per_node 2", 8, 2),
        ("--nnodes 2 --master_port 1", 8, 1),
    ],
)
def test_who_chooses_is_obeyed(launched, monkeypatch, capsys, flags, gpus, processes):
    monkeypatch.setattr(cli, "count_gpus", lambda: gpus)
    monkeypatch.setattr(options, "choose_layout", None)  # is not asked
    argv = ["--parallel", "hybrid-cond", *LARGE.split(), *flags.split()]
    assert cli.main(argv) == 0
    assert nproc(launched[0]) == processes
    assert launched[0][-len(argv) :] == argv
    assert not capsys.readouterr().err


def test_an_accelerator_without_figures_is_not_planned_as_an_h100(monkeypatch, capfd):
    monkeypatch.setattr(cli, "count_gpus", lambda: 8)
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli.torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    with pytest.raises(SystemExit):
        cli.main(["--parallel", "hybrid-cond", *LARGE.split()])
    assert "no figures of an xpu. Choose a layout yourself (--nproc_per_node 2" in capfd.readouterr().err


def test_other_strategies_are_not_planned(launched, monkeypatch):
    monkeypatch.setattr(cli, "count_gpus", lambda: 8)
    cli.main(["--parallel", "cfg", *LARGE.split()])
    assert nproc(launched[0]) == 2


@pytest.mark.parametrize("gpus", [3, 4, 5, 7, 8, 16])
def test_a_chosen_layout_never_needs_more_gpus_than_there_are(gpus):
    parser = options.build_parser()
    argv = f"--parallel hybrid-cond --model emoji-sd3 --prompt {'x ' * 5}".split()
    args = parser.parse_args(argv)
    assert options.leaves_layout_open(args, argv, gpus)
    flags, _ = options.choose_layout(args, gpus, "H100")
    args = parser.parse_args([*argv, *flags])
    options.prepare(args, gpus)
    assert args.nproc_per_node <= gpus


def test_plan_prints_the_layouts_best_first(capsys):
    flags = "--model sd3-medium --gpus 8 --size 2048 --images 4 --steps 40 --plan 8-32/4 --device H200 --rows 99"
    assert cli.main(["plan", *flags.split()]) == 0
    head, counts, _, columns, *rows, _, best = capsys.readouterr().out.splitlines()
    assert head == "sd3-medium, 2048 x 2048 px, pictures: 4, GPUs: up to 8, speed: H200"
    assert counts.startswith("40 steps: 22 FULL, 18 PIPELINED, 0 SKIPPED. ")
    assert columns.split()[0] == "GPUs"
    times = [float(row.split()[8]) for row in rows]
    assert times == sorted(times) and len(rows) == 15
    assert best == "The best that runs: --parallel hybrid-cond --data_parallel_degree 4"
    (row,) = (row for row in rows if row.endswith("--data_parallel_degree 2 --ulysses_degree 2"))
    assert row.split()[:8] == ["8", "2", "x", "2", "x", "2", "x", "1"]
    assert "sequence" in row and "branch" in row
    (row,) = (row for row in rows if "--ulysses_degree 2 --hybrid_stages 4" in row)
    assert row.split()[:8] == ["8", "1", "x", "2", "x", "2", "x", "2"]
    assert row.endswith("(less close, see --hybrid_stages)")


def test_plan_past_a_node_says_what_crosses_the_network(capsys):
    flags = "--model sd3-medium --gpus 16 --size 2048 --rows 99"
    cli.main(["plan", *flags.split()])
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("16  ") and " 8 x 2 x 1 " in row]
    rows = [row for row in rows if "--ring_degree" not in row]  # and four, of 1 to 8 by ring, that xDiT does not number
    assert [[word in row for word in ("branch 84 over the network", "--ulysses_degree 8")] for row in rows] == [
        [True, True],
        *(4 * [[False, False]]),
    ]
    cli.main(["plan", *flags.split(), "--gpus_per_node", "16"])
    assert "over the network" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model nothing", ("--model nothing", "sd3-medium")),
        ("--model sd3-medium --size 8192", ("8192 x 8192 px", "another size")),
        ("--model sd3-medium --speedup 1", ("--hybrid_speedup", "from 2")),
        ("--model sd3-medium --plan 8-60/4", ("END is 60", "50 steps")),
        ("--model sd3-medium --gpus 0", ("--gpus", "1 or more")),
        ("--model sd3-medium --network 0", ("--network", "positive")),
        ("--gpus 8", ("--model",)),
    ],
)
def test_plan_refuses(capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *flags.split()])
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(word in message for word in words), message


def test_plan_can_be_calibrated(capsys):
    """With the time of this machine; the model is the smallest that there is."""
    assert cli.main(["plan", "--model", "emoji-sdxl", "--gpus", "4", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "speed: measured on this c" in out
    assert "--parallel hybrid-cond" in out.splitlines()[-1]


def test_too_few_gpus(launched, model, monkeypatch, capfd):
    monkeypatch.setattr(cli, "count_gpus", lambda: 1)
    command = ["--model", model, "--prompt", "a cat", "--parallel", "hybrid-cond"]
    for more in (["--hybrid_plan", "8-48/2"], ["--nproc_per_node", "2"]):
        with pytest.raises(SystemExit):
            cli.main([*command, *more])
        assert "CUDA_VISIBLE_DEVICES" in capfd.readouterr().err
    assert cli.main(command) == 0  # without PIPELINED steps one GPU is enough
    assert "--nproc_per_node=1" in launched[0]


def test_help_of_plan(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = capsys.readouterr().out
    assert "--images" in text and "--calibrate" in text and "--prompt" not in text


def test_every_field_of_the_configuration_is_a_flag():
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    flags = {name.removeprefix("hybrid_") for name in vars(parser.parse_args([])) if name.startswith("hybrid_")}
    assert flags == {field.name for field in dataclasses.fields(HybridConfig)}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", options.MAIN_OPTIONS),
        ("integrations/xdit/README.md", [field.name for field in dataclasses.fields(HybridConfig)]),
    ],
)
def test_the_pages_have_the_tables_of_options(page, names):
    assert options.table(names) in (Path(__file__).parents[1] / page).read_text()


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("", {}),
        (
            "--hybrid_policy paper --hybrid-interval 7 --hybrid_slope_threshold=1e-3",
            dict(policy="paper", interval=7, slope_threshold=1e-3),
        ),
        ("--hybrid_tolerance 0.05 --hybrid-kinds FP", dict(tolerance=0.05, kinds="FP")),
        ("--hybrid-speedup=2.5", dict(speedup=2.5)),
        ("--hybrid_plan 8-48/2S", dict(plan="8-48/2S")),
        ("--hybrid_balance flops", dict(balance="flops")),
        ("--hybrid_cuda_graphs off", dict(cuda_graphs=False)),
        ("--hybrid-cuda-graphs on", dict(cuda_graphs=True)),
    ],
)
def test_flags_reach_the_configuration(model, flags, fields):
    args = options.build_parser().parse_args(["--model", model, "--parallel", "hybrid-cond", *flags.split()])
    assert options.prepare(args, gpus=0) == HybridConfig(**fields)
    assert args.use_cfg_parallel


@pytest.mark.parametrize("module", ["hybridiff_xdit.xdit.cli", "hybridiff_xdit.xdit.runner"])
def test_help(module):
    text = run_module(module, "--help", processes=1).stderr
    assert "--parallel {cfg,sequence,pipefusion,hybrid-cond}" in text
    assert "--hybrid_plan" in text
    assert "xdit-hybrid plan --model" in text


def launched_for(folder, script, *arguments):
    """What comes of torchrun's run of a script on two ranks, as the command starts it."""
    launcher = folder / "launcher.py"
    launcher.write_text(
        "import sys\nfrom hybridiff_xdit.xdit import cli\n"
        "if __name__ == '__main__': sys.exit(cli._run(sys.argv[1:], False))"
    )
    return launch([launcher, "--nproc_per_node=2", script, *arguments], check=False)


def test_the_command_ends_with_the_status_of_torchrun(tmp_path):
    script = tmp_path / "seven.py"
    script.write_text("exit(7)")
    assert launched_for(tmp_path, script).returncode == 7


FAILING = """
import sys, time
from hybridiff_xdit.xdit import processes

def main():
    if sys.argv[1] == "flag":
        raise processes.UsageError("xdit-hybrid: error: mend it")
    raise RuntimeError("out of luck")

processes.rank(main)
"""


@pytest.mark.parametrize(
    ("how", "status", "last"),
    [
        ("flag", 2, r"xdit-hybrid: error: mend it"),
        ("fault", 1, r"xdit-hybrid: error on rank \d: RuntimeError: out of luck"),
    ],
)
def test_what_ends_every_rank_is_told_once(tmp_path, how, status, last):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    result = launched_for(tmp_path, script, how)
    assert result.returncode == status
    *before, line = result.stderr.splitlines()
    assert re.fullmatch(last, line), result.stderr
    assert sum("Traceback" in line for line in before) == (how == "fault")
    assert not result.stdout


def test_a_rank_that_is_killed_is_named(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\nimport time; time.sleep(60)"
    )
    result = launched_for(tmp_path, script)
    assert result.returncode == 128 + 9
    assert re.fullmatch(r"xdit-hybrid: error: rank 1 has ended: Signal 9 \(SIGKILL\).*\n", result.stderr)


def test_the_command_imports_nothing_large():
    code = "import sys; from hybridiff_xdit.xdit import cli; cli._run = lambda *_: print(*sys.modules); cli.main()"
    flags = "--model emoji-sd3 --prompt cat --parallel hybrid-cond --hybrid_speedup 2.5 --nproc_per_node 2"
    found = subprocess.run([sys.executable, "-c", code, *flags.split()], capture_output=True, text=True, check=True)
    assert "hybridiff_xdit.xdit.processes" in found.stdout.split()
    large = {"diffusers", "transformers", "xfuser", "matplotlib", "torchmetrics", "hybridiff_xdit.seam.hooks"}
    assert not large & {*found.stdout.split()}


def test_the_command_knows_every_flag_of_xdits():
    runners = {flag for action in options.build_parser()._actions for flag in action.option_strings}
    ours = {flag for flag in runners if flag.startswith(("--hybrid_", "--hybrid-"))}
    for flag in sorted(runners - ours - {"-h", "--help"}):
        # A value that any flag takes; one that takes none, or another kind, is not for the command to know.
        argv = ["--model", "m", "--prompt", "cat", flag, "1"]
        try:
            options.read_launch_flags(argv)
        except SystemExit:
            assert flag == "--parallel", flag  # whose values are ours


def test_the_command_reads_what_the_runner_reads():
    flags = "--prompt cat dog --height 64 --use-cfg-parallel --data-parallel-degree=2 --ring_degree 2 --batch_size 1"
    argv = ["--model", "m", *flags.split(), "--parallel", "hybrid-cond", "--hybrid-speedup=2.5", "--verbose"]
    runner, command = vars(options.build_parser().parse_args(argv)), vars(options.read_launch_flags(argv))
    given = {name: value for name, value in command.items() if value}
    assert given == {name: runner[name] for name in given}
    assert {"prompt", "height", "use_cfg_parallel", "data_parallel_degree", "hybrid_speedup", "verbose"} <= given.keys()


def test_checkpoints(model, tmp_path, monkeypatch):
    local = resolve(model)
    assert (local.family, local.size, local.guidance_scale) == ("sd3", 32, 7.0)
    assert "text_encoder_3" in local.absent
    assert resolve("stabilityai/stable-diffusion-xl-base-1.0").family == "sdxl"
    monkeypatch.setenv("HYBRIDIFF_MODELS", str(tmp_path))
    with pytest.raises(ValueError, match="HYBRIDIFF_MODELS"):
        resolve("emoji-sd3")
    xdit_tiny.save("sdxl", tmp_path)
    (tmp_path / "sdxl").rename(tmp_path / "emoji-sdxl")
    assert resolve("emoji-sdxl").family == "sdxl"
    (tmp_path / "emoji-sdxl" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert resolve("emoji-sdxl").pipeline == "FluxPipeline"
    assert resolve("owner/name").pipeline is None
    assert resolve("SD3.5") == replace(resolve("sd3.5-large"), name="SD3.5")
    for name in ("nothing", str(tmp_path), "owner/name/more"):
        with pytest.raises(ValueError, match="no such model"):
            resolve(name)


def test_xdits_names_are_known_and_its_models_are_not_planned(launched, monkeypatch, capsys):
    assert {"Wan2.1-T2V", "Qwen/Qwen-Image", "LTX-2"} < compat.models_of_xdit()
    monkeypatch.setattr(cli, "count_gpus", lambda: 8)
    cli.main(["--parallel", "hybrid-cond", "--model", "Wan2.1-T2V", "--prompt", "cat"])
    assert nproc(launched[0]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "of 8 GPUs 2 are used" in line and "--ulysses_degree 4" in line


def test_the_groups_check_the_degrees():
    from hybridiff_xdit.xdit import groups

    def engine(**changes):
        degrees = {f"{name}_degree": 1 for name in ("dp", "ulysses", "ring", "pp", "tp", "fs")}
        parallel = SimpleNamespace(**{**degrees, "cfg_degree": 2, "use_parallel_vae": False, **changes})
        off = SimpleNamespace(use_fast_attn=False)
        return SimpleNamespace(parallel_config=parallel, runtime_config=off, fast_attn_config=off)

    two, four = HybridConfig(), HybridConfig(stages=4)
    groups._check(engine(), two)
    groups._check(engine(pp_degree=2), four)
    groups._check(engine(cfg_degree=1), two)  # one process
    for alone, hybrid in ((engine(cfg_degree=1, dp_degree=2), two), (engine(cfg_degree=1), four)):
        with pytest.raises(ValueError, match="--use_cfg_parallel"):
            groups._check(alone, hybrid)
    for hybrid, degree in ((two, 2), (four, 1), (four, 4)):
        words = rf"--hybrid_stages {hybrid.stages} .*--pipefusion_parallel_degree, and that is {degree}"
        with pytest.raises(ValueError, match=words):
            groups._check(engine(pp_degree=degree), hybrid)


def test_a_run_that_its_tolerance_keeps_full_says_so():
    report = {"plan": "FFFF", "num_steps": 4, "speedup_bound": 2.0, "estimated_error": 0.0, "sequence_degree": 1}
    report["config"] = {"tolerance": 0.01}
    assert "4 FULL of 4 steps (nothing could be skipped within tolerance 0.01); " in output.summary(report, 4, 1.0)
    assert "(" not in output.summary({**report, "config": {"tolerance": None}}, 4, 1.0)
    assert "(" not in output.summary({**report, "plan": "FFSF"}, 4, 1.0)


def test_a_run_tells_its_estimated_error_where_it_has_one():
    report = {"plan": "FFSF", "num_steps": 4, "speedup_bound": 8 / 3, "sequence_degree": 1, "config": {}}
    told = output.summary({**report, "estimated_error": 0.0123}, 4, 1.0)
    assert told.endswith("speed-up bound 2.67 over one GPU; estimated error 1.2%; 1.00 s denoising")
    assert "error" not in output.summary({**report, "estimated_error": None}, 4, 1.0)
