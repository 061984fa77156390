"""What a pipeline's guidance makes of a step's streams, read off what it hands to its scheduler.

A guided prediction is, but for what normalises or rescales it, a weighted sum of the streams

.. math:: g = \\sum_k a_k s_k, \\qquad \\kappa = \\sum_k a_k,

and a pipeline may hand the scheduler that, its negative, or a multiple of it with something of the sample added. So the
weights are found by least squares of the scheduler's input on the streams (and on the sample, where that explains it
much better). Classifier-free guidance, :math:`u + w (c - u)`, has :math:`a_c / \\kappa = w` and
:math:`a_u / \\kappa = 1 - w`. The stream with the largest :math:`a_k / \\kappa` is cond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

#: Numbers of a prediction that are read, at even distances: the weights are the same for all.
MOST_NUMBERS = 1 << 16

#: Share of the scheduler's input, squared, that the streams leave unexplained where the weights are exact.
EXACT = 1e-3
#: Square of what streams differ by, over the square of the first, up to which they count as equal.
EQUAL = 1e-12
#: The share above which what was found means nothing: the scheduler's input is made in another way.
UNEXPLAINED = 0.5

#: Steps before one whose guidance is not known yet, of which the largest is taken for it.
LATE = 5


class Weights(NamedTuple):
    """Weights of a step.

    Attributes:
        cond: number of the stream that is cond.
        kappa: what the scheduler's input has of a prediction: 1, or -1 where the pipeline negates it.
        deltas: of each other stream in order, the weight of its distance from cond, ``c - s_k``, in units of kappa: of
            uncond it is ``w - 1``.
    """

    cond: int
    kappa: float
    deltas: tuple[float, ...]

    def seen_from(self, cond: int) -> Weights:
        """The same weights where another stream is taken for cond."""
        shares = [-weight for weight in self.deltas]
        shares.insert(self.cond, 1 - sum(shares))
        return Weights(cond, self.kappa, tuple(-share for k, share in enumerate(shares) if k != cond))


def plain(count: int, cond: int | None = None) -> Weights:
    """Those that are taken where none can be read: all weigh the same; by default cond is the last stream."""
    return Weights(count - 1 if cond is None else cond, 1.0, (1.0,) * (count - 1))


def dots(output: torch.Tensor, sample: torch.Tensor, streams: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Products of the scheduler's input, the streams' differences and the sample, which `solve` reads.

    Args:
        output: what the pipeline hands the scheduler, any shape.
        sample: the scheduler's sample.
        streams: predictions, of the output's size, or larger along some dimension (a learned variance, tokens of a
            picture that is edited), of which the first part is taken.

    Returns:
        float64 [N + 2, N + 2] on the streams' device; None where the sizes do not fit.
    """
    cropped = [_crop(stream, output) for stream in streams]
    if any(stream is None for stream in cropped):
        return None
    flat = [_thinned(stream) for stream in cropped if stream is not None]
    other = _thinned(sample) if sample.numel() == output.numel() else torch.zeros_like(flat[0])
    rows = torch.stack([_thinned(output).to(flat[0]), flat[0], *(row - flat[0] for row in flat[1:]), other.to(flat[0])])
    return rows @ rows.T


def _crop(stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
    if stream.numel() == output.numel():
        # Frames of [B, C, F, H, W] may be the scheduler's batch, [B F, C, H, W].
        is_folded = stream.ndim == output.ndim + 1 and len(stream) != len(output)
        return stream.transpose(1, 2) if is_folded else stream
    if stream.ndim != output.ndim or any(a < b for a, b in zip(stream.shape, output.shape, strict=True)):
        return None
    return stream[tuple(map(slice, output.shape))]


def _thinned(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    return flat[:: -(-flat.numel() // MOST_NUMBERS)].double()


def solve(products: np.ndarray, most: float = UNEXPLAINED) -> Weights | None:
    """The weights, from `dots` on the host; None where they cannot be told (equal streams, or another formula).

    Args:
        products: of `dots`.
        most: share of the scheduler's input, squared, that they may leave unexplained.
    """
    count = len(products) - 2
    whole = products[0, 0]
    if not np.isfinite(products).all() or whole == 0:
        return None
    found, missed = _fit(products, range(1, count + 1))
    if missed > EXACT:
        with_sample, left = _fit(products, range(1, count + 2))
        if left < missed / 2:
            found, missed = with_sample, left
    if missed > most:
        return None
    first, *others = found[:count]
    shares = np.array([first - sum(others), *others])  # a_k
    kappa = shares.sum()
    differences = products[2 : count + 1, 2 : count + 1]
    if (count > 1 and np.linalg.eigvalsh(differences)[0] <= EQUAL * products[1, 1]) or kappa == 0:
        return None
    cond = int(np.argmax(shares / kappa))
    return Weights(cond, float(kappa), tuple(float(-share / kappa) for k, share in enumerate(shares) if k != cond))


def _fit(products: np.ndarray, rows: range) -> tuple[np.ndarray, float]:
    """(coefficients of these rows, share of the output that they leave unexplained)."""
    scale = np.sqrt(np.diag(products)[list(rows)])
    scale[scale == 0] = 1.0
    gram = products[np.ix_(rows, rows)] / np.outer(scale, scale)
    right = products[list(rows), 0] / scale
    try:
        found = np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:  # streams that are equal
        found = np.linalg.lstsq(gram, right, rcond=1e-10)[0]
    missed = products[0, 0] - 2 * found @ right + found @ gram @ found
    return found / scale, float(max(missed, 0.0) / products[0, 0])


class Guidance:
    """The weights of a run's steps, as they come to be known.

    Args:
        weights: those that hold until others are read. Their cond is that of the run: on a step where another stream
            weighs more, its weights are told from the run's cond.
    """

    def __init__(self, weights: Weights) -> None:
        self._first = weights
        self._read: dict[int, Weights] = {}
        self._most = (0.0,) * len(weights.deltas)  # as read, by distance

    def learn(self, step: int, weights: Weights | None) -> None:
        """Take the weights of a step; None where they could not be told. Steps come in order."""
        if weights is not None and len(weights.deltas) == len(self._most):
            self._read[step] = weights.seen_from(self.cond)
            self._most = tuple(map(max, self._most, map(abs, self._read[step].deltas)))

    def at(self, step: int) -> Weights:
        """The weights of a step: as read there, else on the last step before it."""
        if step in self._read:
            return self._read[step]
        return next((self._read[known] for known in sorted(self._read, reverse=True) if known < step), self._first)

    def ahead(self, step: int) -> Weights:
        """The weights to take for a step that is not over: the last ones, each distance's as large as of late (`LATE`).

        A payment that is made for more guidance than there is leaves something to pay; one for less pays too much, and
        by any factor where the guidance was all but off on the step before.
        """
        last = self.at(step)
        late = [self._read[known].deltas for known in range(step - LATE, step) if known in self._read] or [last.deltas]
        most = (max(map(abs, weights)) for weights in zip(*late, strict=True))
        return last._replace(deltas=tuple(map(math.copysign, most, last.deltas)))

    @property
    def cond(self) -> int:
        """Number of the stream that is cond."""
        return self._first.cond

    @property
    def largest(self) -> tuple[float, ...]:
        """The largest weight of each distance so far, at least 1."""
        return tuple(max(1.0, weight) for weight in self._most)

    @property
    def most(self) -> float:
        """The largest weight of a distance from cond so far, at least 1: ``w - 1`` in classifier-free guidance."""
        return max(self.largest, default=1.0)
