"""Runs a script written for CUDA on the CPU: ``xdit_cuda_shim.py SCRIPT [flags]``. For tests only."""

import runpy
import sys

import torch


class _Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


_to = torch.nn.Module.to
torch.nn.Module.to = lambda self, *args, **kwargs: _to(self, *_on_cpu(args), **kwargs)
torch.Generator = _Generator
torch.cuda.max_memory_allocated = lambda device=None: 0
torch.cuda.reset_peak_memory_stats = lambda device=None: None


def _on_cpu(args: tuple) -> list:
    return ["cpu" if isinstance(arg, torch.device) and arg.type == "cuda" else arg for arg in args]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
