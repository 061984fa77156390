"""What the ranks of a run tell one another, beside their predictions.

Every FULL step has one exchange, at its first call, whose header holds a checksum of the latents and a status. So ranks
that have drifted apart are found, and a rank that leaves the run (by an error of its own, or an interruption) can say
so: it takes part in one more exchange. What was said is read late, when the GPU has the next evaluation to do; every
rank reads the same, so all of them end the run at the same place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from ..engine import from_host, to_host
from ..evaluate.calls import Call
from ..evaluate.streams import LEFT, RUNNING, Streams
from ..ranks.comm import checksum

FAILED = LEFT + 1  #: A rank's status where the evaluation of a step that is being learnt has raised an error.


class RunOver(RuntimeError):
    """The ranks drifted apart, or one of them left the run. Every rank raises it at the same place."""


class _Late(NamedTuple):
    """Flags of a FULL step, on their way to the host: drifted, another argument than foretold, each rank's status."""

    step: int
    values: torch.Tensor
    arrival: torch.cuda.Event | None


class Signals:
    """What this rank says and hears in one run.

    Args:
        streams: exchanges headers, with predictions or alone.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.is_over = False  # whether all ranks know that the run has ended
        self.own: Exception | None = None  # an error of this rank's, of which the others are not told yet
        self.pending: list[torch.Tensor] = []  # whether arguments differ from what was foretold, 0-d
        self._late: list[_Late] = []

    def announce(self, call: Call, step: int, status: int = RUNNING) -> list[int]:
        """Exchange headers alone, and wait for them; the statuses.

        Raises:
            RunOver: the ranks drifted apart, or another one has left or failed.
        """
        if self.streams.comm.size == 1:
            return [status]
        with self.together():
            return self.check(self.streams.announce(self.header(call, status)), step, status)

    def check(self, headers: torch.Tensor, step: int, status: int = RUNNING) -> list[int]:
        """Wait for headers; the ranks' statuses. Raises as `announce`."""
        sums, statuses = headers.T.tolist()
        if status != FAILED and set(statuses) != {FAILED}:
            self.raise_if_left(statuses, step)
        if len(set(sums)) > 1:
            raise drifted(step)
        return statuses

    def fail(self, error: Exception | None) -> None:
        """Keep an error of this rank's until the others are told of it; raise it where there are none."""
        self.own = error
        if error is not None and self._is_alone:
            raise error

    @property
    def _is_alone(self) -> bool:
        """Whether there is nobody to tell."""
        return self.streams.comm.size == 1 and self.streams.across is None

    @property
    def status(self) -> int:
        """This rank's."""
        return RUNNING if self.own is None else LEFT

    def header(self, call: Call, status: int = RUNNING) -> torch.Tensor:
        """int64 [2]: a checksum of the latents, and this rank's status. (16 bytes: what follows stays aligned.)"""
        if self._is_alone:
            return torch.zeros(2, dtype=torch.int64)  # on the host
        latents = checksum(call.latents)
        return torch.cat([latents, torch.full_like(latents, status or self.status)])

    def send(self, step: int, headers: torch.Tensor) -> None:
        """Start to bring to the host what all ranks said in an exchange."""
        if self._is_alone and not self.pending:
            return
        drifted, statuses = (headers[:, 0] != headers[0, 0]).any(), headers[:, 1]
        # On one rank, whose header never left the host, these alone are on its GPU.
        others = torch.stack(self.pending).any() if self.pending else torch.zeros_like(drifted)
        self.pending = []
        flags = torch.cat([flag.view(-1).to(others.device, torch.int64) for flag in (drifted, others, statuses)])
        self._late.append(_Late(step, *to_host(flags)))

    def read(self) -> None:
        """Wait for what was said up to the last FULL step.

        Raises:
            RunOver: the ranks drifted apart, another one has left, or a call was not as foretold.
        """
        late, self._late = self._late, []
        for step, values, arrival in late:
            has_drifted, differs, *statuses = from_host(values, arrival)
            self.raise_if_left(statuses, step)
            if has_drifted:
                raise drifted(step)
            if differs:
                raise RunOver(
                    f"hybrid-cond: before step {step} a later call of the denoiser had other values than the first "
                    "one told, so that the picture is wrong. Take hybrid-cond off, and report the pipeline."
                )

    @contextmanager
    def beside(self, device: torch.device | None) -> Iterator[None]:
        """On a GPU, work on a stream that does not wait for what the GPU has been given to do.

        Where later calls of a step have been compared, the results are on the current stream, and so is the work.
        """
        if device is None or device.type != "cuda" or self.pending:
            yield
        else:
            with torch.cuda.stream(_beside(device)):
                yield

    def raise_if_left(self, statuses: list[int], step: int) -> None:
        comm = self.streams.comm
        gone = [rank for rank, status in enumerate(statuses) if status != RUNNING]
        if gone:
            if self.own is not None:
                raise self.own
            # With split tokens these are the ranks of all places, in order of place.
            names = " and ".join(str(comm.global_rank(rank % comm.size)) for rank in gone)
            raise RunOver(
                f"hybrid-cond: rank {names} left the run before step {step} was over: it was interrupted, or an error "
                "was raised there. Look for it in its log. The run has ended on every rank."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised meanwhile is raised on every rank: nobody has to be told."""
        try:
            yield
        except Exception:
            self.is_over = True
            self.read()  # where a rank has left, what it sent meant nothing, and that is the error
            raise


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """A stream of a GPU for what is said beside its work."""
    return torch.cuda.Stream(device)


def drifted(step: int) -> RunOver:
    """The error where ranks differ at a step."""
    return RunOver(
        f"hybrid-cond: at step {step} the ranks' latents are no longer the same. They drifted apart since the last "
        "FULL step or the one before: give every rank the same generator seed, scheduler, dtype and callbacks. A "
        "scheduler that draws its noise from the global generator, whatever generator= is, needs torch.manual_seed "
        "with the same seed on every rank before each call."
    )
