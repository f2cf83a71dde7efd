"""Connects the layers of a quantized model: layers with the same input share its integers, and norms and layers
defer their result if an engine can fuse it with the next operation.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ditq.architectures.architecture import Architecture
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.layers.deferred import DeferredLayerNorm
from ditq.layers.read_only import FUSE_LORA, FUSE_PROJECTIONS
from ditq.layers.shared import SharedInput

FUSED_ROLES = (".out", ".up", ".gate_up", ".down")
"""Endings of the roles that are followed by a nonlinearity, or by a gate and a residual."""


def _refuse_fuse_lora(*args: Any, **kwargs: Any) -> None:
    raise UsageError(FUSE_LORA)


def _refuse_fuse_projections(*args: Any, **kwargs: Any) -> None:
    raise UsageError(FUSE_PROJECTIONS)


# Methods of diffusers' models that would change some layers before a quantized one refuses.
REFUSED = {"fuse_lora": _refuse_fuse_lora, "fuse_qkv_projections": _refuse_fuse_projections}


def wire(model: nn.Module, architecture: Architecture) -> None:
    """Makes linears of a group quantize their input once. Makes norms and layers defer their result if an engine can
    fuse it with the next operation. Changes no number and no name.
    """
    for name, refuse in REFUSED.items():
        if hasattr(type(model), name):
            object.__setattr__(model, name, refuse)
    shared = SharedInput()
    for group in architecture.groups(model):
        quantized = False
        for linear in group.linears:
            module = linear.module
            layers = list(module.ranges) if isinstance(module, TimestepLinear) else [module]
            for number, layer in enumerate(layers):
                if isinstance(layer, QuantizedLinear):
                    layer.shared, layer.group = shared, f"{group.name} {number}"
                    layer.defers = linear.role.endswith(FUSED_ROLES)
                    quantized |= layer.plan.activation is not None
        # A norm with two shifts has two streams, which are modulated separately and concatenated before a linear.
        if group.input.norm is not None and len(group.input.shift) <= 1 and quantized:
            norm = model.get_submodule(f"{group.block}.{group.input.norm}")
            if type(norm) is nn.LayerNorm:
                norm.__class__ = DeferredLayerNorm


def unwire(model: nn.Module) -> None:
    """Turns deferring norms back into plain ones, and allows again what float models can do."""
    for name in REFUSED:
        model.__dict__.pop(name, None)
    for module in model.modules():
        if type(module) is DeferredLayerNorm:
            object.__setattr__(module, "__class__", nn.LayerNorm)
