"""What a command shows: a progress bar a phase, our warnings and a summary, each from one rank.

What other libraries log is left out unless ``--verbose`` is given; errors never are.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..schedule.plan import Plan, StepKind


def quieten(is_verbose: bool) -> None:
    """Have the libraries log warnings alone, and from the first rank alone. It must come before they are imported."""
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_verbose else logging.WARNING if is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    if is_verbose:
        return
    # Their warnings are about their own installation: optional packages that they miss, defaults that they take.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "LOG_LEVEL"):  # the last is xDiT's
        os.environ.setdefault(variable, "error")
    if not is_first:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def loading(is_verbose: bool) -> Iterator[None]:
    """Meanwhile one bar counts the components of the pipeline that is loaded; those within a component are left out."""
    if is_verbose:
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as theirs

    ours: Any = diffusers_logging
    original, has_bars = ours.tqdm, theirs.is_progress_bar_enabled()

    def bar(*args: Any, desc: str = "", **kwargs: Any) -> Any:
        is_whole = "pipeline components" in desc
        return original(*args, **{**kwargs, "desc": "loading", "disable": kwargs.get("disable", False) or not is_whole})

    theirs.disable_progress_bar()
    ours.tqdm = bar
    try:
        yield
    finally:
        ours.tqdm = original
        if has_bars:
            theirs.enable_progress_bar()


class Denoising:
    """Watches the denoising of a diffusers pipeline.

    Attributes:
        seconds: of the last denoising, from the beginning of its progress bar to its end.
    """

    def __init__(self, pipe: Any, label: str = "denoising") -> None:
        self.seconds = 0.0
        self._pipe, self._original = pipe, pipe.progress_bar
        pipe.progress_bar = self._progress_bar
        self.show(label)

    def show(self, label: str) -> None:
        """Name the pipeline's bar, on the first rank, and have it show every step."""
        is_other = os.environ.get("RANK", "0") != "0"
        self._pipe.set_progress_bar_config(desc=label, mininterval=0, disable=is_other)

    def _progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        bar = self._original(*args, **kwargs)
        close, start = bar.close, _now()

        def closed() -> None:
            bar.close = close
            self.seconds = _now() - start
            close()

        bar.close = closed
        return bar


def summary(report: dict[str, Any] | None, steps: int, seconds: float) -> str:
    """What a run was and what that gained, in a line.

    Args:
        report: as `hybridiff_xdit.last_report` returns it; None where no step could be anything but FULL.
        steps: of the run.
        seconds: of its denoising.
    """
    took = f"{seconds:.2f} s denoising"
    if report is None:
        return f"{steps} steps; {took}"
    of = "one GPU" if report["sequence_degree"] == 1 else f"{report['sequence_degree']} GPUs that split the tokens"
    bound = f"speed-up bound {report['speedup_bound']:.2f}"
    error = f"; estimated error {report['estimated_error']:.1%}" if report["estimated_error"] else ""
    asked = report["config"].get("tolerance")
    # Without a word a run that gains nothing would look like one that was asked for nothing.
    why = f" (nothing could be skipped within tolerance {asked:g})" if asked and set(report["plan"]) == {"F"} else ""
    return f"{counts(report['plan'])} of {report['num_steps']} steps{why}; {bound} over {of}{error}; {took}"


def counts(plan: str) -> str:
    """How many steps of a plan are of which kind."""
    kinds = Plan.parse(plan)
    return ", ".join(f"{kinds.count(kind)} {kind.name}" for kind in StepKind if kind in kinds)


def say(lines: Iterable[str]) -> None:
    """Print lines, at once: another rank may be next."""
    print(*lines, sep="\n", flush=True)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
