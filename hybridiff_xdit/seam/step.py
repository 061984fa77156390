"""One step as it is made: what the pipeline asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..evaluate.calls import Call, Structure, has_parts, join, split
from ..evaluate.streams import deal
from .pattern import Pattern, Slot, Template


class Step:
    """The calls of the present step with their answers, in order of the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: list[list[Any]] = []  # by stream: what the pipeline got
        self.true: list[list[Any]] = []  # likewise: what was evaluated, where something else was handed on
        self.states: list[Any] = []  # of the denoiser at a call that was evaluated as it came, else None
        self.may_deal: list[bool] = []  # whether the streams of a call may be evaluated apart
        self.is_changed = False  # whether a call was not as the pattern had it
        self.is_unforetold = False  # whether that is the pipeline's way: its pattern was never as foretold
        self.is_storing = False  # whether a call leaves something that the pipeline may read before the next one
        self.has_exchanged = False  # whether the ranks have exchanged what this step's kind has them exchange

    def hand(self, pattern: Pattern, streams: list[Any], true: Sequence[Any] = ()) -> None:
        """Keep what the calls of a pattern are answered with, and on a FULL step what was evaluated."""
        given, evaluated = iter(streams), iter(true or streams)
        self.outputs = [[next(given) for _ in range(slot.count)] for slot in pattern.slots]
        self.true = [[next(evaluated) for _ in range(slot.count)] for slot in pattern.slots]
        self.may_deal = [slot.may_deal for slot in pattern.slots]
        self.states = [None] * len(pattern.slots)

    def note(self, streams: list[Any], state: Any, may_deal: bool) -> None:
        """Keep what the next call is answered with, by stream, for the step to be learnt."""
        self.outputs.append(streams)
        self.states.append(state)
        self.may_deal.append(may_deal)

    def change(self, index: int) -> None:
        """A call is not what the pattern has there: what was to be answered from there on is void."""
        self.is_changed = True
        del self.outputs[index:], self.true[index:], self.states[index:], self.may_deal[index:]

    def end(self) -> None:
        """No more is asked for: what was foretold beyond that is void."""
        count = len(self.calls)
        del self.outputs[count:], self.true[count:], self.states[count:], self.may_deal[count:]

    def answer(self, index: int) -> Any:
        """What a call returns."""
        parts = self.outputs[index]
        return parts[0] if len(parts) == 1 else join(parts, self.calls[index].is_listed)

    @property
    def handed(self) -> list[Any]:
        """The streams that the pipeline got."""
        return [stream for streams in self.outputs for stream in streams]

    @property
    def evaluated(self) -> list[Any]:
        """The streams of a FULL step as they were evaluated."""
        return [stream for streams in [*self.true, *self.outputs[len(self.true) :]] for stream in streams]

    def learn(self, sample: torch.Tensor, ranks: int, warn: Callable[[str], None]) -> Pattern:
        """What the step, which is over, tells of the next.

        Args:
            sample: the scheduler's.
            ranks: to which streams are dealt out.
            warn: told why a call has to be evaluated whole on every rank.
        """
        calls, batch = self.calls, len(sample)
        templates = [None, *(Template(calls[0], call) for call in calls[1:])]
        is_foretold = all(template is None or template.is_foretold for template in templates)
        by_denoiser: dict[int, Any] = {}
        for call, state in zip(calls, self.states, strict=False):
            if state is not None:  # it was evaluated as it came
                is_foretold &= by_denoiser.setdefault(id(call.denoiser), state) == state
        if self.is_storing:
            is_foretold = False
        elif not is_foretold:
            warn("what a later call does is decided after the first one (a cache, or skipped layers)")
        elif self.is_unforetold:
            warn("what a later call of a step is given is not known when the first one is made")
            is_foretold = False
        is_estimable, structures = True, []
        for i, call in enumerate(calls):
            count = len(self.outputs[i])
            if not _is_batch(call, count, sample):  # parts that only looked alike, or more of them than are alike
                output = self.answer(i)
                count = call.batch // batch if call.batch % batch == 0 else 1
                count = count if has_parts(call, count) else 1
                is_estimable &= count * batch == call.batch
                self.outputs[i] = split(output, count, call.is_listed)
            structures.append([Structure(stream, call.is_listed) for stream in self.outputs[i]])
        if not is_estimable:
            warn("its batch is not made of parts that share the latents")
        may_deal = [ok and is_foretold and is_estimable for ok in self.may_deal]
        costs = [
            sum(tensor.numel() for tensor in call.tensors) / len(found)
            for call, found, ok in zip(calls, structures, may_deal, strict=True)
            if ok
            for _ in found
        ]
        # A stream that is alone is every rank's.
        dealt = iter(deal(costs, ranks)) if len(costs) > 1 else None
        slots = []
        for call, found, ok, template in zip(calls, structures, may_deal, templates, strict=True):
            owners = tuple(next(dealt) for _ in found) if ok and dealt else None
            slots.append(Slot(call.kind, owners, found, template, ok))
        return Pattern(slots, is_foretold, is_estimable)


def _is_batch(call: Call, count: int, sample: torch.Tensor) -> bool:
    """Whether a call has so many parts as large as the scheduler's sample, whose batch may hold the frames too."""
    if count * len(sample) == call.batch:
        return True
    return count > 1 and not call.is_listed and call.latents.numel() == count * sample.numel()
