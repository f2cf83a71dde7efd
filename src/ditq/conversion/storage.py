"""The 16-bit storage type of a converted model's unquantized parameters, and the number of parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from torch import nn

from ditq.plan import LayerPlan


def stays_float32(model: nn.Module, name: str) -> bool:
    """Whether diffusers loads this parameter or module in float32 whatever the model's dtype is."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return bool(set([kept] if isinstance(kept, str) else kept).intersection(name.split(".")))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's float parameters, apart from those that stay in float32."""
    own = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    rest = [dtype for name, dtype in own.items() if not stays_float32(model, name)]
    return Counter(rest or own.values()).most_common(1)[0][0]


def round_to_storage(model: nn.Module) -> Literal["bfloat16", "float16", "float32"]:
    """Rounds every parameter to the 16-bit type with the smaller error, so that the saved model equals this one.

    A pipeline loaded in float32 computes in float32; its unquantized parameters are stored in 16 bit. Parameters that
    diffusers keeps in float32 are not rounded, and become float32 in a 16-bit model, as they will when it is loaded.
    Tensors are replaced, never changed in place, so that a failed quantization can put them back.
    """
    dtype = dtype_of(model)
    rounded = [p for name, p in model.named_parameters() if not stays_float32(model, name)]
    if dtype != torch.float32:
        for name, p in model.named_parameters():
            if p.is_floating_point() and stays_float32(model, name):
                p.data = p.data.float()
        _restore_buffers(model)
        return str(dtype).removeprefix("torch.")  # type: ignore[return-value]
    cost = {}
    for candidate in (torch.bfloat16, torch.float16):
        cost[candidate] = sum(float((p - p.to(candidate).float()).square().sum()) for p in rounded)
        if not cost[candidate] < float("inf"):
            cost[candidate] = float("inf")
    best = min(cost, key=lambda c: cost[c])
    for p in rounded:
        p.data = p.data.to(best).float()
    return "bfloat16" if best is torch.bfloat16 else "float16"


def _restore_buffers(model: nn.Module) -> None:
    """Computes tables that stay in float32 again, if a cast has rounded them: they are not saved, but made anew."""
    cast = [
        (name, buffer.device)
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.itemsize < 4 and stays_float32(model, name)
    ]
    if not cast or not isinstance(model, ConfigMixin):
        return
    with init_empty_weights(include_buffers=False):
        fresh = type(model).from_config(dict(model.config))
    for name, device in cast:
        parent, _, last = name.rpartition(".")
        model.get_submodule(parent)._buffers[last] = fresh.get_buffer(name).to(device)


def count_float32(model: nn.Module, plans: Mapping[str, LayerPlan]) -> int:
    """Number of parameters that are stored in float32, besides weights that the plans quantize.

    Args:
        model: before or after it is quantized.
        plans: of its linears, by name.
    """
    integers = {f"{name}.weight" for name, plan in plans.items() if plan.weight is not None}
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.is_floating_point() and name not in integers and stays_float32(model, name)
    )


def count_parameters(model: nn.Module, plans: Mapping[str, LayerPlan]) -> int:
    """Number of parameters before quantization: quantized layers are counted by their plans."""
    inside = tuple(f"{name}." for name, plan in plans.items() if plan.weight is not None)
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(inside))
    quantized = [plan for plan in plans.values() if plan.weight is not None]
    return outside + sum(plan.parameters + (plan.out_features if plan.bias else 0) for plan in quantized)
