"""A model with exchangeable layers: the 16-bit weights are held once, and only changed layers are replaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ditq.allocation.space import Genome, Space
from ditq.architectures import Architecture, InputGroup
from ditq.calibration import Statistics
from ditq.conversion import convert, estimate, replace
from ditq.conversion.hessians import walk_blocks
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import balanced, group_scale
from ditq.layers import Clock, QuantizedLinear, SteppedLinear
from ditq.plan import LayerPlan, Plan
from ditq.recipe import Recipe
from ditq.trace.calls import Call


class Candidates:
    """Puts the layers of one genome after another into a model, in place.

    Each layer is quantized once for each of its weight formats and kept packed, at b bits per weight; plans that
    differ in their activations share the integers. The model runs as it would from a checkpoint, integer products
    included. If the layer plans use GPTQ, all layers are rounded first, block by block on inputs of the 16-bit model;
    inputs from each candidate's quantized blocks would take minutes per candidate. The paper rounds candidates to
    nearest.

    Args:
        model: the 16-bit transformer.
        architecture: of the model.
        layers: plans of all linears of the model; those in ``space`` change.
        space: the searched layers and their choices.
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
        self.genome = space.coarsest
        start = {layer.name: _to_nearest(layer) for layer in space.planned(self.genome)}
        coarsest = tuple(start.get(layer.name, _to_nearest(layer)) for layer in layers)
        plan = estimate(model, architecture, recipe).model_copy(update={"layers": coarsest, "seed": seed})
        self.plan: Plan = convert(model, architecture, plan, statistics)
        self._incoherence = {layer.name: layer.incoherence for layer in self.plan}
        self._quantized: dict[tuple[str, LayerPlan], QuantizedLinear] = {}
        self._kept: dict[str, nn.Linear] = {}
        self._clock = Clock()
        if any(gene.segment for gene in space.genes) or any(layer.steps for layer in layers):
            self._clock.attach(model, architecture.forward.time)
        for name, layer in start.items():
            if layer.weight is not None:
                module = cast(QuantizedLinear, model.get_submodule(name))
                self._quantized[name, _weights_of(layer)] = module
        if any(layer.rounding == "gptq" for gene in space.genes for of in gene.plans.values() for layer in of):
            assert statistics is not None
            self._round(architecture, group_scales, statistics.calls)
        self.put(space.coarsest)

    def _round(
        self, architecture: Architecture, scales: dict[str, torch.Tensor | None], calls: Sequence[Call]
    ) -> None:
        """Rounds every searched layer in every weight format by GPTQ."""
        for layer in self.space.layers:
            replace(self.model, layer.name, self.linears[layer.name])
        groups: dict[str, list[InputGroup]] = {}
        for group in architecture.groups(self.model):
            groups.setdefault(group.block, []).append(group)
        wanted: dict[str, dict[LayerPlan, None]] = {}  # weights of each layer, in order
        for gene in self.space.genes:
            for plan in (plan for of_choice in gene.plans.values() for plan in of_choice):
                if plan.weight is not None:
                    wanted.setdefault(plan.name, {})[_weights_of(plan)] = None
        plans = {layer.name: layer for layer in self.plan}
        plans |= {name: next(iter(formats)) for name, formats in wanted.items()}
        for _, hessians in walk_blocks(self.model, architecture, groups, plans, scales, calls, lambda call: None):
            for name, hessian in hessians.items():
                scale = self.scales.get(name)
                for weights in wanted[name]:
                    weight = balanced(self.linears[name].weight.detach(), scale, weights.rotate, weight=True)
                    plan, quantized = round_weight(weight, weights, hessian)
                    self._quantized[name, weights] = QuantizedLinear.from_linear(
                        self.linears[name], plan, smooth_scale=scale, quantized=quantized
                    )

    @torch.no_grad()
    def put(self, genome: Genome) -> None:
        """Replaces layers of the model so that it has the plans of ``genome``."""
        chosen = {layer.name: self._put(layer) for layer in self.space.planned(genome)}
        self.plan = self.plan.model_copy(update={"layers": tuple(chosen.get(x.name, x) for x in self.plan)})
        self.genome = genome

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts a module into the model in place of a layer."""
        replace(self.model, name, module)

    def _put(self, layer: LayerPlan) -> LayerPlan:
        """Puts one layer into the model and returns its completed plan."""
        current = self.model.get_submodule(layer.name)
        if layer.weight is None:
            kept = self._kept.setdefault(layer.name, _stored(self.linears[layer.name], self.plan.storage_dtype))
            if current is not kept:
                replace(self.model, layer.name, kept)
            return layer
        key = layer.name, _weights_of(layer)
        if key not in self._quantized:
            self._quantized[key] = QuantizedLinear.from_linear(
                self.linears[layer.name], layer, smooth_scale=self.scales.get(layer.name) if layer.smooth else None
            )
        module = self._quantized[key]
        inputs = {
            "activation": layer.activation, "steps": layer.steps, "incoherence": self._incoherence.get(layer.name)
        }  # fmt: skip
        plan = module.plan.model_copy(update=inputs)
        if layer.steps is not None:
            module = SteppedLinear.of(module, plan, self._clock)  # shares the integers
        elif module.plan.activation != layer.activation or isinstance(module, SteppedLinear):
            module = QuantizedLinear.like(module, plan)
        self._quantized[key] = module
        module.plan = plan
        if current is not module:
            replace(self.model, layer.name, module)
        return plan


def _weights_of(layer: LayerPlan) -> LayerPlan:
    """What the integers of a layer depend on."""
    return layer.model_copy(update={"activation": None, "steps": None, "incoherence": None})


def _stored(linear: nn.Linear, dtype: str) -> nn.Linear:
    """The layer with its weight rounded as it is stored; the same layer if it is in 16 bit already."""
    if linear.weight.dtype != torch.float32:
        return linear
    rounded = copy.copy(linear)
    rounded._parameters = {
        name: None if p is None else nn.Parameter(p.to(getattr(torch, dtype)).float(), requires_grad=False)
        for name, p in linear._parameters.items()
    }
    return rounded


def _to_nearest(layer: LayerPlan) -> LayerPlan:
    return layer.model_copy(update={"rounding": "nearest", "gptq": None})
