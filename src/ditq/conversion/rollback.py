"""Leaves a model as it was if an operation on it fails half-way, or after a measurement."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restored_on_error(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """Within it, any exception, a KeyboardInterrupt included, puts back modules, classes, hooks, modes and tensors.

    With ``always`` they are put back at its end too. The float weights of replaced layers stay in memory until it
    ends: they are what would be put back. Tensors must be replaced (``p.data = ...``), not changed in place.
    """
    before = [_state(module) for module in model.modules()]
    tensors = [(p, p.data) for p in (*model.parameters(), *model.buffers())]
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            _put_back(before, tensors)


def _put_back(before: list[_State], tensors: list[tuple[Tensor, Tensor]]) -> None:
    for module, kind, attributes, registries in before:
        object.__setattr__(module, "__class__", kind)
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for registry, content in registries:  # the same objects: handles of hooks refer to them
            registry.clear()
            registry.update(content)
    with torch.no_grad():
        for tensor, data in tensors:
            tensor.data = data


_State = tuple[nn.Module, type, dict[str, Any], list[tuple[Any, Any]]]


def _state(module: nn.Module) -> _State:
    """The class, the attributes, and the registries (of submodules, parameters, hooks, ...) with their contents."""
    attributes = dict(module.__dict__)
    registries = [(value, value.copy()) for value in attributes.values() if type(value) in (dict, OrderedDict, set)]
    return module, type(module), attributes, registries
