"""Carries out a plan on a model, in place: scales, Hessians, rounding, quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture, InputGroup, Linear
from ditq.architectures.architecture import drop_leftovers
from ditq.calibration import Statistics
from ditq.conversion.checks import check, smoothed_layer
from ditq.conversion.hessians import Hessians, InputHessian, walk_blocks
from ditq.conversion.make import make_layer
from ditq.conversion.scales import group_scale
from ditq.conversion.storage import count_float32, count_parameters, round_to_storage
from ditq.conversion.wiring import wire
from ditq.layers import Clock
from ditq.plan import LayerPlan, Plan
from ditq.trace.calls import Call, call_time

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class Conversion:
    """The state that the steps of :func:`convert` share while one plan is carried out on one model.

    Attributes:
        plans: of every linear, by name.
        statistics: of the timesteps that the plan uses; None if it needs none.
        scales: smoothing scale [K] of every input group by the group's name; None for a group without smoothing.
        clock: the timestep of the current call, for layers that change with it.
    """

    model: nn.Module
    architecture: Architecture
    plans: dict[str, LayerPlan]
    statistics: Statistics | None
    scales: dict[str, Tensor | None] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)


@torch.no_grad()
def convert(
    model: nn.Module,
    architecture: Architecture,
    plan: Plan,
    statistics: Statistics | None,
    *,
    progress: Progress | None = None,
) -> Plan:
    """Carries out ``plan`` on ``model``, in place, and returns it completed by storage and rounding gains.

    Args:
        statistics: of calibration; scales come from the timesteps that ``plan.calibration_timesteps`` names.

    Raises:
        UsageError, NothingQuantizedError: see :func:`ditq.conversion.checks.check`; the model is unchanged then.
    """
    plan = _unfolded(plan)
    statistics = statistics.at(plan.calibration_timesteps) if statistics else None
    work = Conversion(model, architecture, {layer.name: layer for layer in plan.layers}, statistics)
    check(model, architecture, work.plans, statistics)
    drop_leftovers(model)
    groups = architecture.groups(model)
    work.scales = {group.name: _scale(work, group) for group in groups}
    del groups  # they hold the float weights of finished blocks
    storage = round_to_storage(model)
    if plan.follows_timesteps:
        work.clock.attach(model, architecture.forward.time)
    names = [linear.name for linear in architecture.linears(model)]
    final = _replace_all(work, progress)
    wire(model, architecture)
    return plan.model_copy(
        update={
            "architecture": architecture.name,
            "layers": tuple(final[name] for name in names),
            "storage_dtype": storage,
            "time_argument": architecture.forward.time,
            "other_parameters": count_parameters(model, final) - sum(layer.parameters for layer in final.values()),
            "float32_parameters": count_float32(model, final),
        }
    )


def _unfolded(plan: Plan) -> Plan:
    """The plan with every smoothing in its layer: ditq 0.1 folded some into the producer of the input."""
    layers = (
        layer.model_copy(update={"smooth": layer.smooth.model_copy(update={"folded": None})})
        if layer.smooth
        else layer
        for layer in plan.layers
    )
    return plan.model_copy(update={"layers": tuple(layers), "folds": ()})


def _scale(work: Conversion, group: InputGroup) -> Tensor | None:
    layer = smoothed_layer(group, work.plans)
    if layer is None or layer.smooth is None:
        return None
    assert work.statistics is not None  # see checks.check
    scale = group_scale(layer.smooth, group, work.statistics.groups[group.name], work.statistics.timesteps)
    return scale.to(group.linears[0].module.weight.device)


def _replace_all(work: Conversion, progress: Progress | None) -> dict[str, LayerPlan]:
    """Replaces linears by quantized layers; returns the completed plan of every linear."""
    done, total = 0, sum(plan.weight is not None for plan in work.plans.values())
    final: dict[str, LayerPlan] = {}
    for group, linear, hessian in _jobs(work):
        plan = work.plans[linear.name]
        if plan.weight is not None:
            scale = work.scales[group.name] if group else None
            plan, layer = make_layer(plan, linear.module, group, scale, work.statistics, hessian, work.clock)
            replace(work.model, linear.name, layer)
            done += 1
            if progress:
                progress(done, total)
        final[linear.name] = plan
        del hessian  # free it before those of the next block are allocated
    return final


def _jobs(work: Conversion) -> Iterator[tuple[InputGroup | None, Linear, InputHessian | None]]:
    """Every linear with its group, if any, and the Hessian of its balanced input if GPTQ rounds it.

    The caller replaces each linear before it takes the next one: the inputs of a block are the outputs of the already
    quantized blocks. Groups of finished blocks are released together with their float weights.
    """
    groups: dict[str, list[InputGroup]] = {}
    for group in work.architecture.groups(work.model):
        groups.setdefault(group.block, []).append(group)
    in_blocks = {linear.name for of_block in groups.values() for group in of_block for linear in group.linears}
    others = [linear for linear in work.architecture.linears(work.model) if linear.name not in in_blocks]

    def set_clock(call: Call) -> None:
        work.clock.set(call_time(work.architecture, call))

    blocks: Iterable[tuple[str, Hessians]] = ((name, {}) for name in list(groups))
    if any(plan.rounding == "gptq" for plan in work.plans.values()):
        assert work.statistics is not None  # see checks.check
        calls = work.statistics.calls
        blocks = walk_blocks(work.model, work.architecture, groups, work.plans, work.scales, calls, set_clock)
    for block, hessians in blocks:
        for group in groups.pop(block):
            for linear in group.linears:
                yield group, linear, hessians.get(linear.name)
    for linear in others:
        yield None, linear, None


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replaces the submodule ``name`` by ``layer``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
