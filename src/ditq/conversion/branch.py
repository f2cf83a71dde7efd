"""The low-rank branch of a layer, from the singular values of its balanced weight.

SVDQuant (Li et al., ICLR 2025, arXiv 2411.05007): smoothing moves the outliers of the inputs into the weight, and a
16-bit branch of low rank takes the weight's largest singular values, so that a smaller residual is rounded. With the
balanced weight W' = W diag(s) R and input x' = x / s R,

    x W^T  =  x' W'^T  ~  x D^T U^T + Q(x') Q(W' - U V)^T,   D = V R^T diag(1/s)

The branch reads the layer's input before it is balanced, as that of a fused LoRA does. Both can share one branch. The
residual is that of the *stored* factors, so the rounding to integers compensates their rounding to 16 bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditq.conversion.scales import balanced
from ditq.layers.quantized_linear import nearest
from ditq.numerics import dequantize, fake_quantize, low_rank, unrotate
from ditq.plan import Branch, LayerPlan, Rotate


class Split(NamedTuple):
    """A weight as a branch and what it leaves to the integers.

    Attributes:
        down, up: D [r, K] and U [N, r] as stored.
        residual: W' - U V, float32 [N, K].
    """

    down: Tensor
    up: Tensor
    residual: Tensor


def split(
    weight: Tensor, branch: Branch, scale: Tensor | None, rotate: Rotate | None, target: Tensor | None = None
) -> Split:
    """The branch of the largest singular values of ``target``, and the residual of ``weight``.

    Args:
        weight: balanced, float32 [N, K].
        scale: smoothing scale [K]; None without smoothing.
        target: what the branch approximates, [N, K]; the weight by default.
    """
    up, down = low_rank(weight if target is None else target, branch.svd)
    if rotate is not None:
        down = unrotate(down, rotate.rotation(down.shape[1]))
    if scale is not None:
        down = down / scale.to(down.device)
    stored = getattr(torch, branch.dtype)
    down, up = down.to(stored), up.to(stored)
    return Split(down, up, weight - up.float() @ balanced(down, scale, rotate, weight=True))


def refined(
    weight: Tensor, plan: LayerPlan, scale: Tensor | None, rows: Tensor | None, input_scale: Tensor | None
) -> Split:
    """The branch of ``weight`` after up to ``plan.branch.iterations`` refinements, the one with the smallest error.

    Each refinement approximates what the integers of the one before it left, W' - Q(W' - U V). The first one that does
    not lower the error of the layer's output ends the loop, as published. The integers are rounded to nearest here,
    whatever the plan's rounding.

    Args:
        weight: balanced, float32 [N, K].
        rows: calibration inputs [R, K], not balanced; None: the error is that of the weight.
        input_scale: of static activations.
    """
    branch = plan.branch
    assert branch is not None
    best = split(weight, branch, scale, plan.rotate)
    if not branch.iterations:
        return best
    exact = None if rows is None else balanced(rows, scale, plan.rotate, weight=False)
    inputs = exact
    if exact is not None and plan.activation is not None:
        inputs = fake_quantize(exact, plan.activation, scale=input_scale)

    def measured(residual: Tensor) -> tuple[float, Tensor]:
        """The squared error of a residual's integers, and their values."""
        values = dequantize(nearest(residual, plan))
        if exact is None or inputs is None:
            return float(torch.dist(residual, values)), values
        return float(torch.dist(exact @ residual.T, inputs @ values.T)), values

    smallest, values = measured(best.residual)
    for _ in range(branch.iterations):
        candidate = split(weight, branch, scale, plan.rotate, target=weight - values)
        error, values = measured(candidate.residual)
        if not error < smallest:
            break
        best, smallest = candidate, error
    return best
