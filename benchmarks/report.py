"""Markdown table of a ``run.py`` result: ``python benchmarks/report.py times.jsonl``."""

import json
import statistics
import sys
from pathlib import Path

HEAD = (
    "scenario",
    "strategy",
    "denoising loop, s, median (min - max)",
    "loop over one GPU, eager / graphs / xDiT's best",
    "of floor",
    "bound",
    "FULL + PIPELINED + SKIPPED",
    "whole call, s",
    "after the loop, s",
    "MB sent, by rank",
    "GPU idle in the loop, %, by rank",
    "peak GiB, by rank",
)


def table(lines: list[dict]) -> str:
    """The table, one row a scenario and strategy. Seconds are per picture; baselines are of the same scenario and run.

    The floor, and where the loop begins and ends, are those of `run.py`. Peak memory is that up to the loop's end,
    without text encoders and VAE, of the ranks that have a part.
    """
    rows = [_row(HEAD), _row(["---"] * len(HEAD))]
    loops = {(line["scenario"], line["strategy"]): statistics.median(_loop(line)) for line in lines}
    for line in lines:
        scenario, plan = line["scenario"], line["plan"] or ""
        loop = _loop(line)
        xdit = [loops[key] for key in loops if key[0] == scenario and key[1].startswith("xdit")]
        bases = [*(loops.get((scenario, name)) for name in ("one-gpu", "one-gpu, graphs")), min(xdit, default=None)]
        after = line.get("after")
        idle = [share for share in line.get("idle", []) if share is not None]
        rows.append(
            _row(
                [
                    scenario,
                    line["strategy"],
                    f"{statistics.median(loop):.3f} ({min(loop):.3f} - {max(loop):.3f})",
                    " / ".join(f"{base / statistics.median(loop):.2f}" if base else "-" for base in bases),
                    f"{statistics.median(loop) * line['pictures'] / line['floor']:.2f}" if line.get("floor") else "",
                    f"{line['speedup_bound']:.2f}" if plan else "",
                    " + ".join(str(plan.count(letter)) for letter in "FPS") if plan else "",
                    f"{statistics.median(line['seconds']) / line['pictures']:.3f}",
                    f"{statistics.median(after) / line['pictures']:.3f}" if after and line["whole"] else "",
                    " / ".join(f"{count / 1e6:.1f}" for count in line["bytes_sent"] or []),
                    " / ".join(f"{100 * share:.0f}" for share in idle),
                    " / ".join(f"{count / 2**30:.2f}" for count in line["peak_memory"] if count),
                ]
            )
        )
    first = lines[0]
    to = "from the prompt to the picture" if first.get("whole") else "latents out"
    head = (
        f"{first['device']}, {first['dtype']}, torch {first['torch']}, diffusers {first['diffusers']}, "
        f"{first['steps']} steps, {len(first['seconds'])} repeats after a warm-up, {to}, "
        f"weights: {first.get('weights', 'random')}.\n\n"
    )
    return head + "\n".join(rows) + "\n"


def _loop(line: dict) -> list[float]:
    """Seconds per picture."""
    return [seconds / line["pictures"] for seconds in line["loop"]]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
