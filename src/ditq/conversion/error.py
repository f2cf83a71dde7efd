"""Smoothing scales of an input group, and the output error of its balanced and quantized linears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.numerics import Grid, Rotation, fake_quantize, rotate, salience_weights, smoothing_scale
from ditq.plan import LayerPlan, Rotate, Smooth

# The search looks at this many rows at most: its cost grows with candidates x layers x rows.
SEARCH_ROWS = 512


def group_scale(
    smooth: Smooth,
    group: InputGroup,
    seen: GroupStatistics,
    timesteps: Tensor,
    between: tuple[int, int] | None = None,
) -> Tensor:
    """The smoothing scale s, float32 [K], that all linears of a group share."""
    of_each = torch.stack([linear.module.weight.detach().float().abs().amax(0).cpu() for linear in group.linears])
    weights, inputs = of_each.amax(0), seen.timestep_absmax(timesteps, between)
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
        x = rotate(x, Rotation(x.shape[-1], rotate_plan.block, rotate_plan.seed))
    return x


def _rounded(x: Tensor, fmt: Grid | None) -> Tensor:
    if fmt is None:
        return x
    return fake_quantize(x, fmt)


@torch.no_grad()
def output_error(
    x: Tensor,
    group: InputGroup,
    layers: Sequence[LayerPlan],
    scale: Tensor | None,
    rotate_plan: Rotate | None,
    exact: dict[str, Tensor] | None = None,
) -> float:
    """Mean over the layers of ||X W^T - Q(X') Q(W')^T||^2 / ||X W^T||^2, for inputs ``x`` [R, K].

    ``exact`` keeps X W^T of each layer between calls with the same ``x``.
    """
    exact = {} if exact is None else exact
    plans = {layer.name: layer for layer in layers}
    inputs = balanced(x, scale, rotate_plan, weight=False)
    rounded: dict[Grid | None, Tensor] = {}
    total = 0.0
    for linear in group.linears:
        plan = plans.get(linear.name)
        if plan is None:
            continue
        w = linear.module.weight.detach().float()
        if plan.activation not in rounded:
            rounded[plan.activation] = _rounded(inputs, plan.activation)
        if linear.name not in exact:
            exact[linear.name] = x @ w.T
        y = exact[linear.name]
        approximate = rounded[plan.activation] @ _rounded(balanced(w, scale, rotate_plan, weight=True), plan.weight).T
        total += float(torch.dist(y, approximate).square() / torch.linalg.vector_norm(y).square().clamp_min(1e-30))
    return total / len(plans)
