"""Tables and a plot of ``quality.py``'s rows.

    python benchmarks/frontier.py rows_*.jsonl --out benchmarks/results/study

It writes ``tables.md`` and ``frontier.png`` (speed-up bound against PSNR, a field a model).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from quality import BOUNDS, Cell

Row = dict[str, Any]

TARGET, BY_TOLERANCE, EVENLY, FEWER = "ours, target", "ours, tolerance", "ours, evenly spaced", "fewer plain steps"
COLOURS = {TARGET: "tab:blue", BY_TOLERANCE: "tab:cyan", EVENLY: "tab:green", FEWER: "black"}
NEAR = 0.02  # of a bound: counts as the same


def read(paths: Iterable[Path]) -> dict[str, list[Row]]:
    """Rows by model."""
    rows: dict[str, list[Row]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["model"], []).append(row)
    return rows


def curve(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of a curve that have a PSNR and save time, by their bound."""
    found = (row for row in rows if row["curve"] == name and "psnr" in row and row["bound"] > 2)
    return sorted(found, key=lambda row: row["bound"])


def at(rows: list[Row], bound: float, value: Callable[[Row], float]) -> float | None:
    """The best value that a curve has at a bound or beyond; None past its fastest row.

    On the line between the neighbours, or that of a faster row, since nobody would take the slower run for less.
    """
    faster = [value(row) for row in rows if row["bound"] >= bound - NEAR]
    if not faster:
        return None
    if len(rows) < 2 or bound < rows[0]["bound"]:
        return max(faster)
    return max(*faster, float(np.interp(bound, [row["bound"] for row in rows], [value(row) for row in rows])))


def mean(row: Row) -> float:
    return row["psnr"][0]


def low(row: Row) -> float:
    return row["psnr"][1]


def others(rows: list[Row]) -> list[str]:
    """The curves that are not ours, with the cell's solver."""
    names = dict.fromkeys(row["curve"] for row in rows)
    return [name for name in names if name != "one GPU" and not name.startswith(("ours", "fewer steps"))]


# Tables.


def markdown(cells: list[list[str]]) -> str:
    head, *body = cells
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def pair(value: float | None, percentile: float | None) -> str:
    return "" if value is None or percentile is None else f"{value:.1f} ({percentile:.1f})"


def bounds_table(models: dict[str, list[Row]]) -> str:
    """Ours beside our evenly spaced patterns, the best of the others and fewer plain steps, at equal bounds."""
    table = [["model", "bound", "ours", "evenly spaced, ours", "best other", "ours - best other", FEWER]]
    for model, rows in models.items():
        for bound in BOUNDS:
            ours = curve(rows, TARGET)
            mine = at(ours, bound, mean), at(ours, bound, low)
            patterns = [row for row in curve(rows, EVENLY) if row["bound"] >= bound - NEAR]
            pattern = max(patterns, key=mean, default=None)
            found = {name: at(curve(rows, name), bound, mean) for name in others(rows)}
            best = max((name for name, value in found.items() if value is not None), key=found.get, default=None)  # type: ignore[arg-type]
            theirs = (found[best], at(curve(rows, best), bound, low)) if best else (None, None)
            fewer = curve(rows, FEWER)
            apart = [a - b for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
            table.append(
                [
                    model,
                    f"{bound:g}",
                    pair(*mine),
                    f"{pair(mean(pattern), low(pattern))} `{pattern['parameter']}`" if pattern else "",
                    f"{pair(*theirs)} {best}" if best else "",
                    " ".join(f"{value:+.1f}" for value in apart[:1]) + "".join(f" ({v:+.1f})" for v in apart[1:]),
                    pair(at(fewer, bound, mean), at(fewer, bound, low)),
                ]
            )
    return markdown(table)


def tolerance_table(models: dict[str, list[Row]], keep: Callable[[Row], bool]) -> str:
    """What tolerances give in the cells whose rows are kept, beside fewer plain steps in the same time."""
    chosen = [row for rows in models.values() for row in rows if row["curve"] == BY_TOLERANCE and keep(row)]
    values = sorted({row["parameter"] for row in chosen})
    table = [["model", "cell", *(f"tolerance {value:g}" for value in values), "monotone"]]
    for model, rows in models.items():
        for cell in dict.fromkeys(row["cell"] for row in chosen if row["model"] == model):
            within = [row for row in rows if row["cell"] == cell]
            found = {row["parameter"]: row for row in within if row["curve"] == BY_TOLERANCE}
            texts = [_beside(found[value], curve(within, FEWER)) if value in found else "" for value in values]
            measured = [mean(found[value]) for value in sorted(found)]
            falls = all(a >= b - 0.1 for a, b in pairwise(measured))
            table.append([model, cell, *texts, "yes" if falls else "no"])
    return markdown(table)


def _beside(row: Row, plain: list[Row]) -> str:
    if row["bound"] <= 2:
        return "all FULL"
    fewer = at(plain, row["bound"], mean)
    return f"{row['bound']:.2f}: {pair(mean(row), low(row))}" + ("" if fewer is None else f", fewer {fewer:.1f}")


def exact_table(models: dict[str, list[Row]]) -> str:
    """PSNR to the nearly exact solution."""
    table = [["model", "one GPU", *(f"bound {bound:g}" for bound in BOUNDS)]]
    for model, rows in models.items():
        rows = [row for row in rows if "psnr_exact" in row]
        alone = next((row for row in rows if row["curve"] == "one GPU"), None)
        if alone is None:
            continue
        for name in (
            TARGET,
            *others(rows),
            *sorted({r["curve"] for r in rows if r["curve"].startswith("fewer steps")}),
        ):
            points = sorted((row for row in rows if row["curve"] == name), key=lambda row: row["bound"])
            values = [at(points, bound, lambda row: row["psnr_exact"][0]) for bound in BOUNDS]
            texts = ["" if value is None else f"{value:.1f}" for value in values]
            table.append([f"{model}, {name}", f"{alone['psnr_exact'][0]:.1f}", *texts])
    return markdown(table)


def rows_table(rows: list[Row]) -> str:
    """Every row of a cell."""
    table = [["strategy", "bound", "PSNR", "SSIM", "first plan"]]
    for row in rows:
        name = f"{row['curve']} {'' if row['parameter'] is None else row['parameter']}".strip()
        figures = [f"{row['bound']:.2f}", pair(*row["psnr"]) if "psnr" in row else "", f"{row.get('ssim', '')}"]
        table.append([name, *figures, f"`{row['plan']}`" if row["plan"] else ""])
    return markdown(table)


def text(models: dict[str, list[Row]]) -> str:
    """The whole of ``tables.md``."""
    every = [row for rows in models.values() for row in rows]
    main = {model: [row for row in rows if row["cell"] == str(Cell())] for model, rows in models.items()}
    halves = {model: [r for r in rows if r["dtype"] != "float32"] for model, rows in models.items()}
    parts = [
        "# Every way of saving time, beside the pictures of one GPU\n",
        f"{', '.join(dict.fromkeys(row['device'] for row in every))}; torch {every[0]['torch']}, diffusers "
        f"{every[0]['diffusers']}, transformers {every[0]['transformers']}; {every[0]['batch']} pictures a "
        "call of ours.\n",
        "PSNR in dB to the one-GPU pictures of the same cell: mean over the prompts and, in brackets, the 5th "
        "percentile; a picture that is the same bit for bit counts as 100 dB. Between measured bounds the line "
        "between the neighbours is read, or a faster row, where that is closer.\n",
        f"## Equal bounds: {Cell()}\n",
        bounds_table(main),
        "## Tolerances\n\nBound: PSNR, and that of fewer plain steps at the same bound.\n",
        tolerance_table(models, lambda row: row["dtype"] == "float32" and not isinstance(row["guidance_scale"], str)),
        "## Guidance that changes during the run\n",
        tolerance_table(models, lambda row: isinstance(row["guidance_scale"], str)),
        "## Half precision\n\nThe cap is one GPU in that dtype beside one GPU in float32.\n",
        tolerance_table(halves, lambda row: True),
        markdown(
            [
                ["model", "cell", "cap"],
                *([r["model"], r["cell"], pair(*r["psnr"])] for r in every if r["curve"] == "cap"),
            ]
        ),
        f"## PSNR to the nearly exact solution: {Cell()}\n",
        exact_table(main),
    ]
    for model, rows in main.items():
        parts += [f"## All rows: {model}, {Cell()}\n", rows_table(rows)]
    return "\n".join(parts)


# Plot.


def frontier(axes: Axes, rows: list[Row]) -> None:
    """Speed-up bound against PSNR; ours and fewer plain steps with their 5th percentile."""
    for name in (TARGET, BY_TOLERANCE, EVENLY, FEWER, *(other for other in others(rows) if other != FEWER)):
        points = curve(rows, name)
        x, y = [row["bound"] for row in points], [mean(row) for row in points]
        style = {"color": COLOURS[name], "lw": 2.0} if name in COLOURS else {"lw": 1.0, "alpha": 0.8}
        axes.plot(x, y, "s" if name == EVENLY else "o-", ms=4 if name in COLOURS else 3, label=name, **style)
        if name in (TARGET, FEWER):
            axes.fill_between(x, y, [low(row) for row in points], color=COLOURS[name], alpha=0.1, lw=0)
    axes.set(xlim=(1.98, 7), xlabel="speed-up bound over one GPU", ylabel="PSNR to the one-GPU picture, dB")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper right")


def draw(paths: Iterable[Path], out: Path, cell: str | None = None) -> None:
    """Write the tables and the plot; ``cell``: that of the plot, the main one if none is given."""
    models = read(paths)
    out.mkdir(parents=True, exist_ok=True)
    across = min(3, len(models))
    down = -(-len(models) // across)
    figure, fields = plt.subplots(down, across, figsize=(5.6 * across, 4.6 * down), squeeze=False, layout="constrained")
    for axes, (model, rows) in zip(fields.flat, models.items(), strict=False):
        frontier(axes, [row for row in rows if row["cell"] == (cell or str(Cell()))])
        axes.set_title(model)
    figure.savefig(out / "frontier.png", dpi=100)
    plt.close(figure)
    (out / "tables.md").write_text(text(models))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines of quality.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study"))
    parser.add_argument("--cell", help="of the plot, such as T50-w5-unipc-float32")
    args = parser.parse_args()
    draw(args.rows, args.out, args.cell)


if __name__ == "__main__":
    main()
