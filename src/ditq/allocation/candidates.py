"""A model in which group sizes can be changed: 16-bit weights are held once, and only what changes is exchanged."""

from __future__ import annotations

import torch
from torch import nn

from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.layers import QuantizedLinear
from ditq.methods import convert, replace
from ditq.methods.error import group_scale
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe


class Candidates:
    """Puts the layers of one genome after another into a model, in place.

    Layers are rounded to nearest, as in the paper's loop: compensated rounding would take minutes a candidate. Each
    (layer, group size) is quantized once and then kept, packed: b of 16 bits a weight and group size. What runs is
    what a checkpoint would run, integer products included.

    Args:
        layers: plans of all linears of the model, of which ``space`` has those that change.
        recipe: whose name and nominal bits the plan carries.

    Attributes:
        plan: what is in the model now.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        layers: list[LayerPlan],
        space: Space,
        statistics: Statistics | None,
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.model, self.space = model, space
        self.linears = {x.name: x.module for x in architecture.linears(model)}
        # Before anything is folded, as convert() does it.
        self.scales: dict[str, torch.Tensor] = {}
        planned = {layer.name: layer for layer in layers}
        for group in architecture.groups(model):
            for linear in group.linears:
                if (smooth := planned[linear.name].smooth) is not None:
                    assert statistics is not None
                    scale = group_scale(smooth, group, statistics.groups[group.name], statistics.timesteps)
                    self.scales[linear.name] = scale.to(linear.module.weight.device)
        start = {layer.name: layer for layer in space.planned(space.coarsest)}
        self.plan: Plan = convert(
            model, architecture, [start.get(layer.name, layer) for layer in layers], statistics,
            method=recipe.method, recipe=recipe.name, seed=seed,
            nominal=(recipe.weights.bits, recipe.activations.bits if recipe.activations else 16),
        )  # fmt: skip
        self.genome = space.coarsest
        self._made = {
            (layer.name, size): model.get_submodule(layer.name)
            for layer, size in zip(space.layers, self.genome, strict=True)
        }

    @torch.no_grad()
    def put(self, genome: Genome) -> None:
        """Changes the model to the group sizes of ``genome``."""
        if genome == self.genome:
            return
        layers = {layer.name: layer for layer in self.space.planned(genome)}
        for layer, old, new in zip(layers.values(), self.genome, genome, strict=True):
            if old != new:
                key = (layer.name, new)
                if key not in self._made:
                    self._made[key] = QuantizedLinear.from_linear(
                        self.linears[layer.name], layer, smooth_scale=self.scales.get(layer.name)
                    )
                replace(self.model, layer.name, self._made[key])
        updated = [
            layer if layer.name not in layers
            else layers[layer.name].model_copy(update={"incoherence": layer.incoherence})
            for layer in self.plan
        ]  # fmt: skip
        self.plan = self.plan.model_copy(update={"layers": tuple(updated)})
        self.genome = genome
