"""The planner's predictions beside what ``run.py`` measured: ``python benchmarks/predict.py times.jsonl ...``.

Markdown, a row a scenario and strategy. Without CUDA graphs a GPU waits for its host, of which the model knows nothing
but for split sequences: those rows are marked, and only there for comparison.
"""

import json
import statistics
import sys
from functools import cache
from pathlib import Path

import group
import torch
from scenarios import SCENARIOS

from hybridiff_xdit.planner import Cost, Layout, Machine, one_gpu, predict, speed_of
from hybridiff_xdit.planner.denoisers import branch_inputs, build
from hybridiff_xdit.schedule.plan import Plan


def table(lines: list[dict]) -> str:
    """The table; seconds are those of a picture's denoising loop, medians where measured."""
    rows = [
        "| GPU | scenario | strategy | measured s | predicted s | error | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if not is_predicted(line):
            continue
        measured = seconds(line)
        predicted = prediction(line)
        note = "" if any(line.get("pieces") or ()) else "eager: not claimed"
        name = f"{line['device'].split()[1]} | {line['scenario']} | {line['strategy']}"
        error = f"{100 * (predicted / measured - 1):+.0f}%"
        rows.append(f"| {name} | {measured:.2f} | {predicted:.2f} | {error} | {note} |")
    return "\n".join(rows) + "\n"


def is_predicted(line: dict) -> bool:
    """Whether a strategy is the model's to predict: not xDiT's, AsyncDiff's, compiled, or the faster rank."""
    base, *ways = line["strategy"].split(", ")
    return not base.startswith(("xdit", "both branches")) and {"compiled", "rank 0"}.isdisjoint(ways)


def seconds(line: dict) -> float:
    """The median of the denoising loop a picture; in older lines, which have none, of the pipeline's call."""
    return statistics.median(line.get("loop") or line["seconds"]) / line.get("pictures", 1)


def prediction(line: dict) -> float:
    """Seconds of a picture, from the scenario, the plan that was run and the stored figures of the GPU alone."""
    cost = _cost(line["scenario"], getattr(torch, line["dtype"]))
    speed, _ = speed_of(cost.kind, line["device"])
    if line["plan"] is None:
        return one_gpu(cost, speed, line["steps"])
    _, *ways = line["strategy"].split(", ")
    pictures, degrees = line.get("pictures", 1), group.degrees(ways, len(line["peak_memory"]))
    ulysses, ring, layers = (degrees.get(axis, 1) for axis in group.AXES)
    layout = Layout(pictures, ulysses * ring, 2 * layers, ring=ring)
    return predict(cost, speed, Machine(), Plan.parse(line["plan"]), layout, pictures).seconds


@cache
def _cost(scenario: str, dtype: torch.dtype) -> Cost:
    settings, side = SCENARIOS[scenario].settings, SCENARIOS[scenario].side // 8
    with torch.device("meta"):
        denoiser = build(settings)
    return Cost.of(denoiser, branch_inputs(settings, side, side, device="meta"), dtype)


if __name__ == "__main__":
    read = (json.loads(line) for name in sys.argv[1:] for line in Path(name).read_text().splitlines())
    sys.stdout.write(table(list(read)))
