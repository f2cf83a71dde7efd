"""The nearest plan without steps: every layer has its most precise activation grid at all timesteps."""

from __future__ import annotations

from torch import nn

from ditq.layers import QuantizedLinear
from ditq.layers.stepped import stepped
from ditq.plan import Plan


def without_steps(plan: Plan) -> Plan:
    """The plan without activation grids by timestep; its weights are the same."""
    layers = tuple(layer.model_copy(update={"steps": None}) for layer in plan.layers)
    return plan.model_copy(update={"layers": layers})


def drop_steps(model: nn.Module) -> int:
    """Makes the layers of a quantized model use their most precise grid at all timesteps; returns how many changed."""
    layers = stepped(model)
    for layer in layers.values():
        layer.__dict__.pop("clock")
        layer.plan = layer.plan.model_copy(update={"steps": None})
        object.__setattr__(layer, "__class__", QuantizedLinear)
    return len(layers)
