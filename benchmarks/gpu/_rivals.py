"""Linear layers of other libraries on a GPU: 16 bit, int8 by cuBLAS, fp8 by cuBLAS, torchao."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """``torch._int_mm`` between a quantizer and an epilogue in plain torch; to be compiled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-20) / 127
        codes = (rows.float() / scale).round().to(torch.int8)
        y = torch._int_mm(codes, self.codes.t()).float() * scale * self.scale
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Linear(nn.Module):
    """``torch._scaled_mm`` with scales per row of both sides, the quantizer in plain torch; to be compiled."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 448
        self.register_buffer("codes", (linear.weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-20) / 448
        codes = (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        y = scaled_mm(codes, self.codes, scale, self.scale, x.dtype)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])


def scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=True)


def replaced(model: nn.Module, kind: type[nn.Module], within: str | tuple[str, ...]) -> nn.Module:
    """``model`` with the linears of its blocks, those under ``within`` of a multiple of 16 features, replaced."""
    for name, module in list(model.named_modules()):
        fits = isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
        if fits and name.startswith(within):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, kind(module))
    return model


def torchao_int8(model: nn.Module, within: str | tuple[str, ...]) -> nn.Module:
    """Raises ImportError where torchao is missing."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith(within),
    )
    return model
