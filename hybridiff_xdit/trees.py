"""Nests of tensors and trees of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same nest with ``function`` applied to each tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = (map_tensors(function, item) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, in the order of ``nn.Module.modules``; one that has two places twice.

    PyTorch's takes the host some milliseconds for a large denoiser, between two steps.
    """
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is not None:
            yield part
            waiting += reversed(part._modules.values())
