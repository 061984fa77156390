"""Nests of tensors and trees of modules."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

#: Types whose values hold no state but themselves.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice)


class Indescribable(Exception):
    """A value whose state Python does not show."""


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a nest, in order."""
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The same nest with ``function`` applied to each tensor."""
    return pytree.tree_map_only(torch.Tensor, function, value)


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, level by level; one that has two places twice.

    ``nn.Module.modules`` takes the host some milliseconds for a large denoiser, between two steps.
    """
    found = [module]
    for part in found:  # which grows meanwhile
        if children := part._modules:
            found += [child for child in children.values() if child is not None]
    return found


def describe(
    value: Any,
    tensor: Callable[[torch.Tensor], Hashable],
    seen: tuple[int, ...] = (),
    otherwise: Callable[[Any], Hashable] | None = None,
) -> Hashable:
    """All that a value holds but the contents of its tensors; equal where nothing differs.

    Args:
        value: a nest, or an object: its class and its attributes are described.
        tensor: describes a tensor.
        seen: ids of the objects that this one is in.
        otherwise: describes an object whose state is not in attributes.

    Raises:
        Indescribable: it holds such an object, and there is no ``otherwise``.
    """
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, PLAIN):
        return type(value).__name__, repr(value) if isinstance(value, slice) else value
    if id(value) in seen:
        return "within itself"
    held = partial(describe, tensor=tensor, seen=(*seen, id(value)), otherwise=otherwise)
    if isinstance(value, dict | types.MappingProxyType):
        return tuple((held(key, seen=()), held(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, *map(held, value)
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(repr, value)))
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType | nn.Module):
        return id(value)
    if isinstance(value, partial):
        return held((value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return id(value.__func__), held(value.__self__)
    if hasattr(value, "__dict__"):
        return type(value).__qualname__, held(vars(value))
    if otherwise is not None:
        return otherwise(value)
    raise Indescribable(f"the state of a {type(value).__name__} cannot be told")
