"""A stand-in for offloading to another device, on a machine that has only one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn


class Away(ModelHook):
    """Holds tensors only while the module runs, as an offloading hook; a read outside of it gives NaN or zeros."""

    def __init__(self, recurse: bool) -> None:
        super().__init__()
        self.recurse = recurse

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        tensors = [*module.parameters(recurse=self.recurse), *module.buffers(recurse=self.recurse)]
        self.home = [(t, t.data) for t in tensors]
        self.leave()
        return module

    def leave(self) -> None:
        for tensor, data in self.home:
            tensor.data = torch.full_like(data, float("nan")) if data.is_floating_point() else torch.zeros_like(data)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for tensor, data in self.home:
            tensor.data = data
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.leave()
        return output


def send_away(model: nn.Module, level: str) -> None:
    """Every module with tensors of its own ("leaf"), or every block of a stack, is away outside of its forward."""
    if level == "leaf":
        # As diffusers: only layers of torch, which nobody reads a tensor of without calling them.
        kinds: Any = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d, nn.Conv3d)
        modules = [module for module in model.modules() if isinstance(module, kinds)]
    else:
        modules = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    for module in modules:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Away(level == "block"), "away")
