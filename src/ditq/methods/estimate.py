"""What a recipe makes of a model, before anything is looked at or changed."""

from __future__ import annotations

from torch import nn

from ditq.architectures import Architecture
from ditq.methods.convert import draft
from ditq.plan import Plan
from ditq.recipe import Recipe


def estimate(model: nn.Module, architecture: Architecture, recipe: Recipe) -> Plan:
    """The plan of a recipe without balance, for its roles, bits and memory. The model may be on the meta device.

    Raises:
        UsageError: a linear has no role, or the recipe's group size does not fit a layer.
        NothingQuantizedError: the recipe keeps every layer in 16 bit.
    """
    layers = draft(model, architecture, recipe)
    total = sum(p.numel() for p in model.parameters())
    return Plan(
        method=recipe.method, recipe=recipe.name, architecture=architecture.name,
        nominal_weight_bits=recipe.weights.bits,
        nominal_activation_bits=recipe.activations.bits if recipe.activations else 16,
        layers=tuple(layers), other_parameters=total - sum(layer.parameters for layer in layers),
    )  # fmt: skip
