"""The 16-bit storage type of a converted model's unquantized parameters, and the number of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from ditq.plan import LayerPlan


def round_to_storage(model: nn.Module) -> Literal["bfloat16", "float16", "float32"]:
    """Rounds every parameter to the 16-bit type with the smaller error, so that the saved model equals this one.

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


def count_parameters(model: nn.Module, plans: Mapping[str, LayerPlan]) -> int:
    """Number of parameters before quantization: quantized layers are counted by their plans."""
    inside = tuple(f"{name}." for name, plan in plans.items() if plan.weight is not None)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    quantized = [plan for plan in plans.values() if plan.weight is not None]
    return outside + sum(plan.parameters + (plan.out_features if plan.bias else 0) for plan in quantized)
