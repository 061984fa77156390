"""Imported by the process that ranks are forked from: they inherit the pipelines of `tiny` and what is found of them.

So too what PyTorch keeps of operations on fake tensors, which takes a rank seconds to find by itself.
"""

import gc

import tiny
import torch

from hybridiff_xdit import HybridConfig, hybrid


def run(pipe, call) -> None:
    """Let a pipeline be counted and its outputs be foretold, by a call of four steps."""
    with hybrid(pipe, HybridConfig(plan="FFPF", stages=4), simulate=True):
        call()
    gc.collect()
    gc.freeze()  # a collection in a rank does not walk through what it inherits


torch.set_num_threads(1)
for name in tiny.PIPELINES:
    pipe = tiny.pipeline(name)
    run(pipe, lambda pipe=pipe, name=name: tiny.call(pipe, name, num_inference_steps=4))
