"""The rule `deferred` for any number of streams, in a plain pipeline's own loop. It shares no code with the package.

`inside` replaces the forward of a pipeline's denoisers and the step of its scheduler for the length of a call. FULL
steps are evaluated as the pipeline asks for them, SKIPPED ones are answered with estimates, and the next FULL step pays
for what these missed. The formulas are in `hybridiff_xdit/estimates/deferred.py`.

A prediction is kept as parts: that of cond, and the distance of each other stream from it. Each part is estimated and
paid for on its own.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import numpy as np
import torch

DENOISERS = ("transformer", "transformer_2", "unet", "unconditional_transformer")
Tensor = torch.Tensor


class Part:
    """What is known of one part of the predictions, by FULL step; ``times`` and ``gains`` are of all steps."""

    def __init__(self, times: list[float], gains: list[float]) -> None:
        self.times, self.gains = times, gains
        self.fulls: list[tuple[int, Tensor]] = []
        self.guesses: list[tuple[int, Tensor]] = []  # since the last FULL step
        self.slopes: list[Tensor] = []  # fitted on the FULL steps, in order
        self.bends: list[Tensor] = []  # likewise
        self.owed: list[Tensor] = []

    def guess(self, step: int) -> Tensor:
        last, found = self.fulls[-1]
        if self.slopes:
            before, earlier = self.fulls[-2]
            found = found + mean(self.slopes) * self.reach(before, last, step) * (found - earlier)
        self.guesses.append((step, found))
        return found

    def full(self, step: int, value: Tensor, impulses: Callable[[int], float], may_pay: bool) -> Tensor:
        """What to hand the pipeline on a FULL step; ``impulses`` tells a step's weight of this part."""
        self.fulls.append((step, value))
        self.fit()
        for at, guess in self.guesses:
            line, bend = self.line_and_bend(at, *self.fulls[-3:])
            missed = line + mean(self.bends) * bend - guess
            self.owed.append(self.gains[at] * impulses(at) * missed)
        self.guesses = []
        if not self.owed or not may_pay:
            return value
        debt, self.owed = sum(self.owed), []
        self.paid = debt
        return value + debt / (self.gains[step] * impulses(step))

    def fit(self) -> None:
        if len(self.fulls) < 3:
            return
        *_, (first, a), (middle, b), (step, c) = self.fulls
        reach = self.reach(first, middle, step)
        if not reach:
            return
        self.slopes.append(least_squares(c - b, reach * (b - a)))
        if len({self.times[at] for at, _ in self.fulls[-4:]}) == 4:  # how far the middle one lies on a parabola
            line, bend = self.line_and_bend(middle, *self.fulls[-4:-2], self.fulls[-1])
            self.bends.append(least_squares(b - line, bend))

    def line_and_bend(self, step: int, *known: tuple[int, Tensor]) -> tuple[Tensor, Any]:
        """At a step between the last two known; the bend is what the parabola through a third adds."""
        (start, first), (end, second) = known[-2:]
        t, t0, t1 = (self.times[at] for at in (step, start, end))
        if t0 == t1:
            return second, 0.0
        slope = (second - first) / (t1 - t0)
        line = first + (t - t0) * slope
        if len(known) < 3 or self.times[known[0][0]] in (t0, t1):
            return line, 0.0
        before = self.times[known[0][0]]
        curvature = (slope - (first - known[0][1]) / (t0 - before)) / (t1 - before)
        return line, (t - t0) * (t - t1) * curvature

    def reach(self, before: int, last: int, now: int) -> float:
        t0, t1, t = (self.times[step] for step in (before, last, now))
        return 0.0 if t0 == t1 else (t - t1) / (t1 - t0)


def least_squares(target: Tensor, regressor: Tensor) -> Tensor:
    """A coefficient per picture. None counts for more than 2 or less than -1."""
    dims = tuple(range(1, target.ndim))
    energy = (regressor * regressor).sum(dims, keepdim=True).clamp(min=1e-38)
    return ((target * regressor).sum(dims, keepdim=True) / energy).clip(-1, 2)


def mean(found: list[Tensor]) -> Any:
    """Over the FULL steps, each older one with 0.8 of the weight."""
    if not found:
        return 0.0
    weights = [0.8**age for age in reversed(range(len(found)))]
    return (sum(w * one for w, one in zip(weights, found, strict=True)) / sum(weights)).clip(0, 1)


class Loop:
    """What a pipeline's calls are answered with.

    Args:
        plan: a letter F or S a step. S counts only where there is something to estimate from.
        shares: weights of the streams in the scheduler's input, by their number; None: by least squares, step by step.
        pictures: in a call; a batch of k times as many asks for k streams.
        tokens: of a picture, where streams have others in front of them.
    """

    def __init__(
        self, plan: str, shares: dict[int, tuple[float, ...]] | None, pictures: int, tokens: int | None
    ) -> None:
        self.plan, self.shares, self.pictures, self.tokens = plan, shares, pictures, tokens
        self.kinds = ""  # of the steps that are over
        self.evaluated = 0  # streams
        self.changes = 0  # of the calls of a step
        self.times: list[float] | None = None
        self.asked: list[Any] = []  # (denoiser, streams) of each call of this step
        self.pattern: list[Any] = []  # of the step before
        self.seen: list[Any] = []  # what each call returned when it was last evaluated
        self.begin()

    def begin(self) -> None:
        """Forget all estimates."""
        self.parts: list[list[Part]] | None = None  # by tensor of a prediction, and part
        self.weights: dict[int, np.ndarray] = {}  # of the streams in the scheduler's input, by step
        self.payment: tuple[int, list[float]] | None = None  # step and impulses that were taken for its own
        self.due: list[int] = []  # steps that are not paid for yet

    @property
    def step(self) -> int:
        return len(self.kinds)

    # The denoiser's calls.

    def forward(self, denoiser: Any, original: Callable, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        latents = given.get("vision_tokens", next(iter(given.values())))
        key = (id(denoiser), len(latents) // self.pictures)
        index, count = len(self.asked), key[1]
        if not self.asked:
            self.start_step(key)
        self.asked.append(key)
        self.is_known = self.is_known and self.pattern[: index + 1] == self.asked
        if self.is_known and self.is_skipped:
            first = sum(streams for _, streams in self.pattern[:index])
            columns = [column[first : first + count] for column in self.guesses]
            output = self.seen[index]
        else:
            output = original(*args, **kwargs)
            self.seen[index:] = [output]
            self.evaluated += count
            columns = [list(self.of_picture(tensor).chunk(count)) for tensor in tensors(output)]
            self.true = append(self.true, columns)
            if self.is_known:
                columns = [self.pay(tensor, count) for tensor in range(len(columns))]
        self.handed = append(self.handed, columns)
        if self.tokens:
            ((whole,), ((picture,),)) = tensors(output), columns
            columns = [[torch.cat([whole[:, : -self.tokens], picture], dim=1)]]
        return like(output, columns)

    def of_picture(self, tensor: Tensor) -> Tensor:
        return tensor[:, -self.tokens :] if self.tokens else tensor

    def start_step(self, key: Any) -> None:
        self.true, self.handed, self.paid_cond = [], [], {}
        self.is_known = self.parts is not None and self.pattern[0] == key
        self.is_skipped = self.is_known and self.plan[self.step] == "S"
        if self.is_skipped:
            guessed = ([part.guess(self.step) for part in parts] for parts in self.parts)
            self.guesses = [self.streams(parts) for parts in guessed]
            self.due.append(self.step)
        elif self.is_known:
            self.settle()
            gain = abs(self.gains[self.step])
            self.may_pay = bool(self.due) and all(gain >= 0.5 * abs(self.gains[step]) for step in self.due)
            if self.may_pay:
                self.payment, self.due = (self.step, self.impulses(self.step)), []

    def pay(self, tensor: int, count: int) -> list[Tensor]:
        """The last ``count`` streams of a FULL step with what is owed; cond is among the first call's."""
        true, parts, first = self.true[tensor], self.parts[tensor], len(self.true[tensor]) - count
        cond = true[self.cond]
        if first <= self.cond:
            self.paid_cond[tensor] = parts[0].full(self.step, cond, self.impulse(tensor, 0), self.may_pay)
        handed = []
        for k in range(first, len(true)):
            if k == self.cond:
                handed.append(self.paid_cond[tensor])
                continue
            place = k + (k < self.cond)
            distance = parts[place].full(self.step, cond - true[k], self.impulse(tensor, place), self.may_pay)
            handed.append(self.paid_cond[tensor] - distance)
        return handed

    def split(self, streams: list[Tensor]) -> list[Tensor]:
        """The parts of a tensor's streams."""
        cond = streams[self.cond]
        return [cond, *(cond - stream for k, stream in enumerate(streams) if k != self.cond)]

    def streams(self, parts: list[Tensor]) -> list[Tensor]:
        cond, *distances = parts
        found = [cond - distance for distance in distances]
        found.insert(self.cond, cond)
        return found

    # How the pipeline weighs the streams. A tensor that the scheduler does not get is taken to be weighed evenly.

    def impulses(self, step: int) -> list[float]:
        """Of cond and of the distances; on a step that is not over each distance's is as large as of late."""
        steps = [known for known in self.weights if known <= step]
        cond, *last = self.parted(self.weights[max(steps)])
        if step in self.weights:
            return [cond, *last]
        earlier = [self.parted(self.weights[known]) for known in steps if known >= step - 5]
        most = [max(abs(distances[k] / total) for total, *distances in earlier) for k in range(len(last))]
        return [cond, *(np.copysign(size, old / cond) * cond for size, old in zip(most, last, strict=True))]

    def parted(self, weights: np.ndarray) -> list[float]:
        return [weights.sum(), *(-weight for k, weight in enumerate(weights) if k != self.cond)]

    def impulse(self, tensor: int, place: int) -> Callable[[int], float]:
        return lambda step: 1.0 if tensor else self.impulses(step)[place]

    def settle(self) -> None:
        """A payment was made with the largest weights of late. What it was short of is owed."""
        if self.payment is None:
            return
        step, taken = self.payment
        self.payment = None
        ratios = [actual / assumed for actual, assumed in zip(self.impulses(step), taken, strict=True)]
        if max(abs(ratio - 1) for ratio in ratios) > 1e-3:
            self.due.append(step)
            for ratio, part in zip(ratios, self.parts[0], strict=True):
                part.owed.append((1 - ratio) * part.paid)

    def read_weights(self, output: Tensor, sample: Tensor) -> np.ndarray:
        if self.shares is not None:
            count = len(self.handed[0])
            return np.array(self.shares[count] if count > 1 else [1.0])
        # A prediction may have more channels or tokens than the scheduler gets.
        crop = tuple(map(slice, output.shape))
        columns = [stream if stream.ndim != output.ndim else stream[crop] for stream in self.handed[0]]
        streams = np.stack([stream.double().numpy().ravel() for stream in columns], axis=1)
        target, sample = (tensor.double().numpy().reshape(-1, 1) for tensor in (output, sample))
        found, missed = fit(streams, target)
        if missed > 1e-3:
            with_sample, left = fit(np.hstack([streams, sample]), target)
            if left < missed / 2:
                found, missed = with_sample, left
        assert missed < 0.5
        return found[: streams.shape[1]]

    # The scheduler's step.

    def end_step(self, scheduler: Any, output: Tensor, timestep: Any, sample: Tensor, extra: dict[str, float]) -> None:
        if not self.asked or self.step == len(self.plan):
            return
        if self.times is None:
            times = scheduler.timesteps.tolist()
            start = min(range(len(times)), key=lambda i: abs(times[i] - float(timestep)))
            self.times = times[start : start + len(self.plan)]
            self.gains = gains(scheduler, self.times, **extra)
        is_new = self.asked != self.pattern
        if is_new and self.step:
            self.changes += 1
        if is_new:
            self.begin()
        if not (is_new and self.is_skipped):
            self.weights[self.step] = self.read_weights(output, sample)
        if self.parts is None and "S" in self.plan and not self.is_skipped:
            weights = self.weights[self.step]
            self.cond = int(np.argmax(weights / weights.sum()))
            self.parts = [[Part(self.times, self.gains) for _ in column] for column in self.true]
            for parts, column in zip(self.parts, self.true, strict=True):
                for part, value in zip(parts, self.split(column), strict=True):
                    part.fulls.append((self.step, value))
        self.pattern = self.asked
        self.kinds += "S" if self.is_skipped else "F"
        self.asked = []


def append(had: list[list[Tensor]], columns: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[*before, *more] for before, more in zip(had or [[] for _ in columns], columns, strict=True)]


def fit(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    found = np.linalg.lstsq(columns, target, rcond=None)[0]
    return found.ravel(), float(((target - columns @ found) ** 2).sum() / (target**2).sum())


def gains(scheduler: Any, times: list[float], **extra: float) -> list[float]:
    """How far the end of a run moves with each of its predictions."""
    accepted = inspect.signature(scheduler.step).parameters
    times = [torch.tensor(time, dtype=scheduler.timesteps.dtype) for time in times]

    def end(bumped: int | None) -> float:
        fresh, x, older = copy.deepcopy(scheduler), torch.zeros(1, 1, 1, 1, dtype=torch.float64), None
        torch.manual_seed(2)
        for i, time in enumerate(times):
            given: dict[str, Any] = dict(extra)
            if "old_pred_original_sample" in accepted:
                given |= dict(old_pred_original_sample=older, timestep_back=times[i - 1] if i else None)
            if i and hasattr(fresh, "scale_model_input"):
                fresh.scale_model_input(x, time)
            prediction = torch.full_like(x, float(i == bumped))
            stepped = fresh.step(model_output=prediction, timestep=time, sample=x, return_dict=False, **given)
            x, older = stepped[0], stepped[-1]
        return x.item()

    with torch.random.fork_rng():
        still = end(None)
        return [end(bumped) - still for bumped in range(len(times))]


def tensors(output: Any) -> list[Tensor]:
    """The predictions in what a denoiser returned, [streams * pictures, ...]."""
    values = output.values() if isinstance(output, dict) else output
    return [torch.stack(value) if isinstance(value, list) else value for value in values if value is not None]


def like(output: Any, columns: list[list[Tensor]]) -> Any:
    """The same with other predictions, given by tensor and stream."""
    found, joined = map(torch.cat, columns), []
    for value in output.values() if isinstance(output, dict) else output:
        joined.append(None if value is None else list(next(found)) if isinstance(value, list) else next(found))
    return type(output)(*joined) if isinstance(output, dict) else tuple(joined)


@contextmanager
def forwards(pipe: Any, function: Callable) -> Iterator[None]:
    """Meanwhile a denoiser's forward is ``function(denoiser, forward, ...)``."""
    denoisers = {id(part): part for name in DENOISERS if (part := getattr(pipe, name, None)) is not None}
    with ExitStack() as stack:
        for denoiser in denoisers.values():
            forward = wraps(denoiser.forward)(partial(function, denoiser, denoiser.forward))
            stack.enter_context(mock.patch.object(denoiser, "forward", forward))
        yield


@contextmanager
def inside(
    pipe: Any,
    plan: str,
    shares: dict[int, tuple[float, ...]] | None,
    pictures: int = 1,
    tokens: int | None = None,
) -> Iterator[Loop]:
    """Let a plain pipeline's own loop call `Loop` in place of its denoisers. See there for the arguments."""
    loop, scheduler, cls = Loop(plan, shares, pictures, tokens), pipe.scheduler, type(pipe.scheduler)
    original, signature = cls.step, inspect.signature(cls.step)

    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is scheduler:  # LTX-2 has a copy beside it, for the sound
            given = signature.bind(self, *args, **kwargs).arguments
            extra = {name: value for name, value in kwargs.items() if type(value) in (int, float)}
            loop.end_step(self, given["model_output"], given["timestep"], given["sample"], extra)
        return original(self, *args, **kwargs)

    with forwards(pipe, loop.forward), mock.patch.object(cls, "step", step):
        yield loop


def one_by_one(count: int, denoiser: Any, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """A forward that evaluates the ``count`` parts of a batch one after the other (for `forwards`)."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    latents = next(iter(given.values()))
    size, rest = divmod(len(latents), count)
    if rest:
        return original(*args, **kwargs)
    frames = latents.shape[2] if isinstance(latents, Tensor) and latents.ndim == 5 else 1

    def cut(value: Any, index: int) -> Any:
        if isinstance(value, dict):
            return {key: cut(item, index) for key, item in value.items()}
        if isinstance(value, Tensor) and value.ndim and len(value) in (len(latents), frames * len(latents)):
            return value.chunk(count)[index]
        if type(value) is type(latents) is list and len(value) == len(latents):
            return value[index * size : (index + 1) * size]
        return type(value)(cut(item, index) for item in value) if isinstance(value, list | tuple) else value

    outputs = [original(**{name: cut(value, i) for name, value in given.items()}) for i in range(count)]
    return like(outputs[0], [list(column) for column in zip(*map(tensors, outputs), strict=True)])
