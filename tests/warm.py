"""Imported by the process that the others are forked from: they inherit pipelines, and what is found of them.

So too what PyTorch keeps of operations on fake tensors, and transformers of the checkpoints that it can convert, which
takes a process seconds to find by itself.
"""

import gc
import os
import tempfile
from pathlib import Path

import tiny
import torch

from hybridiff_xdit import HybridConfig, hybrid

os.environ["LOG_LEVEL"] = "error"  # xDiT's
import hybridiff_xdit.xdit.models  # noqa: F401  # and with it everything that is large

import xdit_tiny  # isort: skip

torch.set_num_threads(1)
for name in tiny.PIPELINES:
    pipe = tiny.pipeline(name)
    with hybrid(pipe, HybridConfig(plan="FFPF", stages=4), simulate=True):
        tiny.call(pipe, name, num_inference_steps=4)
with tempfile.TemporaryDirectory() as folder:
    xdit_tiny.load(xdit_tiny.save("sd3", Path(folder)))
gc.collect()
gc.freeze()  # a collection in a process does not walk through what it inherits
