"""Markdown table of a ``run.py`` result: ``python benchmarks/report.py times.jsonl``."""

import json
import statistics
import sys
from pathlib import Path


def table(lines: list[dict]) -> str:
    """The table, one row a scenario and strategy; speed-ups are over ``one-gpu`` of the same scenario and run.

    The floor is that of `run.py`; "of floor" is the denoising loop's median over it.
    """
    rows = [
        "| scenario | strategy | s per picture, median (min - max) | over one GPU, eager / graphs | of floor | bound "
        "| FULL + PIPELINED + SKIPPED | MB sent, rank 0 / 1 | peak GiB, rank 0 / 1 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    medians = {(line["scenario"], line["strategy"]): statistics.median(line["seconds"]) for line in lines}
    for line in lines:
        seconds, plan = [second / line.get("pictures", 1) for second in line["seconds"]], line["plan"] or ""
        bases = [medians.get((line["scenario"], name)) for name in ("one-gpu", "one-gpu, graphs")]
        speedup = " / ".join(f"{base / statistics.median(seconds):.2f}" if base else "-" for base in bases)
        loop = statistics.median(line.get("loop") or line["seconds"])
        floor = f"{loop / line['floor']:.2f}" if line.get("floor") else ""
        kinds = " + ".join(str(plan.count(letter)) for letter in "FPS") if plan else ""
        sent = " / ".join(f"{count / 1e6:.1f}" for count in line["bytes_sent"] or [])
        bound = f"{line['speedup_bound']:.2f}" if plan else ""
        memory = line["peak_memory"][:1] if line["strategy"].startswith("one-gpu") else line["peak_memory"]
        peak = " / ".join(f"{count / 2**30:.2f}" for count in memory)
        time = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})"
        cells = [line["scenario"], line["strategy"], time, speedup, floor, bound, kinds, sent, peak]
        rows.append(f"| {' | '.join(cells)} |")
    first = lines[0]
    head = (
        f"{first['device']}, {first['dtype']}, torch {first['torch']}, diffusers {first['diffusers']}, "
        f"{first['steps']} steps, {len(first['seconds'])} repeats after a warm-up, latents out, random weights.\n\n"
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
