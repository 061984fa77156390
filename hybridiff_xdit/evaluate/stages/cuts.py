"""Stages as data, found from the structure of the denoiser and balanced by cost: counted FLOPs or measured time.

A denoiser is read as a list of *units* (a transformer block, a resnet, an attention ...) that are evaluated in order. A
*stage* is what one rank evaluates of the network; it has one *segment* (a run of units) or, in a U-Net, two. Two
shapes, here with three stages:

    blocks  stage 0  [front]                     U-Net   stage 0                [inner]
                         \\ 1                                               0 /         \\ 1
            stage 1       [middle]                       stage 1         [down]            [up]
                                 \\ 1                                 0 /                      \\ 1
            stage 2               [back] -> pred         stage 2  [down]                        [up] -> pred

The number on an edge is the **age in steps of the boundary** that crosses there, on a PIPELINED step:

* Blocks: each stage of step i reads the boundary (such as image and text tokens) that the stage before made on step
  i-1: age 1.
* U-Net: the stages are nested. A down part of step i reads the features that the next outer stage made on step i: age
  0. An up part of step i reads what the next inner stage made on step i-1: age 1. A stage's skips are its own, of step
  i. Sending the features costs nothing on the critical path: it skews the stages (each begins a step when the next
  outer one has made its down part), and by as much later is its result needed. It makes the boundary a step fresher
  than waiting for them a step would, and spares the inner stages a second evaluation of the outer down parts (two
  stages, counted for SDXL at 1024 px: 10% of a forward's FLOPs, against 1.3 MB in fp16).
* On the first PIPELINED step after a FULL one, the age-1 boundaries are those that the cond branch made there.
* SKIPPED steps make no boundary: it is as many steps older as they are. Where the guidance rule extrapolates, a stage
  reads the straight line through its last two boundaries, at its own time.

With more than two stages, a branch has several ranks, and on a FULL step each of them evaluates two neighbouring stages
(2r and 2r + 1) of its branch: between those two nothing is old, and between ranks the ages are as above, counted in
FULL steps.

The nesting of a U-Net is cut where an inner region reads inner skips only, so that one tensor crosses each way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """Units ``start`` up to ``stop`` of ``stage``, reading a boundary that is ``age`` steps old (0 for the first)."""

    start: int
    stop: int
    stage: int
    age: int


class Region(NamedTuple):
    """Units ``start`` up to ``stop``, which need of the units before them their boundary only."""

    start: int
    stop: int


Shape = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Partition:
    """The segments of a PIPELINED step in forward order, and the FLOPs of each stage's share (or what stood for them).

    The last segment is of the last stage, and ends in the prediction.
    """

    segments: tuple[Segment, ...]
    flops: tuple[int, ...]

    @property
    def cut(self) -> int:
        """Index of the unit whose boundary the last segment reads, one step old."""
        return self.segments[-1].start - 1


#: Relative difference in measured time below which two partitions count as equally fast.
ALIKE = 0.02
#: Largest share of the whole that a stage may have. A larger one is split in name only.
MOST = 0.9


def best_nest(
    denoiser: str,
    regions: Sequence[Region],
    stages: int,
    flops: Sequence[int],
    seconds: Sequence[float] | None,
    shapes: Sequence[tuple[Shape, ...]],
    again: Sequence[frozenset[int]],
) -> tuple[Region, ...]:
    """The regions of the first stage, the first two, ... all of them.

    Args:
        denoiser: its class's name, for the error.
        regions: what the stages below a cut may be.
        stages: how many.
        flops: of each unit.
        seconds: of each unit, if they are measured.
        shapes: of the boundary after each unit.
        again: units before each one that a stage which begins there evaluates too.

    Raises:
        ValueError: there are too few units for so many stages.
    """
    costs: list[Sequence[float]] = [flops] if seconds is None else [seconds, flops]
    before = [[0, *itertools.accumulate(cost)] for cost in costs]
    repeated = [[sum(cost[unit] for unit in units) for units in again] for cost in costs]
    limits = [math.inf] * len(costs)  # of a stage, for each kind of cost
    whole = Region(0, len(shapes))

    def size(region: Region) -> int:
        return sum(shape.numel() for end in region if end for shape, _ in shapes[end - 1])

    def best(aim: Callable[[_Nest], float]) -> _Nest:
        """The nest of the least ``aim`` whose stages cost no more than the limits each."""

        @cache
        def within(outer: Region, stages: int) -> _Nest | None:
            whole_costs = [sums[outer.stop] - sums[outer.start] for sums in before]
            if stages == 1:
                return _Nest(tuple(whole_costs), 0, (outer,)) if _fits(whole_costs, limits) else None
            found = []
            for region in regions:
                if not _is_inside(region, outer):
                    continue
                shares = [
                    cost - sums[region.stop] + sums[region.start] + more[region.stop]
                    for cost, sums, more in zip(whole_costs, before, repeated, strict=True)
                ]
                if _fits(shares, limits) and (nest := within(region, stages - 1)):
                    largest = tuple(map(max, nest.largest, shares))
                    found.append(_Nest(largest, nest.size + size(region), (*nest.regions, outer)))
            return min(found, key=aim, default=None)

        nest = within(whole, stages)
        if nest is None or nest.largest[0] > MOST * before[0][-1]:
            raise ValueError(
                f"stages={stages} (--hybrid_stages): this {denoiser} is too shallow to be cut into {stages} stages, or "
                "its layers read one another's outputs: lower it, or use --hybrid_kinds FS."
            )
        return nest

    for i, cost in enumerate(costs):
        largest = best(lambda nest, i=i: nest.largest[i]).largest[i]  # type: ignore[misc]
        limits[i] = largest * (1 + ALIKE) if cost is seconds else largest
    return best(lambda nest: nest.size).regions


def segments_of(nest: Sequence[Region]) -> tuple[Segment, ...]:
    """What each region of a nest has beyond the one inside it, in forward order."""
    inner = nest[0]
    segments = [Segment(*inner, stage=0, age=0)]
    for stage, outer in enumerate(nest[1:], start=1):
        if outer.start < inner.start:
            segments.insert(0, Segment(outer.start, inner.start, stage, age=0))
        segments.append(Segment(inner.stop, outer.stop, stage, age=1))
        inner = outer
    return tuple(segments)


class _Nest(NamedTuple):
    """Regions one inside the other: the largest cost of a stage (of each kind), the boundaries' size, the regions."""

    largest: tuple[float, ...]
    size: int
    regions: tuple[Region, ...]


def _fits(costs: Sequence[float], limits: Sequence[float]) -> bool:
    return all(cost <= limit for cost, limit in zip(costs, limits, strict=True))


def _is_inside(inner: Region, outer: Region) -> bool:
    """Whether ``outer`` has units after ``inner``, and before it, but where both are a beginning of the network."""
    return inner.stop < outer.stop and (outer.start < inner.start or inner.start == 0)
