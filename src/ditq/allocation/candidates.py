"""A model with exchangeable group sizes: the 16-bit weights are held once, and only changed layers are replaced."""

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

    Each (layer, group size) is quantized once and kept packed, at b bits per weight and group size. The model runs as
    it would from a checkpoint, integer products included. If the layer plans use GPTQ, all layers are rounded first,
    block by block on inputs of the 16-bit model; inputs from each candidate's quantized blocks would take minutes per
    candidate. The paper rounds candidates to nearest.

    Args:
        model: the 16-bit transformer.
        architecture: of the model.
        layers: plans of all linears of the model; those in ``space`` change.
        space: the searched layers and their group sizes.
        statistics: calibration statistics, if the plans need them.
        recipe: sets the name and the nominal bits of the plan.
        seed: of the rotations.

    Attributes:
        plan: the plan of the model in its current state.
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
        self.scales: dict[str, torch.Tensor] = {}
        group_scales: dict[str, torch.Tensor | None] = {}
        planned = {layer.name: layer for layer in layers}
        for group in architecture.groups(model):
            group_scales[group.name] = None
            for linear in group.linears:
                if (smooth := planned[linear.name].smooth) is not None:
                    assert statistics is not None
                    scale = group_scale(smooth, group, statistics.groups[group.name], statistics.timesteps)
                    self.scales[linear.name] = group_scales[group.name] = scale.to(linear.module.weight.device)
        start = {layer.name: _to_nearest(layer) for layer in space.planned(space.coarsest)}
        coarsest = tuple(start.get(layer.name, _to_nearest(layer)) for layer in layers)
        plan = estimate(model, architecture, recipe).model_copy(update={"layers": coarsest, "seed": seed})
        self.plan: Plan = convert(model, architecture, plan, statistics)
        self.genome = space.coarsest
        self._quantized = {
            (layer.name, size): cast(QuantizedLinear, model.get_submodule(layer.name))
            for layer, size in zip(space.layers, self.genome, strict=True)
        }
        if any(layer.rounding == "gptq" for layer in space.layers):
            assert statistics is not None
            self._round(architecture, group_scales, statistics.calls)
            self.put(space.coarsest)

    def _round(
        self, architecture: Architecture, scales: dict[str, torch.Tensor | None], calls: Sequence[Call]
    ) -> None:
        """Rounds every searched layer at every group size by GPTQ."""
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
                    self._quantized[name, size] = QuantizedLinear.from_linear(
                        self.linears[name], plan, smooth_scale=scale, quantized=quantized
                    )

    @torch.no_grad()
    def put(self, genome: Genome) -> None:
        """Replaces layers of the model so that it has the group sizes of ``genome``."""
        layers = {layer.name: layer for layer in self.space.planned(genome)}
        for layer, size in zip(layers.values(), genome, strict=True):
            key = (layer.name, size)
            if key not in self._quantized:
                self._quantized[key] = QuantizedLinear.from_linear(
                    self.linears[layer.name], layer, smooth_scale=self.scales.get(layer.name)
                )
            if self.model.get_submodule(layer.name) is not self._quantized[key]:
                replace(self.model, layer.name, self._quantized[key])
        sizes = dict(zip(layers, genome, strict=True))
        updated = []
        for layer in self.plan:
            if layer.name in layers:
                quantized = self._quantized[layer.name, sizes[layer.name]]
                layer = quantized.plan.model_copy(update={"incoherence": layer.incoherence})
            updated.append(layer)
        self.plan = self.plan.model_copy(update={"layers": tuple(updated)})
        self.genome = genome


def _to_nearest(layer: LayerPlan) -> LayerPlan:
    return layer.model_copy(update={"rounding": "nearest", "gptq": None})
