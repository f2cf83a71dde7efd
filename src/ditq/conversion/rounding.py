"""Rounds the balanced weight of one layer: by GPTQ if that lowers the output error, else to nearest.

Rounding is independent of the balance: any recipe may set ``rounding: gptq``.
"""

from __future__ import annotations

import math

from torch import Tensor

from ditq.conversion.hessians import InputHessian
from ditq.numerics import Quantized, gptq
from ditq.plan import Gptq, LayerPlan


def round_weight(weight: Tensor, plan: LayerPlan, hessian: InputHessian) -> tuple[LayerPlan, Quantized]:
    """The plan with GPTQ's gain, and the integers; both are of rounding to nearest if GPTQ gained nothing.

    Args:
        weight: balanced, or the residual of its branch, float32 [N, K].
        hessian: of the balanced input.
    """
    fmt, settings = plan.weight, plan.gptq or Gptq()
    assert fmt is not None
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
