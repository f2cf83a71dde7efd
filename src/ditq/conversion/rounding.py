"""Rounds the balanced weight of one layer: by GPTQ if that lowers the output error, else to nearest.

Rounding is independent of the balance: any recipe may set ``rounding: gptq``.
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
    """The plan with GPTQ's gain, and the integers; both are of rounding to nearest if GPTQ gained nothing.

    Args:
        scale: smoothing scale [K] of the plan's smoothing.
        hessian: of the balanced input.
    """
    fmt, settings = plan.weight, plan.gptq or Gptq()
    assert fmt is not None
    weight = balanced(linear.weight.detach(), scale, plan.rotate, weight=True)
    result = gptq(
        weight, hessian.matrix, fmt, clip=plan.clip == "mse", damping=settings.damping, order=settings.order,
        block=settings.block, factor=hessian.factor(settings),
    )  # fmt: skip
    before, after = float(result.nearest.sum()), float(result.error.sum())
    if not after < before:
        reason = "rounded to nearest: GPTQ did not lower the output error on the calibration inputs"
        return plan.model_copy(update={"rounding": "nearest", "gptq": None, "reason": reason}), result.quantized
    gain = round(10 * math.log10(before / max(after, 1e-30)), 2)
    return plan.model_copy(update={"rounding_gain": gain}), result.quantized
