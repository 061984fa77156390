"""Both branches pipelined, as AsyncDiff does: a baseline made of the engine's executor, which is given the CFG batch.

After a warm-up, in which each rank evaluates the whole network for both branches, every step evaluates both branches
through two stages, stage 1 reading the boundary that stage 0 made a step before. That is two evaluations of the network
on two ranks, as a FULL step's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from hybridiff_xdit.evaluate.calls import Call
from hybridiff_xdit.evaluate.graphs import Graphs
from hybridiff_xdit.evaluate.stages.executor import Executor
from hybridiff_xdit.evaluate.stages.families import read
from hybridiff_xdit.ranks.comm import Comm
from hybridiff_xdit.seam.hooks import denoiser_of


@contextmanager
def both_branches(pipe: Any, warm_up: int, comm: Comm, is_timed: bool = False) -> Iterator[Graphs]:
    """Let the pipeline's calls run so, on two ranks or on one process that plays both.

    Args:
        pipe: a diffusers pipeline with guidance on.
        warm_up: steps at the start that are not pipelined, 1 or more.
        comm: the two ranks, or `Solo`.
        is_timed: whether the stages are balanced by time, where that can be measured.

    Yields:
        What holds its graphs.
    """
    denoiser = denoiser_of(pipe)
    original, signature = denoiser.forward, inspect.signature(type(denoiser).forward)
    graphs = Graphs(denoiser)
    executor = Executor(read(denoiser), comm, lambda denoiser: graphs)
    step = 0

    def whole(**inputs: Any) -> torch.Tensor:
        return original(**inputs)[0]

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        nonlocal step
        inputs = {**signature.bind(None, *args, **kwargs).arguments, "return_dict": False}
        inputs.pop("self")
        call = Call(denoiser, whole, inputs)
        both: Any = {"uncond": call, "cond": call}
        if step == 0:
            executor.begin(both, is_timed=is_timed)
            graphs.begin(next(denoiser.parameters()).device)
        if step < warm_up:
            executor.now = float(step)
            graphs.look()
            pred, boundaries = graphs(executor.name, partial(executor.watch, call), inputs)
            executor.keep(boundaries)
            executor.is_ready = True
        else:
            (pred,) = executor.pipelined(both, "cond", float(step), hand_over=True, extrapolate=False)
            if executor.error:
                raise executor.error
        step += 1
        if step == pipe.num_timesteps:
            executor.drain()
            step = 0
        return (pred,)  # [2B, C, H, W]

    denoiser.forward = forward
    try:
        yield graphs
    finally:
        del denoiser.forward
        executor.drain()
        graphs.clear()
