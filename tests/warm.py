"""Imported once by the process that ranks are forked from: they inherit the pipelines of `tiny` and what is found of
them, and what PyTorch keeps of operations on fake tensors, which otherwise takes each new rank seconds."""

import tiny
import torch

from hybridiff_xdit import HybridConfig, hybrid

torch.set_num_threads(1)
for name in tiny.PIPELINES:
    with hybrid(tiny.pipeline(name), HybridConfig(plan="FFPF", stages=4), simulate=True) as pipe:
        tiny.call(pipe, name, num_inference_steps=4)
