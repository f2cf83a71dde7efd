"""Output error of the balanced and quantized linears of an input group, on calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.architectures import InputGroup
from ditq.conversion.branch import split
from ditq.conversion.scales import balanced
from ditq.numerics import Grid, fake_quantize
from ditq.plan import LayerPlan, Rotate

# The search uses at most this many rows: its cost grows with candidates x layers x rows.
SEARCH_ROWS = 512


def _rounded(x: Tensor, grid: Grid | None) -> Tensor:
    return x if grid is None else fake_quantize(x, grid)


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

    A layer with a branch adds the branch's output, and rounds what it leaves of W'.

    ``exact`` caches X W^T of each layer between calls with the same ``x``.
    """
    exact = {} if exact is None else exact
    plans = {layer.name: layer for layer in layers}
    inputs = balanced(x, scale, rotate_plan, weight=False)
    rounded_inputs: dict[Grid | None, Tensor] = {}
    total = 0.0
    for linear in group.linears:
        plan = plans.get(linear.name)
        if plan is None:
            continue
        w = linear.module.weight.detach().float()
        if plan.activation not in rounded_inputs:
            rounded_inputs[plan.activation] = _rounded(inputs, plan.activation)
        if linear.name not in exact:
            exact[linear.name] = x @ w.T
        y = exact[linear.name]
        target, weight = y, balanced(w, scale, rotate_plan, weight=True)
        if plan.branch is not None:
            weight = split(weight, plan.branch, scale, rotate_plan).residual
            target = inputs @ weight.T  # the branch's output is exact
        approximate = rounded_inputs[plan.activation] @ _rounded(weight, plan.weight).T
        total += float(
            torch.dist(target, approximate).square() / torch.linalg.vector_norm(y).square().clamp_min(1e-30)
        )
    return total / len(plans)
