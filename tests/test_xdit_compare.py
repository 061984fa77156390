"""`xdit-hybrid compare`: what it makes, measures and draws."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xdit_tiny
from nursery import run_module
from PIL import Image
from tqdm import tqdm

from hybridiff_xdit import HybridConfig, hybrid
from hybridiff_xdit.xdit import cli, compare, output

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a cat", "two dogs"]
STEPS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return xdit_tiny.save("sd3", tmp_path_factory.mktemp("sd3"))


def compared(model, out, *flags, processes):
    prompts = out.parent / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n\n")
    command = ("--model", model, "--prompt", PROMPTS[0], "--prompts", prompts, "--num_inference_steps", STEPS)
    command += ("--out", out, *flags)
    printed = run_module("hybridiff_xdit.xdit.compare", *command, processes=processes).stderr
    rows = [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]
    return rows, (out / "compare.md").read_text(), printed


def pictures(config=None):
    """The same pictures by plain diffusers, one process playing both ranks: [N, H, W, 3]."""
    pipe = xdit_tiny.pipeline("sd3")
    call = dict(num_inference_steps=STEPS, guidance_scale=7.0, height=32, width=32, output_type="np")

    def draw():
        return [pipe(prompt, **call, generator=torch.Generator().manual_seed(42)).images[0] for prompt in PROMPTS]

    if config is None:
        return np.stack(draw())
    with hybrid(pipe, config, simulate=True):
        return np.stack(draw())


def test_two_ranks(model, tmp_path):
    flags = ("--speedups", 2.2, 6, "--tolerances", 0.5, "--repeats", 2)
    rows, text, printed = compared(model, tmp_path / "out", *flags, processes=2)
    names = ["plain", "exact", "tolerance 0.5", "speed-up 2.2"]
    assert [(row["strategy"], row["prompt"]) for row in rows] == [(name, text) for name in names for text in PROMPTS]
    plain, ours = pictures(), pictures(HybridConfig(speedup=2.2))
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0  # the warm-up is not among them
        assert row["lpips"] is None
    for row, expected, found in zip(rows[-2:], plain, ours, strict=True):
        assert "S" in row["plan"] and row["bound"] >= 2.2 and len(row["plan"]) == STEPS
        assert row["psnr"] == pytest.approx(-10 * np.log10(np.mean((found - expected) ** 2)), abs=0.1)
    for row in rows[2:4]:
        assert row["plan"] == "F" * STEPS and row["bound"] == 2
        assert row["psnr"] > 90 > rows[-1]["psnr"] and row["ssim"] > 0.999
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in table[2:]] == names
    assert {len(row) for row in table} == {7}
    assert "2 repeats" in text and "prompts: 2" in text and "2 processes" in text
    psnrs = [row["psnr"] for row in rows[-2:]]
    assert table[-1][5] == f"{np.mean(psnrs):.1f} ({min(psnrs):.1f})"
    assert "| speed-up 2.2 |" in printed and "compare.png" in printed
    assert printed.count("speed-up 6 is left out") == 1  # one rank tells it
    width, height = Image.open(tmp_path / "out" / "compare.png").size
    assert width > 900 and height > 900


def test_one_process_has_no_exact_row(model, tmp_path):
    rows, text, _ = compared(model, tmp_path / "out", "--speedups", 1.1, processes=1)
    assert [row["strategy"] for row in rows[::2]] == ["plain", "speed-up 1.1"]
    assert all("S" in row["plan"] for row in rows[2:])
    assert "1 process." in text


class Video:
    """A pipeline of videos: each call gives another grey."""

    _execution_device = torch.device("cpu")
    calls = 0

    def progress_bar(self, total):
        return tqdm(total=total, disable=True)

    def set_progress_bar_config(self, **config):
        pass

    def __call__(self, prompt, generator, output_type):
        self.calls += 1
        with self.progress_bar(total=1) as bar:
            bar.update()
        levels = np.linspace(0, 1, 9)[:, None, None, None]  # a frame, a level
        return SimpleNamespace(frames=np.broadcast_to(levels / self.calls, (1, 9, 16, 24, 3)))


def test_videos(tmp_path):
    pipe, args = Video(), SimpleNamespace(prompt=["rain"], repeats=1, seed=0, model="m", out=tmp_path)
    denoising = output.Denoising(pipe)
    results, (video,) = compare.make(pipe, denoising, "plain", None, {}, args)
    (other,) = compare.make(pipe, denoising, "plain", None, {}, args)[1]
    assert video.shape == (9, 3, 16, 24) and not torch.equal(video, other)
    made = {"plain": [video], "mine": [other]}
    results.append(compare.Result("mine", "rain", [1.0], "FS", 2.0))
    compare.measure(results, made, torch.device("cpu"))
    errors = (np.linspace(0, 1, 9) * (1 / 2 - 1 / 4)) ** 2  # frames of the second call, and of the fourth
    assert results[-1].psnr == pytest.approx(np.mean([min(100, -10 * np.log10(e)) if e else 100 for e in errors]))
    assert compare._shots([video]) == [(0, frame) for frame in (0, 3, 5, 8)]
    compare.draw(results, made, ["rain"], tmp_path / "video.png")
    width, height = Image.open(tmp_path / "video.png").size
    assert height > 2 * width  # four frames, each above its difference


def test_differences_are_amplified_as_far_as_they_are_not_clipped():
    plain = torch.full((1, 3, 20, 20), 0.5)
    for error, factor in ((0.0, 5000), (0.004, 200), (0.03, 20), (0.9, 1)):
        assert compare._factor({"plain": [plain], "mine": [plain + error]}, [(0, 0)]) == factor


@pytest.mark.parametrize(
    ("flags", "gpus", "processes"), [("", 0, 2), ("", 1, 1), ("", 8, 2), ("--nproc_per_node 4 --verbose", 8, 4)]
)
def test_the_command_starts_the_processes(monkeypatch, flags, gpus, processes):
    commands = []
    monkeypatch.setattr(cli, "_run", lambda command, is_verbose: commands.append((command, is_verbose)) or 0)
    monkeypatch.setattr(cli, "count_gpus", lambda: gpus)
    argv = ["--model", "emoji-sd3", "--prompt", "a cat", "--out", "there", *flags.split()]
    assert cli.main(["compare", *argv]) == 0
    ((command, is_verbose),) = commands
    assert command[0] == f"--nproc_per_node={processes}"
    assert command[-len(argv) - 1 :] == ["hybridiff_xdit.xdit.compare", *argv]
    assert is_verbose == ("--verbose" in argv)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out there", ("--prompt", "--prompts")),
        ("--prompt cat", ("--out",)),
        ("--prompt cat --out there --speedups 1.5", ("--hybrid_speedup", "from 2")),
        ("--prompt cat --out there --tolerances -1", ("--hybrid_tolerance", "positive")),
        ("--prompt cat --out there --repeats 0", ("--repeats", "1 or more")),
        ("--prompt cat --out there --nproc_per_node 9", ("--nproc_per_node 9", "8 GPUs")),
        ("--prompt cat --out there --nnodes 2", ("--master_port",)),
    ],
)
def test_wrong_flags_end_before_the_launch(monkeypatch, capfd, flags, words):
    monkeypatch.setattr(cli, "count_gpus", lambda: 8)
    monkeypatch.setattr(cli, "_run", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "--model", "emoji-sd3", *flags.split()])
    message = capfd.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert all(word in message for word in words), message


def test_what_is_not_installed_is_named(monkeypatch, capfd):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["compare", "--model", "emoji-sd3", "--prompt", "cat", "--out", "there"])
    assert "matplotlib and torchmetrics not installed: pip install hybridiff_xdit[compare]" in capfd.readouterr().err


def test_a_model_or_an_argument_that_there_is_not(model):
    for name, flags, words in (("nothing", "", "no such model"), (model, "--num_frames 9", "has no --num_frames")):
        argv = ["--model", str(name), "--prompt", "cat", "--out", "there", *flags.split()]
        with pytest.raises(Exception, match=words):
            compare.load(compare.read(argv, gpus=0), torch.device("cpu"))
