"""Both branches pipelined, as AsyncDiff does: a baseline made of two of the engine's executors, one a branch.

After a warm-up of FULL steps every step evaluates both branches, each through the stages, stage 1 reading the boundary
that stage 0 made a step before. That costs two evaluations of the network on two ranks: F a step, like FULL.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hybridiff_xdit.comm import Solo
from hybridiff_xdit.executor import Executor
from hybridiff_xdit.graphs import Graphs
from hybridiff_xdit.hybrid import denoiser_of
from hybridiff_xdit.partition import map_tensors, read


@contextmanager
def both_branches(pipe: Any, warm_up: int) -> Iterator[None]:
    """Let one call of the pipeline run so, on one process that plays both ranks.

    Args:
        pipe: a diffusers pipeline with guidance on.
        warm_up: FULL steps at the start, 1 or more.
    """
    denoiser = denoiser_of(pipe)
    original, signature = denoiser.forward, inspect.signature(type(denoiser).forward)
    executors = [Executor(read(denoiser), Solo(), Graphs(denoiser)) for _ in range(2)]
    step = 0

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        nonlocal step
        inputs = {**signature.bind(None, *args, **kwargs).arguments, "return_dict": False}
        inputs.pop("self")
        predictions = []
        for index, executor in enumerate(executors):
            branch = _half(inputs, index)
            both: Any = {"uncond": branch, "cond": branch}
            if step == 0:
                executor.prepare(branch)
                executor.graphs.begin(next(denoiser.parameters()).device)
            if step < warm_up:
                predictions.append(executor.full(original, both, branch, float(step), extrapolate=False).pred_c)
            else:
                predictions.append(executor.pipelined(both, "cond", float(step), hand_over=True, extrapolate=False))
        step += 1
        return (torch.cat(predictions),)  # [2B, C, H, W]

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        for executor in executors:
            executor.drain()


def _half(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """The arguments of one branch, batch B, from those of [uncond, cond], batch 2B."""
    batch = (inputs["sample"] if "sample" in inputs else inputs["hidden_states"]).shape[0]
    return map_tensors(lambda t: t.chunk(2)[index] if t.ndim and t.shape[0] == batch else t, inputs)
