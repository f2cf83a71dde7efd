"""Scales from calibration: of smoothing, shared by a group of linears, and of static activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.errors import UsageError
from ditq.numerics import rotate, salience_weights, smoothing_scale
from ditq.plan import LayerPlan, Rotate, Smooth


def group_scale(
    smooth: Smooth,
    group: InputGroup,
    statistics: GroupStatistics,
    timesteps: Tensor,
    between: tuple[float, float] | None = None,
) -> Tensor:
    """The smoothing scale s, float32 [K], that all linears of a group share."""
    per_linear = torch.stack([linear.module.weight.detach().float().abs().amax(0).cpu() for linear in group.linears])
    weights, inputs = per_linear.amax(0), statistics.timestep_absmax(timesteps, between)
    if smooth.salience == "spearman":
        salience = salience_weights(inputs, weights) @ inputs.double()
    else:
        salience = inputs.amax(0)
    return smoothing_scale(salience, weights, smooth.alpha, power_of_two=smooth.power_of_two)


def balanced(x: Tensor, scale: Tensor | None, rotate_plan: Rotate | None, *, weight: bool) -> Tensor:
    """A weight (columns times s) or an input (channels over s), then rotated, float32."""
    x = x.float()
    if scale is not None:
        scale = scale.to(x.device)
        x = x * scale if weight else x / scale
    if rotate_plan is not None:
        x = rotate(x, rotate_plan.rotation(x.shape[-1]))
    return x


def static_scale(
    plan: LayerPlan,
    statistics: GroupStatistics | None,
    scale: Tensor | None,
    between: tuple[float, float] | None = None,
) -> Tensor | None:
    """Scales [1, G] of a static activation grid: the largest balanced calibration input over the largest code.

    Args:
        scale: smoothing scale [K] of the group, or None.
        between: a range of timesteps, [first, last]; None: all.

    Returns:
        None for a dynamic grid, and for activations in 16 bit.
    """
    grid = plan.activation
    if grid is None or grid.dynamic:
        return None
    if statistics is None:
        raise UsageError(f"Layer {plan.name!r} has static activation scales: calibration is needed, pass prompts.")
    if plan.rotate is None:
        largest = statistics.absmax.amax((0, 1)) / (scale.cpu() if scale is not None and plan.smooth else 1.0)
    else:
        x = balanced(statistics.rows(between), scale.cpu() if scale is not None else None, plan.rotate, weight=False)
        largest = x.abs().amax(0)
    _, top = grid.code_range
    groups = largest.reshape(1, grid.groups(plan.in_features), -1)  # [1, G, g]
    return groups.amax(-1).clamp_min(1e-12) / top
