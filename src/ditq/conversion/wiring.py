"""Connects the layers of a quantized model: layers with the same input share its integers, and norms and layers
defer their result if an engine can fuse it with the next operation.
"""

from __future__ import annotations

from torch import nn

from ditq.architectures.architecture import Architecture
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.layers.deferred import DeferredLayerNorm
from ditq.layers.shared import SharedInput

FUSED_ROLES = (".out", ".up", ".gate_up", ".down")
"""Endings of the roles that are followed by a nonlinearity, or by a gate and a residual."""


def wire(model: nn.Module, architecture: Architecture) -> None:
    """Makes linears of a group quantize their input once. Makes norms and layers defer their result if an engine can
    fuse it with the next operation. Changes no number and no name.
    """
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
    """Turns deferring norms back into plain ones."""
    for module in model.modules():
        if type(module) is DeferredLayerNorm:
            object.__setattr__(module, "__class__", nn.LayerNorm)
