"""Carries out a plan on a model: scales, folds, rounding, quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture, InputGroup, Linear
from ditq.calibration import GroupStatistics, Statistics
from ditq.conversion.error import balanced, group_scale
from ditq.conversion.folding import fold
from ditq.conversion.hessians import Hessians, InputHessian, round_weight, walk_blocks
from ditq.conversion.wiring import wire
from ditq.errors import NothingQuantizedError, UsageError
from ditq.layers import Clock, QuantizedLinear, TimestepLinear
from ditq.numerics import incoherence
from ditq.plan import Fold, Incoherence, LayerPlan, Plan, Timesteps
from ditq.trace.calls import Call, call_time

Progress = Callable[[int, int], None]


@torch.no_grad()
def convert(
    model: nn.Module,
    architecture: Architecture,
    layers: Iterable[LayerPlan],
    statistics: Statistics | None,
    *,
    method: str,
    recipe: str,
    nominal: tuple[int, int],
    seed: int = 0,
    timesteps: Timesteps = "all",
    progress: Progress | None = None,
) -> Plan:
    """Carries out layer plans on ``model``, in place, and returns the complete plan.

    Args:
        timesteps: those of ``statistics`` that scales come from.

    Raises:
        UsageError: a plan names a layer the model does not have, or of another size; or it smooths or
            uses static scales and there are no statistics.
        NothingQuantizedError: no layer has integer weights.
    """
    plans = {layer.name: layer for layer in layers}
    statistics = statistics.at(timesteps) if statistics else None
    _check_names(model, architecture, plans)
    if not any(plan.weight for plan in plans.values()):
        raise NothingQuantizedError("The plan keeps every layer in 16 bit.")
    groups = architecture.groups(model)
    _check_statistics(groups, plans, statistics)
    # Weights decide the scales, and folding changes weights: first all scales, then all folds.
    scales = {group.name: _scale(group, plans, statistics) for group in groups}
    folds = [record for group in groups if (record := _fold(model, architecture, group, plans, scales[group.name]))]
    storage = _round_to_storage(model)

    in_stacks = {linear.name for group in groups for linear in group.linears}
    linears = architecture.linears(model)
    names, rest = [x.name for x in linears], [x for x in linears if x.name not in in_stacks]
    by_block = {block: [g for g in groups if g.block == block] for block in dict.fromkeys(g.block for g in groups)}
    del groups, linears  # or float weights of finished blocks would be kept
    clock = Clock()
    if any(plan.timesteps for plan in plans.values()):
        clock.attach(model, architecture.forward.time)
    done, total = 0, sum(plan.weight is not None for plan in plans.values())
    final: dict[str, LayerPlan] = {}
    for group_or_none, linear, hessian in _jobs(model, architecture, by_block, plans, scales, statistics, rest, clock):
        plan = plans[linear.name]
        if plan.weight is None:
            final[plan.name] = plan
            continue
        scale = scales[group_or_none.name] if group_or_none else None
        seen = statistics.groups.get(group_or_none.name) if statistics and group_or_none else None
        if plan.timesteps and group_or_none:
            assert statistics is not None
            layer: nn.Module = _timestep_layer(plan, linear.module, group_or_none, statistics, clock)
        else:
            quantized = None
            if hessian is not None:
                plan, quantized = round_weight(linear.module, plan, scale if plan.smooth else None, hessian)
            layer = QuantizedLinear.from_linear(
                linear.module, plan, smooth_scale=scale if plan.smooth else None,
                input_scale=_static_scale(plan, seen, scale), quantized=quantized,
            )  # fmt: skip
        final[plan.name] = plan.model_copy(
            update={"incoherence": _incoherence(plan, linear.module, scale if plan.smooth else None, seen)}
        )
        replace(model, plan.name, layer)
        del hessian  # before those of the next block come
        done += 1
        if progress:
            progress(done, total)
    wire(model, architecture)
    linear_parameters = sum(plan.parameters for plan in final.values())
    return Plan(
        method=method, recipe=recipe, architecture=architecture.name, seed=seed,
        nominal_weight_bits=nominal[0], nominal_activation_bits=nominal[1],
        layers=tuple(final[name] for name in names), folds=tuple(folds), storage_dtype=storage,
        time_argument=architecture.forward.time, calibration_timesteps=timesteps,
        other_parameters=_count(model, final) - linear_parameters,
    )  # fmt: skip


def _jobs(
    model: nn.Module,
    architecture: Architecture,
    groups: dict[str, list[InputGroup]],
    plans: Mapping[str, LayerPlan],
    scales: Mapping[str, Tensor | None],
    statistics: Statistics | None,
    rest: Sequence[Linear],
    clock: Clock,
) -> Iterator[tuple[InputGroup | None, Linear, InputHessian | None]]:
    """Every linear with its group, if any, and the Hessian of its balanced input where GPTQ rounds it.

    One is to be replaced before the next is asked for: the inputs of a block come from the quantized ones before it.
    Groups of blocks are taken out of ``groups`` when their turn comes.
    """

    def tell(call: Call) -> None:
        clock.now = call_time(architecture, call)

    blocks: Iterable[tuple[str, Hessians]] = ((name, {}) for name in list(groups))
    if any(plan.rounding == "gptq" for plan in plans.values()):
        assert statistics is not None  # _check_statistics has seen to it
        blocks = walk_blocks(model, architecture, groups, plans, scales, statistics.calls, tell)
    for block, hessians in blocks:
        for group in groups.pop(block):
            for linear in group.linears:
                yield group, linear, hessians.get(linear.name)
    for linear in rest:
        yield None, linear, None


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts ``layer`` where ``name`` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _check_names(model: nn.Module, architecture: Architecture, plans: dict[str, LayerPlan]) -> None:
    linears = {linear.name: linear for linear in architecture.linears(model)}
    missing = [name for name in plans if name not in linears]
    if missing:
        raise UsageError(
            f"The plan names layer {missing[0]!r}, which this {type(model).__name__} does not have"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + f". Its layers look like {next(iter(linears))!r}."
        )
    absent = [name for name in linears if name not in plans]
    if absent:
        raise UsageError(f"The plan says nothing about layer {absent[0]!r}; every linear must be in it.")
    for name, plan in plans.items():
        module = linears[name].module
        if (module.in_features, module.out_features) != (plan.in_features, plan.out_features):
            raise UsageError(
                f"The plan says {plan.in_features} -> {plan.out_features} for layer {name!r}, the model has "
                f"{module.in_features} -> {module.out_features}."
            )


def _check_statistics(
    groups: Iterable[InputGroup], plans: dict[str, LayerPlan], statistics: Statistics | None
) -> None:
    """Refuses what cannot be carried out before anything is changed."""
    group_of = {linear.name: group for group in groups for linear in group.linears}
    for name, plan in plans.items():
        group = group_of.get(name)
        needs = "smooths its input" if plan.smooth else "has its own integers per timestep" if plan.timesteps else ""
        if plan.activation is not None and not plan.activation.dynamic:
            needs = "has static activation scales"
        if plan.rounding == "gptq" and (statistics is None or not statistics.calls or group is None):
            raise UsageError(
                f"Layer {name!r} is rounded by GPTQ: "
                + ("calls of the transformer are needed, pass prompts." if group else "its input is not known.")
            )
        if needs and (statistics is None or group is None or group.name not in statistics.groups):
            raise UsageError(f"Layer {name!r} {needs}: calibration of its input is needed, pass prompts.")
        folded = plan.smooth.folded if plan.smooth else None
        if folded is not None and group is not None and folded != group.input.foldable:
            raise UsageError(f"The plan folds into {folded!r}, but {name!r} reads {group.input}.")


def _smooth_of(group: InputGroup, plans: dict[str, LayerPlan]) -> LayerPlan | None:
    """A smoothed layer of the group; the linears of a folded group must agree, as they share one input."""
    smoothed = [plans[x.name] for x in group.linears if plans[x.name].smooth is not None]
    if not smoothed:
        return None
    if len({plan.smooth for plan in smoothed}) > 1:
        raise UsageError(f"Layers that share the input of {group.name!r} must share its smoothing.")
    return smoothed[0]


def _scale(group: InputGroup, plans: dict[str, LayerPlan], statistics: Statistics | None) -> Tensor | None:
    layer = _smooth_of(group, plans)
    if layer is None or layer.smooth is None:
        return None
    assert statistics is not None  # _check_statistics has seen to it
    scale = group_scale(layer.smooth, group, statistics.groups[group.name], statistics.timesteps)
    return scale.to(group.linears[0].module.weight.device)


def _fold(
    model: nn.Module, architecture: Architecture, group: InputGroup, plans: dict[str, LayerPlan], scale: Tensor | None
) -> Fold | None:
    layer = _smooth_of(group, plans)
    if scale is None or layer is None or layer.smooth is None or layer.smooth.folded is None:
        return None
    record = fold(model, architecture, group, scale)
    for linear in group.linears:  # those that stay in 16 bit see the divided input too
        if plans[linear.name].smooth is None:
            linear.module.weight.mul_(scale.to(linear.module.weight.dtype))
    return record


def _static_scale(
    plan: LayerPlan, seen: GroupStatistics | None, scale: Tensor | None, between: tuple[int, int] | None = None
) -> Tensor | None:
    """Scales [1, G] of a static activation format: the largest balanced input seen over its largest code."""
    if plan.activation is None or plan.activation.dynamic:
        return None
    if seen is None:
        raise UsageError(f"Layer {plan.name!r} has static activation scales: calibration is needed, pass prompts.")
    if plan.rotate is None:
        largest = seen.absmax.amax((0, 1)) / (scale.cpu() if scale is not None and plan.smooth else 1.0)
    else:
        x = balanced(seen.rows(between), scale.cpu() if scale is not None else None, plan.rotate, weight=False)
        largest = x.abs().amax(0)
    _, top = plan.activation.code_range
    groups = largest.reshape(1, plan.activation.groups(plan.in_features), -1)  # [1, G, g]
    return groups.amax(-1).clamp_min(1e-12) / top


def _timestep_layer(
    plan: LayerPlan, linear: nn.Linear, group: InputGroup, statistics: Statistics, clock: Clock
) -> TimestepLinear:
    seen = statistics.groups[group.name]
    inner = plan.model_copy(update={"timesteps": None})
    ranges = []
    for between in plan.timesteps or ():
        scale = None
        if plan.smooth:
            scale = group_scale(plan.smooth, group, seen, statistics.timesteps, between).to(linear.weight.device)
        input_scale = _static_scale(inner, seen, scale, between)
        ranges.append(QuantizedLinear.from_linear(linear, inner, smooth_scale=scale, input_scale=input_scale))
    return TimestepLinear(plan, ranges, clock)


def _incoherence(
    plan: LayerPlan, linear: nn.Linear, scale: Tensor | None, seen: GroupStatistics | None
) -> Incoherence:
    w = linear.weight.detach().float()
    values = {
        "weight_before": incoherence(w).mean(),
        "weight_after": incoherence(balanced(w, scale, plan.rotate, weight=True)).mean(),
    }
    if seen is not None:
        x = seen.rows()[:512]
        after = balanced(x, None if scale is None else scale.cpu(), plan.rotate, weight=False)
        values |= {"input_before": incoherence(x).mean(), "input_after": incoherence(after).mean()}
    return Incoherence(**{key: round(float(value), 3) for key, value in values.items()})


def _round_to_storage(model: nn.Module) -> Literal["bfloat16", "float16", "float32"]:
    """Rounds every parameter to the 16-bit type that costs least, so that what is saved equals what runs.

    A pipeline loaded in float32 computes in float32; its unquantized parameters are stored in 16 bit.
    """
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")  # type: ignore[return-value]
    cost = {}
    for candidate in (torch.bfloat16, torch.float16):
        cost[candidate] = sum(float((p - p.to(candidate).float()).square().sum()) for p in model.parameters())
        if not cost[candidate] < float("inf"):
            cost[candidate] = float("inf")
    best = min(cost, key=lambda c: cost[c])
    for p in model.parameters():
        p.copy_(p.to(best).float())
    return "bfloat16" if best is torch.bfloat16 else "float16"


def _count(model: nn.Module, plans: dict[str, LayerPlan]) -> int:
    """Parameters of the model as it was: quantized layers counted by their plans."""
    inside = tuple(f"{name}." for name, plan in plans.items() if plan.weight is not None)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    quantized = [plan for plan in plans.values() if plan.weight is not None]
    return outside + sum(plan.parameters + (plan.out_features if plan.bias else 0) for plan in quantized)
