"""Rounds the balanced weight of one layer: by GPTQ where that lowers the output error, else to nearest.

Rounding is independent of how the balance was chosen: any recipe may say ``rounding: gptq``.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ditq.conversion.hessians import InputHessian
from ditq.conversion.scales import balanced
from ditq.numerics import Quantized, gptq
from ditq.plan import Gptq, LayerPlan


def round_weight(
    linear: nn.Linear, plan: LayerPlan, scale: Tensor | None, hessian: InputHessian
) -> tuple[LayerPlan, Quantized]:
    """The integers of a layer, and its plan with what GPTQ gained; or rounded to nearest, where it gained nothing.

    Args:
        scale: smoothing scale [K] of the plan's smoothing, folded or not.
        hessian: of the balanced input.
    """
    fmt, settings = plan.weight, plan.gptq or Gptq()
    assert fmt is not None
    weight = balanced(linear.weight.detach(), scale, plan.rotate, weight=True)
    found = gptq(
        weight, hessian.matrix, fmt, clip=plan.clip == "mse", damping=settings.damping, order=settings.order,
        block=settings.block, factor=hessian.factor(settings),
    )  # fmt: skip
    before, after = float(found.nearest.sum()), float(found.error.sum())
    if not after < before:
        reason = "rounded to nearest: GPTQ did not lower the output error on the calibration inputs"
        return plan.model_copy(update={"rounding": "nearest", "gptq": None, "reason": reason}), found.quantized
    gain = round(10 * math.log10(before / max(after, 1e-30)), 2)
    return plan.model_copy(update={"rounding_gain": gain}), found.quantized
