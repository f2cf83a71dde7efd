"""Refuses a plan that does not fit a model, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ditq.architectures import Architecture, InputGroup
from ditq.calibration import Statistics
from ditq.errors import NothingQuantizedError, UsageError
from ditq.plan import LayerPlan


def check(
    model: nn.Module, architecture: Architecture, plans: Mapping[str, LayerPlan], statistics: Statistics | None
) -> None:
    """Raises unless the layer plans can be carried out on ``model`` with these statistics.

    Raises:
        UsageError: a plan names a layer that the model does not have, or that has another size; or statistics that
            it needs are missing; or layers that share an input differ in its smoothing.
        NothingQuantizedError: no layer has integer weights.
    """
    _check_names(model, architecture, plans)
    if not any(plan.weight for plan in plans.values()):
        raise NothingQuantizedError("The plan keeps every layer in 16 bit.")
    for name, plan in plans.items():
        if plan.branch is not None and plan.branch.rank > plan.branch.svd:
            raise UsageError(
                f"Layer {name!r} of the plan has a branch: a LoRA was fused into it, and its numbers are only in the "
                "checkpoint of that plan. Load that checkpoint, or quantize with the plan from before fusing and call "
                "ditq.fuse_lora again."
            )
    groups = architecture.groups(model)
    _check_statistics(groups, plans, statistics)
    for group in groups:
        smoothed_layer(group, plans)


def smoothed_layer(group: InputGroup, plans: Mapping[str, LayerPlan]) -> LayerPlan | None:
    """The first smoothed layer of the group; all have the same smoothing, since they share one input."""
    smoothed = [plans[x.name] for x in group.linears if plans[x.name].smooth is not None]
    if not smoothed:
        return None
    if len({plan.smooth for plan in smoothed}) > 1:
        raise UsageError(f"Layers that share the input of {group.name!r} must have the same smoothing.")
    return smoothed[0]


def _check_names(model: nn.Module, architecture: Architecture, plans: Mapping[str, LayerPlan]) -> None:
    linears = {linear.name: linear for linear in architecture.linears(model)}
    missing = [name for name in plans if name not in linears]
    if missing:
        raise UsageError(
            f"The plan names layer {missing[0]!r}, which this {type(model).__name__} does not have"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + f". Its layer names look like {next(iter(linears))!r}."
        )
    unplanned = [name for name in linears if name not in plans]
    if unplanned:
        raise UsageError(f"The plan does not contain layer {unplanned[0]!r}; it must contain every linear.")
    for name, plan in plans.items():
        module = linears[name].module
        if (module.in_features, module.out_features) != (plan.in_features, plan.out_features):
            raise UsageError(
                f"The plan has {plan.in_features} -> {plan.out_features} for layer {name!r}, the model has "
                f"{module.in_features} -> {module.out_features}."
            )


def _check_statistics(
    groups: Iterable[InputGroup], plans: Mapping[str, LayerPlan], statistics: Statistics | None
) -> None:
    """Raises if statistics that a layer needs are missing."""
    group_of = {linear.name: group for group in groups for linear in group.linears}
    for name, plan in plans.items():
        group = group_of.get(name)
        reason = "smooths its input" if plan.smooth else ""
        if plan.activation is not None and not plan.activation.dynamic:
            reason = "has static activation scales"
        if plan.rounding == "gptq" and (statistics is None or not statistics.calls or group is None):
            raise UsageError(
                f"Layer {name!r} is rounded by GPTQ: "
                + ("calls of the transformer are needed, pass prompts." if group else "its input is not known.")
            )
        if plan.branch is not None and plan.branch.iterations and group is not None:
            reason = "refines its branch on its inputs"  # without known inputs, on its weight
        if reason and (statistics is None or group is None or group.name not in statistics.groups):
            raise UsageError(f"Layer {name!r} {reason}: calibration of its input is needed, pass prompts.")
