"""A prediction that another rank is making, handed to the pipeline before it is there.

On the first step of a run nobody knows the arguments of its later calls, so the ranks cannot begin them early. But most
pipelines only slice what the first call returns until the second has returned too. So each rank evaluates the call that
is its own, returns an empty tensor for the others, and fills it in when the last call of the step has been made. A
pipeline that computes on it earlier (Cosmos) has it evaluated there and then, on this rank too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..evaluate.calls import Structure

_Tensor = torch.Tensor

#: What only looks at a tensor, or at a part of it, without reading it.
_VIEWS = frozenset(
    (
        *(_Tensor.__getitem__, _Tensor.chunk, _Tensor.split, _Tensor.narrow, _Tensor.select, _Tensor.unbind),
        *(_Tensor.view, _Tensor.transpose, _Tensor.permute, _Tensor.unsqueeze, _Tensor.squeeze, _Tensor.unflatten),
        *(_Tensor.size, _Tensor.dim, _Tensor.numel, _Tensor.stride, _Tensor.__len__, _Tensor.is_floating_point),
        *(torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind, torch.transpose, torch.permute),
        *(torch.unsqueeze, torch.squeeze),
        *(getattr(_Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
    )
)


class Promise:
    """What a call will return.

    Args:
        structure: of it.
        device: where it will be.
        evaluate: makes it here.
    """

    def __init__(self, structure: Structure, device: torch.device, evaluate: Callable[[], Any]) -> None:
        self._structure, self._evaluate = structure, evaluate
        self._buffers = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in structure.shapes]
        self.is_kept = False

    def output(self) -> Any:
        """What to return meanwhile."""
        return self._structure.fill(_wrap(buffer, self) for buffer in self._buffers)

    def keep(self, output: Any = None) -> Any:
        """Fill it in with what another rank has made, or, where None is given, with what is made here; the output."""
        if not self.is_kept:
            made = self._structure.tensors(self._evaluate() if output is None else output)
            for buffer, tensor in zip(self._buffers, made, strict=True):
                buffer.copy_(tensor)
            self.is_kept = True
        return self._structure.fill(self._buffers)


class _Pending(torch.Tensor):
    """A tensor of a promise, or a view of one."""

    promise: Promise

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pending = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, _Pending)]
        if func not in _VIEWS:
            for tensor in pending:
                tensor.promise.keep()
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = pytree.tree_map_only(
                _Pending, lambda tensor: tensor.as_subclass(torch.Tensor), (args, kwargs)
            )
            found = func(*args, **kwargs)
        promise = pending[0].promise
        if promise.is_kept:
            return found
        return pytree.tree_map_only(torch.Tensor, lambda tensor: _wrap(tensor, promise), found)


def _wrap(tensor: torch.Tensor, promise: Promise) -> torch.Tensor:
    wrapped = tensor.as_subclass(_Pending)
    wrapped.promise = promise
    return wrapped
