"""The norm before a linear layer, its modulation and the quantizer in one pass.

    norm(x) [* weight + bias] [* factor + shift] -> x / smooth @ Q -> codes

All steps are in float32, so the result is more accurate than with 16-bit steps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.engines.triton.operation import Operation
from ditq.engines.triton.rows import CODES, TARGET, Codes, Target, balance_and_quantize, rows_per_program


@triton.jit(do_not_specialize=["M", "T"])
def norm_kernel(
    x_ptr, x_row, M, weight_ptr, bias_ptr, factor_ptr, shift_ptr, factor_row, shift_row, T, eps, K, G,
    smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
    R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """R rows of all K columns. Row m belongs to sample m // T, which has its own modulation."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)[None, :]
    kept = (row < M)[:, None] & (c < K)
    rows = tl.where(row < M, row, 0).to(tl.int64)
    y = tl.load(x_ptr + (rows * x_row)[:, None] + c, kept, 0.0).to(tl.float32)
    # The mean first: E[x^2] - E[x]^2 cancels if the mean is large.
    y = tl.where(kept, y - (tl.sum(y, 1) / K)[:, None], 0.0)
    y *= (1.0 / tl.sqrt(tl.sum(y * y, 1) / K + eps))[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, c < K, 0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, c < K, 0.0).to(tl.float32)
    if shift_ptr is not None:
        sample = (rows // T)[:, None]
        y *= tl.load(factor_ptr + sample * factor_row + c, c < K, 0.0).to(tl.float32)
        y += tl.load(shift_ptr + sample * shift_row + c, c < K, 0.0).to(tl.float32)
    balance_and_quantize(
        y, rows, c, tl.zeros((R,), tl.int32), tl.zeros((R,), tl.int32), kept, K, G,
        smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
        R, C, GROUP, BLOCK, BITS,
    )  # fmt: skip


def launch(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    factor: Tensor | None, shift: Tensor | None, *target: Any,
) -> Codes:  # fmt: skip
    """The operation by the kernel."""
    to = Target(*target)
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    factor, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (factor, shift))
    out = to.empty(m, k, x.device)
    if x.numel():
        r, c, warps = rows_per_program(k, to.block)
        with torch.cuda.device_of(x):
            norm_kernel[(triton.cdiv(m, r),)](
                x, x.stride(0), m, weight, bias, factor, shift,
                0 if factor is None else factor.stride(0), 0 if shift is None else shift.stride(0),
                1 if shift is None else m // len(shift), eps,
                R=r, C=c, GROUP=c if to.groups == 1 else k // to.groups, **to.arguments(out),
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def reference(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    factor: Tensor | None, shift: Tensor | None, *target: Any,
) -> Codes:  # fmt: skip
    """The operation in plain torch."""
    y = x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    if factor is not None and shift is not None:
        tokens = len(x) // len(shift)
        y = y * factor.float().repeat_interleave(tokens, 0) + shift.float().repeat_interleave(tokens, 0)
    return Target(*target).reference(y)


def empty(
    x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None,
    factor: Tensor | None, shift: Tensor | None, *target: Any,
) -> Codes:  # fmt: skip
    """Shapes and dtypes of the results."""
    return Target(*target).empty(x.shape[0], x.shape[1], x.device)


norm_quantize = Operation(
    "norm_quantize",
    f"(Tensor x, float eps, Tensor? weight, Tensor? bias, Tensor? factor, Tensor? shift, {TARGET}) -> {CODES}",
    launch,
    reference,
    empty,
)
"""Codes of the normed x [M, K], any float dtype.

Args:
    eps: added to the variance.
    weight, bias: [K], of the norm.
    factor, shift: 1 + scale and shift of the modulation, [samples, K] with samples dividing M, both or neither; they
        may be chunks of a wider tensor.
    The other arguments are those of :class:`Target`; the columns of a group are a power of two that the rotation's
        block divides.
"""
