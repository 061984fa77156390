"""What a run leaves to read: ``report.json``, and ``report.png`` with the discrepancy and the plan."""

import json
import math
from pathlib import Path
from typing import Any

from .schedule.plan import Phase, Plan, StepKind

#: Colour of each kind of work in the plan's picture (of stages: by branch of the rank), of each phase behind the curve.
_COLOURS = {"uncond": "#4c72b0", "cond": "#dd8452", "-": "#eeeeee"}
_STAGES = ("#55a868", "#8172b3")
_PHASES = {Phase.WARM_UP: "#f7f7f2", Phase.PARALLELISM: "#ddeee1", Phase.FULLY_CONNECTING: "#f1f1f7"}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``report.json`` and ``report.png`` into a folder that exists.

    Args:
        report: as `hybridiff_xdit.last_report` returns it.
        folder: an existing folder; files of an earlier run are replaced.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _draw(report, folder / "report.png")


def _draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan = Plan.parse(report["plan"])
    stages = report["config"]["stages"]
    rows = plan.rows(stages)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curve, grid = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])

    known = {step: math.nan if value is None else value for step, value in report["discrepancy"]}
    values = [known.get(step, math.nan) for step in range(len(plan))]  # a gap where nothing was measured
    curve.plot(values, "o-", color="#333333", markersize=3, linewidth=1)
    curve.set_ylim(0, 1.15 * max([value for value in values if math.isfinite(value)], default=1.0))
    for phase, colour in _PHASES.items():
        steps = [row.step for row in rows if row.phase is phase]
        if steps:
            curve.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=colour, linewidth=0)
            curve.text(steps[0] - 0.3, 0.97, phase.name, transform=curve.get_xaxis_transform(), va="top", fontsize=7)
    for row in rows:
        for rank, work in enumerate(row.work):
            style = {"color": _colour(work), "edgecolor": "white", "linewidth": 0.5}
            grid.barh(stages - 1 - rank, 1, left=row.step - 0.5, height=0.9, **style)
    curve.set_ylabel("discrepancy M")
    config = report["config"]
    curve.set_title(
        f"{report['model']}: policy {config['policy']}, guidance {config['guidance']}, "
        f"{' + '.join(f'{plan.count(kind)} {kind.name}' for kind in StepKind if kind in plan)} steps, "
        f"speed-up bound {report['speedup_bound']:.2f}",
        fontsize=10,
    )
    grid.set_yticks([*reversed(range(stages))], [f"rank {rank}" for rank in range(stages)])
    grid.set_xlabel("step")
    grid.set_xlim(-0.5, len(plan) - 0.5)
    names = [*_COLOURS, *(f"stage{stage}" for stage in range(stages))]
    used = [work for work in names if any(work in row.work for row in rows)]
    handles = [Patch(color=_colour(work), label="idle" if work == "-" else work) for work in used]
    curve.legend(handles=handles, loc="center right", fontsize=8)
    figure.savefig(path, dpi=120)


def _colour(work: str) -> str:
    return _STAGES[int(work.removeprefix("stage")) % 2] if work.startswith("stage") else _COLOURS[work]
