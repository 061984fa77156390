"""The study of benchmarks/ at its smallest: rows, bounds and tables come out."""

import json
from pathlib import Path

import frontier
import pytest
import quality
import torch
from PIL import Image

from hybridiff_xdit.measures import psnr

MODEL = Path(quality.__file__).parent / "models" / "emoji-sdxl"
IDENTICAL = 100.0  # dB: what pictures that are the same bit for bit count as


def test_the_study_makes_its_rows_plot_and_tables(tmp_path):
    studio = quality.Studio(MODEL, 2, 2, torch.device("cpu"))
    cells, curves = ["T10-w5-first-float32"], ["one GPU", "ours, target", "fewer*", "Taylor*"]
    work = quality.selected(quality.quick(studio.pipe), cells, curves)
    out = tmp_path / "rows.jsonl"
    quality.run(studio, out, work)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["curve"], row["parameter"]) for row in rows] == [(point.curve, point.parameter) for _, point in work]
    assert {row["cell"] for row in rows} == {*cells}
    reference, *others = rows
    assert reference["curve"] == "one GPU" and reference["bound"] == 2 and "psnr" not in reference
    for row in others:
        if row["curve"] == "ours, target":
            assert row["bound"] >= row["parameter"] and set(row["plan"]) > {"F"}
        elif row["curve"] == "Taylor 1":
            assert row["bound"] > 2
        else:
            assert row["bound"] == pytest.approx(20 / row["parameter"], abs=1e-4)
        assert 5 < row["psnr"][1] <= row["psnr"][0] < IDENTICAL
    quality.run(studio, out, work)  # again: nothing is left to do
    assert len(out.read_text().splitlines()) == len(rows)
    frontier.draw([out], tmp_path / "drawn", cells[0])
    with Image.open(tmp_path / "drawn" / "frontier.png") as picture:
        picture.load()
        assert picture.width > 400
    assert "## Equal bounds" in (tmp_path / "drawn" / "tables.md").read_text()


def test_a_picture_beside_itself_counts_as_the_most():
    pictures = torch.rand(2, 3, 8, 8)
    assert psnr(pictures, pictures).tolist() == [IDENTICAL] * 2
    assert psnr(pictures, pictures + 0.1).tolist() == pytest.approx([20.0] * 2, abs=1e-3)  # -20 log10 0.1
