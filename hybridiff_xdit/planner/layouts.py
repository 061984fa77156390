"""The layouts of N GPUs, and what the cost model predicts of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from typing import NamedTuple

from ..config import HybridConfig
from ..schedule.plan import FULL, PIPELINED, SKIPPED, Plan, StepKind, synchronous_steps
from .cost import Cost, Link, Machine, Speed

#: Stages that `best` may choose. With more, FULL steps read old boundaries too: that is for the user to want.
CHOSEN_STAGES = (2,)

#: What of a layout is split, from the ranks that are neighbours to those farthest apart, as xDiT numbers them.
AXES = ("sequence", "stages", "branch", "data")

#: Speed-up bound that stands for the adaptive policy where none is given: what its default tolerance comes to.
TYPICAL_SPEEDUP = 2.5

_LARGEST_BOUNDARIES = 80  # of memory: see `cost`


def expected_plan(config: HybridConfig, num_steps: int) -> Plan:
    """A plan with the steps of each kind that a configuration may be expected to take, spread evenly.

    Of the adaptive policy that is what its bound comes to, by SKIPPED steps (PIPELINED, where it may not skip);
    without a bound, `TYPICAL_SPEEDUP`.
    """
    if config.plan is not None:
        return Plan.parse(config.plan, num_steps)
    if config.policy == "paper":
        interval = config.interval or max(1, round(num_steps / 10))
        return Plan([FULL] * (num_steps - interval - 1) + [PIPELINED] * interval + [FULL])
    if config.policy == "cfg":
        return Plan([FULL] * num_steps)
    saved = num_steps - 2 * num_steps / (config.speedup or TYPICAL_SPEEDUP)  # see Plan.speedup_bound
    kind, count = (PIPELINED, 2 * saved) if config.kinds == "FP" else (SKIPPED, saved)
    return _spread(kind, min(round(count), num_steps - 1), num_steps)


def _spread(kind: StepKind, count: int, num_steps: int) -> Plan:
    marks = [i * count // num_steps for i in range(num_steps + 1)]
    return Plan(kind if after > before else FULL for before, after in pairwise(marks))


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism.

    Attributes:
        data, sequence, stages: see `cost`.
        order: the axes from neighbouring ranks to the farthest (`AXES`: xDiT's).
        ring: over how many of the sequence's ranks ring attention splits it; Ulysses, over sequence / ring.
    """

    data: int = 1
    sequence: int = 1
    stages: int = 2
    order: tuple[str, ...] = AXES
    ring: int = 1

    def degree(self, axis: str) -> int:
        """Ranks along an axis."""
        return {"sequence": self.sequence, "stages": self.stages // 2, "branch": 2, "data": self.data}[axis]

    @property
    def gpus(self) -> int:
        return math.prod(map(self.degree, AXES))

    @property
    def is_available(self) -> bool:
        """Whether xDiT numbers its ranks so."""
        return self.order == AXES

    def link(self, axis: str, machine: Machine) -> Link:
        """What the ranks along an axis are connected by: the network, if not all such groups lie within a node."""
        extent = math.prod(map(self.degree, self.order[: self.order.index(axis) + 1]))
        is_inside = self.gpus <= machine.node or machine.node % extent == 0
        return machine.inside if is_inside else machine.between

    def crossing(self, machine: Machine) -> tuple[str, ...]:
        """The axes of a picture that cross the network."""
        split = [axis for axis in self.order if axis != "data" and self.degree(axis) > 1]
        return tuple(axis for axis in split if self.link(axis, machine) is machine.between)

    def flags(self) -> list[str]:
        """What to type beside ``--parallel hybrid-cond``."""
        degrees = {
            "data_parallel_degree": self.data,
            "ulysses_degree": self.sequence // self.ring,
            "ring_degree": self.ring,
        }
        if self.stages != 2:
            degrees["hybrid_stages"] = self.stages
        return [text for name, value in degrees.items() if value > 1 for text in (f"--{name}", str(value))]


class Prediction(NamedTuple):
    """What the model says of a layout.

    Attributes:
        seconds: a picture, of the denoising loop.
        speedup: over one GPU with CUDA graphs.
        sent: bytes a picture that the rank that sends most along an axis sends there, by axis.
        memory: bytes of each GPU, crude.
    """

    layout: Layout
    seconds: float
    speedup: float
    sent: dict[str, float]
    memory: float


def one_gpu(cost: Cost, speed: Speed, num_steps: int) -> float:
    """Seconds of a picture on one GPU with CUDA graphs, both branches in one batch."""
    return num_steps * (speed.seconds(2 * cost.flops) + speed.step)


def predict(cost: Cost, speed: Speed, machine: Machine, plan: Plan, layout: Layout, images: int = 1) -> Prediction:
    """Predict ``images`` pictures in one call, by the equations of `cost`."""
    p, ranks = layout.sequence, layout.stages // 2
    link = {axis: layout.link(axis, machine) for axis in AXES}
    full, pipelined = plan.count(FULL), plan.count(PIPELINED)
    handed = sum(row.work[0] == "stage0" for row in plan.rows())
    share = speed.skew * (cost.share if layout.stages == 2 else 1 / layout.stages)
    boundary, features = cost.shard(cost.to_output, p), cost.shard(cost.from_output, p)
    between_stages = max((link["branch"], *([link["stages"]] if ranks > 1 else [])), key=lambda link: link.seconds(1))

    work, crossing = speed.seconds(cost.flops_of(p)), 0.0
    if p > 1:
        exchange = cost.exchange(p, layout.ring)
        crossing = exchange.sent
        work += link["sequence"].seconds(crossing, exchanges=exchange.exchanges)
        work += exchange.packed / speed.packing + exchange.merged / speed.merging

    one_full = work / ranks + link["branch"].seconds(cost.prediction)
    if ranks > 1:
        one_full += link["stages"].seconds(boundary)
    one_pipelined = work * share + link["branch"].seconds(cost.prediction)
    waiting = synchronous_steps(layout.stages, full)  # each stage for the one before it
    run = (
        full * one_full
        + waiting * work * (1 - 1 / ranks)
        + pipelined * one_pipelined
        + handed * between_stages.seconds(boundary)
    )
    run += len(plan) * speed.step

    sent = {}
    if p > 1:
        sent["sequence"] = (full / ranks + pipelined * share) * crossing
    if ranks > 1:
        sent["stages"] = (full + handed) * boundary
    predictions = full * cost.prediction
    # Stage 0's rank hands its boundary over; the other rank the prediction of a PIPELINED step.
    sent["branch"] = max(predictions + handed * boundary, predictions + pipelined * cost.prediction + handed * features)

    seconds = math.ceil(images / layout.data) * run / images
    memory = cost.weights + _LARGEST_BOUNDARIES * cost.shard(cost.largest, p)
    speedup = one_gpu(cost, speed, len(plan)) / seconds
    return Prediction(layout, seconds, speedup, sent, memory)


def every_layout(cost: Cost, gpus: int, images: int, machine: Machine) -> Iterator[Layout]:
    """Every layout of up to so many GPUs; those past a node once for each choice of what crosses the network."""
    for data in range(1, min(gpus // 2, images) + 1):
        if data > 1 and math.ceil(images / data) == math.ceil(images / (data - 1)):
            continue  # no group has fewer pictures for it
        for p in range(1, gpus // (2 * data) + 1):
            if p > 1 and (not cost.image or cost.image % p):
                continue
            rings = [ring for ring in range(1, p + 1) if p % ring == 0 and cost.heads % (p // ring) == 0]
            for ranks, ring in product((2**i for i in range(gpus.bit_length())), rings):
                layout = Layout(data, p, 2 * ranks, ring=ring)
                if layout.gpus <= gpus and layout.stages <= cost.units:
                    yield from _orders(layout, machine)


def _orders(layout: Layout, machine: Machine) -> Iterator[Layout]:
    seen = set()
    for order in permutations(AXES[:-1]):  # the first is xDiT's
        placed = replace(layout, order=(*order, "data"))
        crossing = frozenset(placed.crossing(machine))
        if crossing not in seen:
            seen.add(crossing)
            yield placed


def rank_layouts(
    cost: Cost, speed: Speed, machine: Machine, plan: Plan, gpus: int, images: int = 1
) -> list[Prediction]:
    """Predictions of all layouts of up to ``gpus`` GPUs, best first; of equals, the one with fewer GPUs."""
    predictions = [
        predict(cost, speed, machine, plan, layout, images) for layout in every_layout(cost, gpus, images, machine)
    ]
    return sorted(predictions, key=lambda prediction: (prediction.seconds, prediction.layout.gpus))


def best(predictions: Sequence[Prediction], may_ring: bool = True) -> Prediction:
    """The best that is exact where its plan is FULL; there is one, since the pair of branches is.

    Args:
        predictions: of `rank_layouts`.
        may_ring: whether ring attention may be chosen.
    """
    exact = (prediction for prediction in predictions if prediction.layout.stages in CHOSEN_STAGES)
    return next(
        prediction
        for prediction in exact
        if prediction.layout.is_available and (may_ring or prediction.layout.ring == 1)
    )


def table(predictions: Sequence[Prediction], machine: Machine) -> str:
    """One row a layout, as text."""
    head = (
        "GPUs",
        "data x sequence x branch x layers",
        "s/picture",
        "speed-up",
        "GiB",
        "MB sent by a rank",
        "flags beside --parallel hybrid-cond",
    )
    return aligned([head, *(_cells(prediction, machine) for prediction in predictions)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cells(prediction: Prediction, machine: Machine) -> tuple[str, ...]:
    layout = prediction.layout
    sent = [
        f"{axis} {count / 1e6:.0f}{' over the network' if axis in layout.crossing(machine) else ''}"
        for axis, count in prediction.sent.items()
    ]
    flags = " ".join(layout.flags()) or "(none)"
    if not layout.is_available:
        flags = "not in xDiT's order of ranks"
    elif layout.stages not in CHOSEN_STAGES:
        flags += " (less close, see --hybrid_stages)"
    return (
        str(layout.gpus),
        f"{layout.data} x {layout.sequence} x 2 x {layout.stages // 2}",
        f"{prediction.seconds:.2f}",
        f"{prediction.speedup:.2f}",
        f"{prediction.memory / 2**30:.1f}",
        ", ".join(sent),
        flags,
    )
