"""The ranks of a server: the first tells the others what to make, and gets what the last one has made.

Messages are JSON or an encoded picture, and never pickled.
"""

from __future__ import annotations

import io
import json
import logging
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ...ranks.agreement import Gone
from ...seam.hooks import configure, last_report
from ...seam.signals import RunOver
from ..runner import HybridRunner, mp4
from .messages import Messages

logger = logging.getLogger(__name__)


class Cancelled(Exception):
    """The client has gone away."""


class Refused(ValueError):
    """The model cannot make what was asked for: every rank said so."""


class Failed(RuntimeError):
    """Something went wrong on a rank. All ranks are ready for the next request."""


class Lost(RuntimeError):
    """A rank has ended."""


@dataclass
class Outcome:
    """What came of a request on one rank.

    Attributes:
        kind: ``made``; ``cancelled``; ``refused``, a ValueError; ``failed``, another error; or ``left``, an error that
            says that another rank has left the run.
        message: of the error.
        trace: of an error of the kind ``failed``.
    """

    kind: str
    message: str = ""
    trace: str = ""


@dataclass
class Made:
    """A picture or a video.

    Attributes:
        data: the file.
        media_type: of the file.
        plan: a letter a step; None where every step was as without us.
        bound: of the speed-up over one GPU.
        error: what skipping is estimated to have added to the latents, relative to their size; None where unknown.
        seconds: that the ranks took, with the texts' encoding and the VAE's decoding.
    """

    data: bytes
    media_type: str
    plan: str | None
    bound: float | None
    error: float | None
    seconds: float


class Ranks:
    """A runner that is loaded on all ranks. All of them must make it at the same time.

    Args:
        runner: is initialized.
        defaults: the runner's arguments where a request gives none.
    """

    def __init__(self, runner: HybridRunner, defaults: dict[str, Any]) -> None:
        self.runner, self._defaults = runner, defaults
        self.messages = Messages()
        self._is_cancelled: Callable[[], bool] = bool  # False; the first rank's is the request's
        self._pipe = getattr(runner.model.pipe, "module", runner.model.pipe)
        if hasattr(self._pipe, "progress_bar"):
            self._cancel_between_steps()
            self._pipe.set_progress_bar_config(disable=not runner.is_verbose or self.messages.rank > 0)

    @property
    def makes_videos(self) -> bool:
        """Whether the model makes videos, and not pictures."""
        return bool(self.runner.model.settings.model_output_type == "video")

    def make(self, asked: dict[str, Any], is_cancelled: Callable[[], bool]) -> Made:
        """Make a picture on all ranks; called on the first.

        Args:
            asked: runner's arguments that differ from the defaults, and ``tolerance`` or ``speedup``.
            is_cancelled: is asked on every step.

        Raises:
            Cancelled: it said so.
            Refused: the model cannot make that.
            Failed: there was an error.
            Lost: a rank has ended.
        """
        begin = time.perf_counter()
        self._is_cancelled, who = is_cancelled, "a rank"
        try:
            self.messages.tell(json.dumps(asked).encode())
            outcome, data = self._run(asked)
            outcomes = [outcome]
            for rank in range(1, self.messages.size):
                who = f"rank {rank}"
                outcomes.append(Outcome(**json.loads(self.messages.receive(rank))))
                data = self.messages.receive(rank)  # of the last rank in the end, which hands out the picture
        except RuntimeError as error:
            raise Lost(f"{who} has ended") from error
        for rank, outcome in enumerate(outcomes):
            if outcome.kind == "failed":
                logger.error("a request failed on rank %d\n%s", rank, outcome.trace)
        _raise(outcomes)
        report = last_report(self.runner.model.pipe) or {}
        return Made(
            data,
            "video/mp4" if self.makes_videos else "image/png",
            report.get("plan"),
            report.get("speedup_bound"),
            report.get("estimated_error"),
            time.perf_counter() - begin,
        )

    def follow(self) -> None:
        """Take part in everything that the first rank makes, until that rank has ended; called on the others."""
        with suppress(RuntimeError):
            while True:
                outcome, data = self._run(json.loads(self.messages.tell()))
                self.messages.send(json.dumps(asdict(outcome)).encode())
                self.messages.send(data)

    def _run(self, asked: dict[str, Any]) -> tuple[Outcome, bytes]:
        """Take part in a request; on the last rank with what was made."""
        try:
            configure(self.runner.model.pipe, tolerance=asked.get("tolerance"), speedup=asked.get("speedup"))
            made, _ = self.runner.run(self.runner.preprocess_args({**self._defaults, **asked}))
            data = b""
            if self.messages.rank == self.messages.size - 1:
                data = _png(made.images[0]) if made.images else mp4(made.videos[0], self.runner.model.settings.fps)
            return Outcome("made"), data
        except Cancelled:
            return Outcome("cancelled"), b""
        except (RunOver, Gone) as error:
            return Outcome("left", str(error)), b""
        except ValueError as error:
            return Outcome("refused", str(error)), b""
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}", traceback.format_exc()), b""

    def _cancel_between_steps(self) -> None:
        """Have a run end with `Cancelled` after a step, as by an error in the pipeline's own loop.

        A callback would do it too. But a callback may change the guidance, so it makes every step wait for the GPU.
        """
        original = self._pipe.progress_bar

        def progress_bar(*args: Any, **kwargs: Any) -> Any:
            bar = original(*args, **kwargs)
            update = bar.update

            def updated(*args: Any) -> Any:
                if self._is_cancelled():
                    raise Cancelled
                return update(*args)

            bar.update = updated
            return bar

        self._pipe.progress_bar = progress_bar


def _raise(outcomes: list[Outcome]) -> None:
    """Raise what came of a request if it is no picture. The ranks' outcomes may differ: one error ends them all."""
    by_kind = {kind: [outcome.message for outcome in outcomes if outcome.kind == kind] for kind in _KINDS}
    if by_kind["cancelled"]:
        raise Cancelled
    if len(by_kind["refused"]) == len(outcomes):
        raise Refused(by_kind["refused"][0])
    if errors := [message for kind in ("failed", "refused", "left") for message in by_kind[kind]]:
        raise Failed(errors[0])


_KINDS = ("made", "cancelled", "refused", "failed", "left")


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
