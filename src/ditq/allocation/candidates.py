"""A model in which group sizes can be changed: 16-bit weights are held once, and only what changes is exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ditq.allocation.budget import grouped
from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture, InputGroup
from ditq.calibration import Statistics
from ditq.conversion import convert, estimate, replace
from ditq.conversion.hessians import walk_blocks
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import group_scale
from ditq.layers import QuantizedLinear
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe
from ditq.trace.calls import Call


class Candidates:
    """Puts the layers of one genome after another into a model, in place.

    Each (layer, group size) is quantized once and then kept, packed: b of 16 bits a weight and group size. What runs
    is what a checkpoint would run, integer products included. Where the plans of the layers say GPTQ, all are rounded
    first, block by block on inputs of the 16-bit model: those of a candidate's own quantized blocks would take
    minutes a candidate. The paper rounds candidates to nearest.

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
        of_groups: dict[str, torch.Tensor | None] = {}
        planned = {layer.name: layer for layer in layers}
        for group in architecture.groups(model):
            of_groups[group.name] = None
            for linear in group.linears:
                if (smooth := planned[linear.name].smooth) is not None:
                    assert statistics is not None
                    scale = group_scale(smooth, group, statistics.groups[group.name], statistics.timesteps)
                    self.scales[linear.name] = of_groups[group.name] = scale.to(linear.module.weight.device)
        start = {layer.name: _to_nearest(layer) for layer in space.planned(space.coarsest)}
        coarsest = tuple(start.get(layer.name, _to_nearest(layer)) for layer in layers)
        plan = estimate(model, architecture, recipe).model_copy(update={"layers": coarsest, "seed": seed})
        self.plan: Plan = convert(model, architecture, plan, statistics)
        self.genome = space.coarsest
        self._made = {
            (layer.name, size): cast(QuantizedLinear, model.get_submodule(layer.name))
            for layer, size in zip(space.layers, self.genome, strict=True)
        }
        if any(layer.rounding == "gptq" for layer in space.layers):
            assert statistics is not None
            self._round(architecture, of_groups, statistics.calls)
            self.put(space.coarsest)

    def _round(
        self, architecture: Architecture, scales: dict[str, torch.Tensor | None], calls: Sequence[Call]
    ) -> None:
        """Makes every searched layer at every size by GPTQ."""
        for layer in self.space.layers:
            replace(self.model, layer.name, self.linears[layer.name])
        groups: dict[str, list[InputGroup]] = {}
        for group in architecture.groups(self.model):
            groups.setdefault(group.block, []).append(group)
        choices = {x.name: (x, sizes) for x, sizes in zip(self.space.layers, self.space.choices, strict=True)}
        plans = {name: layer for name, (layer, _) in choices.items()} | {
            layer.name: layer for layer in self.plan if layer.name not in choices
        }
        for _, hessians in walk_blocks(self.model, architecture, groups, plans, scales, calls, lambda call: None):
            for name, hessian in hessians.items():
                layer, sizes = choices[name]
                scale = self.scales.get(name)
                for size in sizes:
                    plan, quantized = round_weight(self.linears[name], grouped(layer, size), scale, hessian)
                    self._made[name, size] = QuantizedLinear.from_linear(
                        self.linears[name], plan, smooth_scale=scale, quantized=quantized
                    )

    @torch.no_grad()
    def put(self, genome: Genome) -> None:
        """Changes the model to the group sizes of ``genome``."""
        layers = {layer.name: layer for layer in self.space.planned(genome)}
        for layer, size in zip(layers.values(), genome, strict=True):
            key = (layer.name, size)
            if key not in self._made:
                self._made[key] = QuantizedLinear.from_linear(
                    self.linears[layer.name], layer, smooth_scale=self.scales.get(layer.name)
                )
            if self.model.get_submodule(layer.name) is not self._made[key]:
                replace(self.model, layer.name, self._made[key])
        sizes = dict(zip(layers, genome, strict=True))
        updated = [
            layer if layer.name not in layers
            else self._made[layer.name, sizes[layer.name]].plan.model_copy(update={"incoherence": layer.incoherence})
            for layer in self.plan
        ]  # fmt: skip
        self.plan = self.plan.model_copy(update={"layers": tuple(updated)})
        self.genome = genome


def _to_nearest(layer: LayerPlan) -> LayerPlan:
    return layer.model_copy(update={"rounding": "nearest", "gptq": None})
