"""The study of benchmarks/ at its smallest: rows, bounds and pictures come out."""

import json
from pathlib import Path

import frontier
import pytest
import quality
import torch
from measures import psnr
from PIL import Image

MODEL = Path(quality.__file__).parent / "models" / "emoji-sdxl"
IDENTICAL = 100.0  # dB: what pictures that are the same bit for bit count as


def test_the_study_makes_its_rows_plot_and_tables(tmp_path):
    cells, curves = ["T10-w5-first-float32"], ["one GPU", "ours, target", "fewer*"]
    work = quality.selected(quality.quick("unet"), cells, curves)
    assert [point.curve for _, point in work[:2]] == ["one GPU", "ours, target"]
    out = tmp_path / "rows.jsonl"
    quality.run(MODEL, out, work, prompts=2, batch=2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["curve"], row["parameter"]) for row in rows] == [(point.curve, point.parameter) for _, point in work]
    assert {row["cell"] for row in rows} == {*cells}
    reference, *others = rows
    assert reference["bound"] == 2 and "psnr" not in reference
    for row in others:
        if row["curve"] == "ours, target":
            assert row["bound"] >= row["parameter"] and set(row["plan"]) > {"F"}
        else:
            assert row["bound"] == pytest.approx(20 / row["parameter"], abs=1e-4)
        assert 5 < row["psnr"][1] <= row["psnr"][0] < IDENTICAL
    quality.run(MODEL, out, work, prompts=2, batch=2)  # again: nothing is left to do
    assert len(out.read_text().splitlines()) == len(rows)
    frontier.draw([out], tmp_path / "drawn")
    with Image.open(tmp_path / "drawn" / "frontier_emoji-sdxl.png") as picture:
        picture.load()
        assert picture.width > 400
    assert "## Equal bounds" in (tmp_path / "drawn" / "frontier_emoji-sdxl.md").read_text()


def test_a_picture_beside_itself_counts_as_the_most():
    pictures = torch.rand(2, 3, 8, 8)
    assert psnr(pictures, pictures).tolist() == [IDENTICAL] * 2
    assert psnr(pictures, pictures + 0.1).tolist() == pytest.approx([20.0] * 2, abs=1e-3)  # -20 log10 0.1
