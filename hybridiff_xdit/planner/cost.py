"""Which layout of N GPUs is the fastest? A cost model that can be read, and what it predicts.

A *layout* multiplies `data` groups that share the pictures out, 2 branches, `sequence` = p = u r ranks that split a
branch's image tokens (MMDiT; u by Ulysses, r by ring attention), and R = `stages` / 2 ranks that split a branch's
layers. Seconds of a step, for a denoiser of f FLOPs a branch with A attentions of width D over n image and s text
tokens:

    FULL       work(1 / R) + [R > 1] link(boundary) + link(prediction); work(1) of the first, synchronous ones if R > 1
    PIPELINED  work(share) + link(boundary), if it is handed over, + link(prediction)
    SKIPPED    0
    any step   `step` besides: the scheduler, the guidance, copies
    one GPU    fixed + 2 f / rate + `step`: both branches as one batch

    work(x)    x (fixed + f_p / rate + exchange)     x: the part of a forward that a rank runs
    share      skew times the larger part of the FLOPs of two stages; skew / S of more
    f_p        linear (n / p + s) / (n + s) + 4 A D (n / p + s) (n + s),  linear = f - 4 A D (n + s)^2
    exchange   one all-gather of the prediction's shards:  latency + (p - 1) / p prediction / bandwidth
                                                           + prediction / packing
               u > 1: 4 A all-to-alls (query, key, value, output; xDiT sends the text's queries and outputs too) of
               b = A (4 n / p + 2 s) D bytes, packed and unpacked:
               4 A latency + (u - 1) / u b / bandwidth + b / packing
               r > 1: A (r - 1) times keys and values of the next rank, and r outputs of the queries at hand merged:
               (r - 1) A (latency + 2 n / p D / bandwidth) + r A (n / p + s / u) D / merging
    link(b)    latency + b / bandwidth, of the link that the axis crosses

Nothing is taken to overlap, and all that is sent along an axis that crosses nodes is taken to leave its node. A group
with k pictures takes k times as long as with one.

What the model leaves out: text encoders, the VAE, the two calls before a graph is replayed, ranks waiting for one
another, and that small shards fill a GPU less than `fixed` says. Memory is crude: the weights, which every rank holds,
and 80 times the largest boundary between units (it has been 77 to 84 with two ranks, graphs included).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer

from ..evaluate.calls import Call
from ..evaluate.graphs import can_capture, seconds_between
from ..trees import tensors_of
from .denoisers import branch_inputs, build

if TYPE_CHECKING:
    from ..evaluate.stages.anatomy import Anatomy, Inputs
    from ..evaluate.stages.cuts import Partition, Shape
    from ..seam.checkpoints import FamilyCheckpoint


class Link(NamedTuple):
    """What connects two GPUs; bandwidth in bytes a second one way, latency in seconds of one exchange."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, count: float, exchanges: int = 1) -> float:
        """Of ``count`` bytes, in so many exchanges one after the other."""
        return exchanges * self.latency + count / self.bandwidth


#: Two thirds of what NVLink 4 has one way is assumed; the latency was measured (see `SPEEDS`).
NVLINK = Link("NVLink", 300e9, 14e-6)
#: A 400 Gb/s port a GPU: 46 to 48 GB/s are usual (github.com/NVIDIA/nccl-tests/issues/290). The latency is assumed.
NETWORK = Link("network", 45e9, 40e-6)


@dataclass(frozen=True)
class Machine:
    """Nodes of GPUs, one link inside a node, another between nodes."""

    node: int = 8
    inside: Link = NVLINK
    between: Link = NETWORK


class Point(NamedTuple):
    """A forward of one branch that was timed."""

    flops: float
    seconds: float


@dataclass(frozen=True)
class Speed:
    """How fast a GPU runs one family of denoisers.

    Attributes:
        fixed: seconds of a forward that do not grow with its FLOPs (kernels too small to fill the GPU).
        rate: FLOPs a second of the rest.
        step: seconds of a step beside the forwards.
        skew: time of the slower of two stages, over what its FLOPs say.
        packing: bytes a second at which what Ulysses exchanges is brought into order, before and after.
        merging: bytes a second of outputs that ring attention merges.
    """

    fixed: float
    rate: float
    step: float = 0.0
    skew: float = 1.0
    packing: float = math.inf
    merging: float = math.inf

    @classmethod
    def through(cls, small: Point, large: Point, **rest: float) -> Speed:
        """The straight line through two timed forwards, or from 0 through the large one if that has no sense."""
        flops, seconds = large.flops - small.flops, large.seconds - small.seconds
        if flops <= 0 or not 0 < seconds / flops <= small.seconds / small.flops:
            return cls(0.0, large.flops / large.seconds, **rest)
        return cls(small.seconds - small.flops * seconds / flops, flops / seconds, **rest)

    def seconds(self, flops: float) -> float:
        """Of a forward."""
        return self.fixed + flops / self.rate


def _read_speeds() -> dict[str, dict[str, Speed]]:
    stored = json.loads((Path(__file__).parent / "speeds.json").read_text())

    def speed(forwards: list[list[float]], slower: float = 1.0, **rest: float) -> Speed:
        small, large = (Point(flops, slower * seconds) for flops, seconds in forwards)
        return Speed.through(small, large, **rest)

    gpus = {name: kinds for name, kinds in stored.items() if name not in ("what", "reports")}
    return {name: {kind: speed(**figures) for kind, figures in kinds.items()} for name, kinds in gpus.items()}


#: By GPU and `Cost.kind`. ``speeds.json`` says what each figure is, and which reports in benchmarks/results it is from.
SPEEDS = _read_speeds()


class Exchange(NamedTuple):
    """What a rank does in a forward besides computing, where its tokens are split; all but ``exchanges`` in bytes."""

    exchanges: int
    sent: float
    packed: float
    merged: float


@dataclass(frozen=True)
class Cost:
    """One branch of a denoiser at one size.

    Attributes:
        kind: whose figures of `SPEEDS` are its: `Anatomy.family`, and whether an MMDiT's queries and keys are normed.
        flops: of a forward.
        share: the larger of two stages' part of them.
        units: pieces that the forward is made of (`Anatomy.names`).
        prediction: bytes; so too the next four.
        to_output: boundary that the rank with the prediction is handed on a PIPELINED step.
        from_output: what it hands the other (a U-Net's features; an MMDiT: 0).
        largest: boundary between units.
        weights: of the denoiser.
        image, text: tokens, of an MMDiT; so too the next three.
        attentions: attentions that a split sequence exchanges for. (SD3.5-medium's second ones, which see image tokens
            only, are taken for full ones.)
        width: bytes of a token in one of an attention's tensors.
        heads: of an attention.
    """

    kind: str
    flops: float
    share: float
    units: int
    prediction: int
    to_output: int
    from_output: int
    largest: int
    weights: int
    image: int = 0
    text: int = 0
    attentions: int = 0
    width: int = 0
    heads: int = 1
    itemsize: int = 2

    @classmethod
    def of(cls, denoiser: nn.Module, inputs: Inputs, dtype: torch.dtype) -> Cost:
        """Counted as `Anatomy.partition` does, by a run on fake tensors.

        Args:
            denoiser: on any device, meta included.
            inputs: one branch's forward arguments, whose first is the latents, on the same device.
            dtype: that the denoiser will have.
        """
        from ..evaluate.stages.families import read  # here and below, because it imports diffusers

        anatomy, call = read(denoiser), Call(denoiser, denoiser, inputs)
        partition, shapes = anatomy.partition(call), anatomy.counted(call).shapes

        def count(unit: int) -> int:
            return sum(shape.numel() for shape, _ in shapes[unit])

        size = dtype.itemsize
        return cls(
            kind=_kind(anatomy),
            flops=sum(partition.flops),
            share=max(partition.flops) / sum(partition.flops),
            units=len(shapes),
            prediction=next(tensors_of(inputs)).numel() * size,
            to_output=count(partition.cut) * size,
            from_output=_features(partition, count) * size,
            largest=max(map(count, range(len(shapes)))) * size,
            weights=sum(parameter.numel() for parameter in denoiser.parameters()) * size,
            itemsize=size,
            **(_tokens(denoiser, shapes[0], size) if anatomy.family == "mmdit" else {}),
        )

    def shard(self, count: int, p: int) -> float:
        """Bytes of a boundary of ``count`` bytes whose image tokens are split over p ranks."""
        return count * (self.image / p + self.text) / (self.image + self.text) if p > 1 else count

    def flops_of(self, p: int) -> float:
        """Of a rank's part of a forward, its image tokens split over p ranks."""
        if p == 1:
            return self.flops
        tokens, mine = self.image + self.text, self.image / p + self.text
        squares = 4 * self.attentions * self.width / self.itemsize
        return (self.flops - squares * tokens**2) * mine / tokens + squares * mine * tokens

    def exchange(self, p: int, ring: int) -> Exchange:
        """What a forward exchanges with its image tokens split over p ranks, ``ring`` of them by ring attention."""
        tokens, u, a = self.image / p, p // ring, self.attentions
        all_to_all = a * (4 * tokens + 2 * self.text) * self.width if u > 1 else 0.0
        hops = a * (ring - 1)
        return Exchange(
            exchanges=(4 * a if u > 1 else 0) + hops + 1,
            sent=(u - 1) / u * all_to_all + (p - 1) / p * self.prediction + hops * 2 * tokens * self.width,
            packed=all_to_all + self.prediction,
            merged=a * ring * (tokens + self.text / u) * self.width if ring > 1 else 0.0,
        )


def _features(partition: Partition, count: Any) -> int:
    """Elements that the output's rank hands the other on the same step; none where the network begins there."""
    first, *_, last = partition.segments
    return count(first.stop - 1) if first.stage == last.stage else 0


def _tokens(denoiser: nn.Module, boundary: Sequence[Shape], size: int) -> dict[str, int]:
    from ..evaluate.tokens import sequence_parts

    (image, _), (text, _) = boundary  # [B, N, C], [B, S, C]
    attentions = sequence_parts(denoiser).attentions
    return {
        "image": image[1],
        "text": text[1],
        "attentions": len(attentions),
        "width": image[2] * size,
        "heads": attentions[0].heads,
    }


def speed_of(kind: str, device: str) -> tuple[Speed, str]:
    """The stored figures for a GPU by its name, and whose they are.

    Raises:
        ValueError: there are none of this GPU. Another one's would choose layouts that are not its fastest.
    """
    name = next((name for name in SPEEDS if name in device), None)
    if name is None:
        raise ValueError(
            f"the planner has no figures of an {device}. Choose a layout yourself (--nproc_per_node 2, "
            "--ulysses_degree, --data_parallel_degree), or see `xdit-hybrid plan` with --calibrate, which times this "
            f"GPU, or with --device {' or '.join(SPEEDS)}."
        )
    return SPEEDS[name][kind], name


def _kind(anatomy: Anatomy) -> str:
    config: Any = anatomy.denoiser.config
    return f"{anatomy.family}, qk_norm" if config.get("qk_norm") else anatomy.family


def cost_of(checkpoint: FamilyCheckpoint, height: int, width: int) -> Cost:
    """Of a checkpoint's denoiser, from its configuration; ``height`` and ``width`` of the picture in pixels.

    Raises:
        ValueError: the denoiser has no such size.
    """
    with torch.device("meta"):
        denoiser = build(checkpoint.denoiser)
    inputs = branch_inputs(checkpoint.denoiser, *_latents(checkpoint, height, width), device="meta")
    try:
        return Cost.of(denoiser, inputs, checkpoint.dtype)
    except (ValueError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{checkpoint.name} at {height} x {width} px: {reason}. Choose another size.") from error


def calibrate(checkpoint: FamilyCheckpoint, height: int, width: int, device: torch.device) -> Speed:
    """Time a branch's forward on this device at the size and at half the side; the rest is as stored.

    With random weights; on a GPU by CUDA graph in the checkpoint's dtype, on a CPU in float32.
    """
    from ..evaluate.stages.families import read

    is_cuda = can_capture(device)
    dtype = checkpoint.dtype if is_cuda else torch.float32
    with device:
        denoiser = build(checkpoint.denoiser).to(dtype)
    anatomy = read(denoiser)

    def forward(inputs: Inputs, mark: Any = lambda: None) -> torch.Tensor:
        mark()
        pred = denoiser(**inputs)[0]
        mark()
        return pred

    def seconds(inputs: Inputs) -> float:
        measured = seconds_between(partial(forward, inputs)) if is_cuda else None
        if measured is not None:
            return measured[0]
        names = {"forward": forward, "inputs": inputs}
        return Timer("forward(inputs)", globals=names).blocked_autorange(min_run_time=1.0).median

    whole = _latents(checkpoint, height, width)
    half = [max(8, side // 16 * 8) for side in whole]  # a multiple of what the denoisers' levels need
    points = []
    with torch.no_grad():
        for size in (half, whole):
            inputs = branch_inputs(checkpoint.denoiser, *size, dtype=dtype, device=device)
            points.append(Point(sum(anatomy.partition(Call(denoiser, denoiser, inputs)).flops), seconds(inputs)))
    line = Speed.through(*points)
    return replace(SPEEDS["H100"][_kind(anatomy)], fixed=line.fixed, rate=line.rate)


def _latents(checkpoint: FamilyCheckpoint, height: int, width: int) -> tuple[int, int]:
    scale = checkpoint.size // checkpoint.denoiser["sample_size"]
    return height // scale, width // scale
