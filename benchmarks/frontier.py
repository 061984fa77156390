"""Plots, tables and the picture strip of ``quality.py``'s rows.

    python benchmarks/frontier.py frontier_emoji-sd3.jsonl frontier_emoji-sdxl.jsonl --out benchmarks/results

Per model it writes ``frontier_MODEL.png`` (speed-up bound against PSNR, and tolerance against PSNR over all cells),
``strip_MODEL.png`` (pictures) and ``frontier_MODEL.md`` (tables).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from quality import PROMPTS, SHOWN

Row = dict[str, Any]

BOUNDS = (2.05, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.85, 3.0, 3.5, 4.0)
OURS, FEWER = "ours, target", "fewer plain steps"

#: Curve: (label, colour, marker, line). Ours and the baseline are drawn with their 5th percentile.
STYLES = {
    OURS: ("ours, by target", "tab:blue", "o", "-"),
    "ours, tolerance": ("ours, by tolerance", "tab:blue", "D", "--"),
    "ours, target, FP only": ("ours, nothing SKIPPED", "tab:green", "v", "-"),
    "ours, fixed": ("ours, fixed pattern", "tab:cyan", "s", ""),
    FEWER: ("fewer plain steps", "black", "o", "-"),
    "fixed, reuse": ("reuse, fixed pattern", "tab:olive", "s", ""),
    "paper, reuse": ("reuse, paper's windows", "tab:olive", "^", "-"),
    "paper, none": ("none, paper's windows", "tab:orange", "^", "-"),
    "paper": ("paper (mixed)", "tab:red", "^", "-"),
    "both branches": ("both branches pipelined", "tab:purple", "X", ""),
}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def read(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """Rows by model."""
    rows: dict[str, list[Row]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["model"], []).append(row)
    return rows


def curve(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of a curve, by their bound."""
    return sorted((row for row in rows if row["curve"] == name), key=lambda row: row["bound"])


def at(rows: list[Row], bound: float, value: Callable[[Row], float]) -> float | None:
    """The best value that a curve has at a bound or beyond; None past its fastest row.

    On the line between the neighbours, or that of a faster row, since nobody would take the slower run for less.
    """
    faster = [value(row) for row in rows if row["bound"] >= bound - 0.02]
    if len(rows) < 2 or not faster:
        return None
    if bound < rows[0]["bound"]:
        return max(faster)
    return max(*faster, float(np.interp(bound, [row["bound"] for row in rows], [value(row) for row in rows])))


def mean(row: Row) -> float:
    return row["psnr"][0]


def low(row: Row) -> float:
    return row["psnr"][1]


# Tables.


def markdown(cells: list[list[str]]) -> str:
    head, *body = cells
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def pair(value: float | None, percentile: float | None) -> str:
    return "" if value is None or percentile is None else f"{value:.1f} ({percentile:.1f})"


def main_table(rows: list[Row]) -> str:
    """Ours beside fewer plain steps and the published rule at equal bounds."""
    ours, plain, paper = (curve(rows, name) for name in (OURS, FEWER, "paper"))
    names = zip(("ours", "fewer plain steps", "paper (mixed)"), (ours, plain, paper), strict=True)
    heads = [f"{name}{where_else(rows, points)}" for name, points in names]
    table = [["speed-up bound", *heads[:2], "ours - fewer", heads[2]]]
    for bound in BOUNDS:
        a, b = at(ours, bound, mean), at(plain, bound, mean)
        table.append(
            [
                f"{bound:g}",
                pair(a, at(ours, bound, low)),
                pair(b, at(plain, bound, low)),
                # Other prompts are not subtracted.
                f"{a - b:+.1f}" if a and b and ours[0]["prompts"] == plain[0]["prompts"] else "",
                pair(at(paper, bound, mean), at(paper, bound, low)),
            ]
        )
    return markdown(table)


def grid_table(rows: list[Row]) -> str:
    """What a tolerance gives in each cell: bound and PSNR, and the difference to fewer plain steps at that bound."""
    cells = list(dict.fromkeys(row["cell"] for row in rows if row["curve"] == "ours, tolerance"))
    values = sorted({row["parameter"] for row in rows if row["curve"] == "ours, tolerance"})
    table = [["cell", *(f"tolerance {value:g}" for value in values)]]
    for cell in cells:
        within = [row for row in rows if row["cell"] == cell]
        plain = curve(within, FEWER)
        texts = {row["parameter"]: _beside(row, plain) for row in curve(within, "ours, tolerance")}
        table.append([cell_name(within[0]), *(texts.get(value, "") for value in values)])
    return markdown(table)


def _beside(row: Row, plain: list[Row]) -> str:
    fewer = at(plain, row["bound"], mean)
    difference = "" if fewer is None or row["bound"] <= 2 else f", {mean(row) - fewer:+.1f}"
    return f"{row['bound']:.2f}: {pair(mean(row), low(row))}{difference}"


def spread_table(rows: list[Row]) -> str:
    """How far the PSNR of a tolerance goes apart over the cells that pipeline anything, bfloat16 left out."""
    table = [["tolerance", "cells", "PSNR dB, lowest", "median", "highest"]]
    chosen = pipelined(rows)
    for value in sorted({row["parameter"] for row in chosen}):
        values = [mean(row) for row in chosen if row["parameter"] == value]
        figures = (f"{f(values):.1f}" for f in (np.min, np.median, np.max))
        table.append([f"{value:g}", str(len(values)), *figures])
    return markdown(table)


def all_table(rows: list[Row]) -> str:
    """Every row of a cell with every measure."""
    further = [name for name in ("lpips", "fid", "clip") if any(name in row for row in rows)]
    head = [
        "strategy",
        "prompts",
        "device",
        "bound",
        "PSNR dB, mean (p5)",
        "SSIM",
        "Frechet to one GPU",
        "to the training set",
        "retrieval %",
    ]
    table = [[*head, *further]]
    for row in rows:
        name = f"{row['curve']} {'' if row['parameter'] is None else row['parameter']}".strip()
        figures = [
            str(row["prompts"]),
            row["device"],
            f"{row['bound']:.3f}",
            pair(*row["psnr"]) if "psnr" in row else "",
            *(f"{row[key]:.5f}" if key in row else "" for key in ("ssim", "frechet", "frechet_training")),
            f"{100 * row['retrieval']:.1f}" if "retrieval" in row else "",
        ]
        table.append([name, *figures, *(f"{row[key]:.3f}" if key in row else "" for key in further)])
    return markdown(table)


def pipelined(rows: list[Row]) -> list[Row]:
    """Runs by tolerance that have PIPELINED steps, but for bfloat16, whose own rounding is the larger error."""
    return [r for r in rows if r["curve"] == "ours, tolerance" and r["bound"] > 2 and r["dtype"] != "bfloat16"]


def single_table(rows: list[Row]) -> str:
    """A plan a picture beside a plan a batch."""
    table = [["strategy", "prompts", "one a call: bound, PSNR dB", "in one call: bound, PSNR dB"]]
    for row in rows:
        name = f"{row['curve'].removesuffix(', one a call')} {row['parameter']:g}"
        apart = f"{row['bound']:.2f}, {row['psnr_mean']:.1f}"
        together = f"{row['bound_together']:.2f}, {row['psnr_mean_together']:.1f}"
        table.append([name, str(row["prompts"]), apart, together])
    return markdown(table)


def cell_name(row: Row) -> str:
    return f"{row['steps']} steps, w = {row['guidance_scale']:g}, {row['solver']} order, {SHORT[row['dtype']]}"


def text(model: str, rows: list[Row], main: str) -> str:
    """The whole of ``frontier_MODEL.md``."""
    within = measured(rows, main)
    first = within[0]
    parts = [
        f"# {model}: speed-up bound against closeness to the one-GPU pictures\n",
        f"{', '.join(dict.fromkeys(row['device'] for row in rows))}; "
        f"torch {first['torch']}, diffusers {first['diffusers']}, transformers "
        f"{first['transformers']}, torchmetrics {first['torchmetrics']}; {first['prompts']} prompts, "
        f"{first['batch']} a call, each call its own plan.\n",
        "PSNR in dB to the one-GPU pictures of the same dtype: mean over the prompts and, in brackets, the 5th "
        "percentile; a picture that is the same bit for bit counts as 100 dB. Between measured bounds the line "
        "between the neighbours is read, or a faster row, where that is closer.\n",
        f"## Equal bounds: {cell_name(first)}\n",
        main_table(within + borrowed(rows, main)),
        "## Tolerances\n",
        "Bound: PSNR, and its difference to fewer plain steps at the same bound.\n",
        grid_table(rows),
        spread_table(rows),
    ]
    for cell in dict.fromkeys(row["cell"] for row in rows if row["steps"] == first["steps"]):
        chosen = [row for row in rows if row["cell"] == cell and "psnr_mean" not in row]
        if any(row["curve"] in ("cap", OURS) for row in chosen):
            parts += [f"## All rows: {cell_name(chosen[0])}\n", all_table(chosen)]
    if singles := [row for row in rows if "psnr_mean" in row]:
        parts += ["## A plan a picture\n", single_table(singles)]
    return "\n".join(parts)


def measured(rows: list[Row], main: str) -> list[Row]:
    """The main cell's rows with the most prompts, the reference first."""
    within = [row for row in rows if row["cell"] == main]
    most = max(row["prompts"] for row in within)
    return sorted((row for row in within if row["prompts"] == most), key=lambda row: row["curve"] != "one GPU")


def borrowed(rows: list[Row], main: str) -> list[Row]:
    """Rows of curves that `measured` has none of: with fewer prompts, or else from the cell in float16."""
    own = {row["curve"] for row in measured(rows, main)}
    fewer = [row for row in rows if row["cell"] == main and row["curve"] not in own]
    own |= {row["curve"] for row in fewer}
    twin = f"{main.rpartition('-')[0]}-float16"
    return fewer + [row for row in rows if row["cell"] == twin and row["curve"] not in own]


def where_else(rows: list[Row], points: list[Row]) -> str:
    """What sets a curve's rows apart from the first of ``rows``, for its label."""
    first = points[0] if points else rows[0]
    apart = [SHORT[first["dtype"]]] if first["dtype"] != rows[0]["dtype"] else []
    apart += [f"{first['prompts']} prompts"] if first["prompts"] != rows[0]["prompts"] else []
    return f" ({', '.join(apart)})" if apart else ""


# Plots.


def frontier(axes: Axes, rows: list[Row]) -> None:
    """Speed-up bound against PSNR. Lines are named at their ends, points in the legend."""
    ends: list[tuple[float, float, str, str]] = []
    top = 0.0
    for name, (label, colour, marker, line) in STYLES.items():
        points = curve(rows, name)
        if not points:
            continue
        x, y = [row["bound"] for row in points], [mean(row) for row in points]
        top = max([top, *(mean(row) for row in points if row["bound"] > 2)])
        is_main = name in (OURS, FEWER)
        label += where_else(rows, points)
        axes.plot(
            x,
            y,
            linestyle=line or "none",
            marker=marker,
            color=colour,
            lw=2.2 if is_main else 1.2,
            ms=5,
            label="" if line else label,
        )
        if is_main:
            percentiles = [low(row) for row in points]
            axes.plot(x, percentiles, ":", color=colour, lw=1.2)
            axes.fill_between(x, y, percentiles, color=colour, alpha=0.08, lw=0)
        if line:
            ends.append((x[-1], y[-1], label, colour))
    axes.set(xlim=(1.98, 4.8), xlabel="speed-up bound over one GPU", ylabel="PSNR to the one-GPU picture, dB")
    axes.set_ylim(top=top + 3)
    _label_ends(axes, ends)
    axes.plot([], [], ":", color="grey", label="5th percentile of ours and of fewer steps")
    axes.legend(fontsize=8, loc="upper right")


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names at the ends of the lines, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    floor, gap = -np.inf, 0.027 * (top - bottom)
    for x, y, label, colour in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + gap)
        box = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.5)
        axes.annotate(label, (x, y), (x + 0.03, floor), color=colour, fontsize=8, va="center", bbox=box)


def tolerances(axes: Axes, rows: list[Row]) -> None:
    """Tolerance against PSNR, a line a cell; where nothing is pipelined there is no point."""
    colours = dict(zip(sorted({r["steps"] for r in rows}, reverse=True), plt.cm.viridis((0, 0.5, 0.85)), strict=False))
    widths = {value: 0.7 + 0.7 * i for i, value in enumerate(sorted({row["guidance_scale"] for row in rows}))}
    chosen = pipelined(rows)
    for cell in dict.fromkeys(row["cell"] for row in chosen):
        points = sorted((row for row in chosen if row["cell"] == cell), key=lambda row: row["parameter"])
        first = points[0]
        style = dict(color=colours[first["steps"]], lw=widths[first["guidance_scale"]])
        line, marker = ("-", "o") if first["solver"] == "first" else ("--", "s")
        axes.plot([p["parameter"] for p in points], [mean(p) for p in points], line, marker=marker, ms=4, **style)
    for steps, colour in colours.items():
        axes.plot([], [], color=colour, label=f"{steps} steps")
    for value, width in widths.items():
        axes.plot([], [], color="grey", lw=width, label=f"w = {value:g}")
    axes.plot([], [], "-", marker="o", color="grey", label="first order")
    axes.plot([], [], "--", marker="s", color="grey", label="second order")
    ticks = sorted({row["parameter"] for row in chosen})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="tolerance", ylabel="PSNR to the one-GPU picture, dB", title="What a tolerance gives, over all cells"
    )
    axes.legend(fontsize=8)


def plot(model: str, rows: list[Row], main: str, path: Path) -> None:
    within = measured(rows, main)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.2), width_ratios=(1.5, 1), layout="constrained")
    frontier(left, within + borrowed(rows, main))
    left.set_title(f"{model}: {cell_name(within[0])}, {within[0]['prompts']} prompts")
    tolerances(right, rows)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def strip(model: str, rows: list[Row], main: str, pictures: dict[str, np.ndarray], path: Path) -> None:
    """Columns: the strategies whose pictures were kept; rows: prompts."""
    within = sorted((row for row in rows if row["cell"] == main), key=lambda row: row["prompts"])
    chosen = {f"{main}/{row['curve']}/{row['parameter']}": row for row in within}  # of equals that with most prompts
    order = ["one GPU", "ours, tolerance", OURS, FEWER, "paper"]
    columns = sorted(
        ((row, pictures[key]) for key, row in chosen.items() if key in pictures),
        key=lambda column: (order.index(column[0]["curve"]), column[0]["bound"]),
    )
    if not columns:
        return
    captions = PROMPTS.read_text().splitlines()
    shown = [captions[i] for i in SHOWN if i < columns[0][0]["prompts"]] or captions[:1]
    size = (1.75 * len(columns), 1.75 * len(shown) + 0.9)
    figure, grid = plt.subplots(len(shown), len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, (row, stack) in enumerate(columns):
        for line, picture in enumerate(stack):
            axes = grid[line][column]
            axes.imshow(picture, interpolation="lanczos")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color("lightgrey")
            if column == 0:
                axes.set_ylabel(shown[line].replace(" style emoji of ", ":\n"), fontsize=8)
        grid[0][column].set_title(_heading(row), fontsize=9)
    figure.suptitle(f"{model}: {cell_name(columns[0][0])}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _heading(row: Row) -> str:
    names = {
        "one GPU": "one GPU\n",
        "ours, tolerance": f"ours, tolerance {row['parameter']}\n",
        OURS: "ours\n",
        FEWER: f"{row['parameter']} plain steps\n",
        "paper": f"paper, k = {row['parameter']}\n",
    }
    figures = f"{row['bound']:.2f}x, {mean(row):.1f} dB" if "psnr" in row else f"{row['steps']} steps"
    return names[row["curve"]] + figures


def draw(paths: Iterable[Path], out: Path, main: str | None = None) -> None:
    """Write everything for every model in the files; ``main``: the cell of the plot, default that with most rows."""
    paths = list(paths)
    out.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict[str, np.ndarray]] = {}
    for path in paths:
        model = json.loads(path.read_text().splitlines()[0])["model"]
        if path.with_suffix(".npz").exists():
            pictures.setdefault(model, {}).update(np.load(path.with_suffix(".npz")))
    for model, rows in read(paths).items():
        cell = main or Counter(row["cell"] for row in rows).most_common(1)[0][0]
        plot(model, rows, cell, out / f"frontier_{model}.png")
        strip(model, rows, cell, pictures.get(model, {}), out / f"strip_{model}.png")
        (out / f"frontier_{model}.md").write_text(text(model, rows, cell))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines of quality.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cell", help="of the plot and the main table, such as T50-w5-first-float32")
    args = parser.parse_args()
    draw(args.rows, args.out, args.cell)


if __name__ == "__main__":
    main()
