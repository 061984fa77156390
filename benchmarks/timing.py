"""Times a pipeline's call and its denoising loop, and the CUDA graphs of a strategy on their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.distributed as dist

from hybridiff_xdit.evaluate.graphs import Graphs


class Sample(NamedTuple):
    """One call on this rank.

    Attributes:
        seconds: until the device is done, from a common start.
        loop: seconds of the denoising loop, on the device.
        after: seconds from the loop's end: the VAE's decoder, and the picture to the host.
        memory: most bytes that were reserved up to the loop's end.
    """

    seconds: float
    loop: float
    after: float
    memory: int


class Loop:
    """Begin and end of the denoising loop: diffusers' pipelines, and xDiT's, show a progress bar meanwhile.

    Args:
        device: on which it runs. CUDA's are timed by events, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.reset()
        original, watch = diffusers.DiffusionPipeline.progress_bar, self

        def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
            bar: Any = original(self, *args, **kwargs)
            close, marks = bar.close, watch.begin()

            def closed() -> None:
                watch.end(marks)
                close()

            bar.close = closed
            return bar

        diffusers.DiffusionPipeline.progress_bar = progress_bar  # type: ignore[method-assign]

    def reset(self) -> None:
        """Forget the last one; a call without a loop, as of a rank with no part in it, has one of no length."""
        self.profiler: Any = None
        self.memory = 0
        self._marks = [self._mark()]

    def begin(self) -> list[Any]:
        if self.profiler is not None:
            self.profiler.start()
        self._marks = [self._mark()]
        return self._marks

    def end(self, marks: list[Any]) -> None:
        """End the loop that `begin` gave these marks, once: a bar is closed again when it is deleted, at any time."""
        if len(marks) == 1:
            marks.append(self._mark())
            self.memory = torch.cuda.max_memory_reserved() if self._is_cuda else 0
            if self.profiler is not None:
                torch.cuda.synchronize()
                self.profiler.stop()

    def measure(self) -> tuple[float, float]:
        """(seconds of the loop, seconds since then), once the device is done."""
        now, begin, end = self._mark(), self._marks[0], self._marks[-1]
        if not self._is_cuda:
            return end - begin, now - end
        now.synchronize()
        return begin.elapsed_time(end) / 1e3, end.elapsed_time(now) / 1e3

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure(call: Callable[[], None], loop: Loop, device: torch.device, host: dist.ProcessGroup) -> Sample:
    """One call, which all ranks start at once.

    Args:
        call: this rank's part.
        host: a group of all ranks on the host.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    loop.reset()
    dist.barrier(group=host)
    start = time.perf_counter()
    call()
    in_loop, after = loop.measure()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    dist.barrier(group=host)
    return Sample(seconds, in_loop, after, loop.memory)


def idle_share(call: Callable[[], None], loop: Loop, device: torch.device) -> float | None:
    """Share of the denoising loop in which the GPU runs no kernel but NCCL's, which wait; None on a CPU.

    Under the profiler, which slows the host down a little: eager strategies are somewhat less idle without.
    """
    if device.type != "cuda":
        return None
    loop.reset()
    loop.profiler = profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    call()
    seconds, _ = loop.measure()
    if len(loop._marks) == 1:
        return None
    events = profiler.profiler.kineto_results.events()  # of PyTorch's own: its public list takes a minute to make
    kernels = sorted(
        (event.start_ns(), event.end_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA and "nccl" not in event.name().lower()
    )
    busy, until = 0, 0
    for begin, end in kernels:
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return max(0.0, 1 - busy / 1e9 / seconds)


def trace(call: Callable[[], None], file: Path) -> None:
    """Profile a call; steps are labelled with their kind. Open it in chrome://tracing or https://ui.perfetto.dev."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        call()
    profiler.export_chrome_trace(str(file))


def seconds_of_pieces(graphs: Graphs | None) -> dict[str, float]:
    """Seconds of each captured piece, replayed on its own: the median of 10, after one to warm up."""
    times = {}
    for name, replay in (graphs.captured() if graphs else {}).items():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
        for mark in marks:
            replay()
            mark.record()
        torch.cuda.synchronize()
        times[name] = statistics.median(a.elapsed_time(b) for a, b in pairwise(marks[1:])) / 1e3
    return times


def floor(pieces: list[dict[str, float]], plan: str) -> float | None:
    """Seconds of a plan's graphs; None where a kind of step was not captured on every rank with a part in it."""
    pieces = [times for times in pieces if times]
    forward = [max((t for name, t in times.items() if name.startswith("forward")), default=0.0) for times in pieces]
    share = [sum(t for name, t in times.items() if name.startswith("units")) for times in pieces]
    counts = (("F", forward), ("P", share))
    if any(plan.count(kind) and not all(times or [0]) for kind, times in counts):
        return None
    return sum(plan.count(kind) * max(times, default=0.0) for kind, times in counts)
