"""The nonlinearity before a linear layer and the quantizer in one pass: GELU, SiLU, and their gated forms.

f(x), or value * f(gate) for x = [value, gate], then / smooth @ Q -> codes
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ditq.engines.triton.operation import Operation
from ditq.engines.triton.rows import CODES, TARGET, Codes, Target, balance_and_quantize, rows_per_program

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@triton.jit
def nonlinear(x, NAME: tl.constexpr):
    if NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit(do_not_specialize=["M"])
def activation_kernel(
    x_ptr, gate_ptr, x_row, M, K, G,
    smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
    NAME: tl.constexpr, R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """R rows of all K columns; the gates, if any, have the row stride ``x_row`` too."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)[None, :]
    kept = (row < M)[:, None] & (c < K)
    rows = tl.where(row < M, row, 0).to(tl.int64)
    at = (rows * x_row)[:, None] + c
    y = tl.load(x_ptr + at, kept, 0.0).to(tl.float32)
    if gate_ptr is None:
        y = nonlinear(y, NAME)
    else:
        y *= nonlinear(tl.load(gate_ptr + at, kept, 0.0).to(tl.float32), NAME)
    balance_and_quantize(
        y, rows, c, tl.zeros((R,), tl.int32), tl.zeros((R,), tl.int32), kept, K, G,
        smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
        R, C, GROUP, BLOCK, BITS,
    )  # fmt: skip


def launch(x: Tensor, function: str, gated: bool, *target: Any) -> Codes:
    """The operation by the kernel."""
    to = Target(*target)
    x = x if x.stride(1) == 1 else x.contiguous()
    value, gate = halves(x, gated)
    m, k = value.shape
    out = to.empty(m, k, x.device)
    if x.numel():
        r, c, warps = rows_per_program(k, to.block)
        with torch.cuda.device_of(x):
            activation_kernel[(triton.cdiv(m, r),)](
                value, gate, x.stride(0), m,
                NAME=function, R=r, C=c, GROUP=c if to.groups == 1 else k // to.groups, **to.arguments(out),
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def halves(x: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    """The values and the gates among the columns of x."""
    if not gated:
        return x, None
    value, gate = x.chunk(2, dim=1)
    return value, gate


def reference(x: Tensor, function: str, gated: bool, *target: Any) -> Codes:
    """The operation in plain torch."""
    value, gate = halves(x.float(), gated)
    f = FUNCTIONS[function]
    return Target(*target).reference(f(value) if gate is None else value * f(gate))


def empty(x: Tensor, function: str, gated: bool, *target: Any) -> Codes:
    """Shapes and dtypes of the results."""
    return Target(*target).empty(x.shape[0], x.shape[1] // (2 if gated else 1), x.device)


activation_quantize = Operation(
    "activation_quantize", f"(Tensor x, str function, bool gated, {TARGET}) -> {CODES}", launch, reference, empty
)
"""Codes of f(x) for x [M, K], or of value * f(gate) for x [M, 2 K], any float dtype.

Args:
    function: "gelu" (the exact one), "gelu_tanh" or "silu".
    gated: whether the second half of the columns is a gate, as in GEGLU and SwiGLU of diffusers.
    The other arguments are those of :class:`Target`; the columns of a group are a power of two that the rotation's
        block divides.
"""
