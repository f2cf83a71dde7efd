"""Plain quantization: x / smooth @ Q -> int8 codes, scales, zero points and sums of codes, per token or per group.

It moves 3 bytes of memory per element; eager torch moves about 20.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.engines.triton.operation import Operation
from ditq.engines.triton.rows import CODES, TARGET, Codes, Target, balance_and_quantize, rows_per_program


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(
    x_ptr, x_row, M, WIDTH, K, G,
    smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A group is a row of its own: M = tokens * G rows of WIDTH columns."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, C)[None, :]
    kept = (row < M)[:, None] & (c < WIDTH)
    row = tl.where(row < M, row, 0)
    token = (row // G).to(tl.int64)
    group = row % G
    start = group * WIDTH
    y = tl.load(x_ptr + (token * x_row + start)[:, None] + c, kept, 0.0).to(tl.float32)
    balance_and_quantize(
        y, token, c, start, group, kept, K, G,
        smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
        R, C, C, BLOCK, BITS,
    )  # fmt: skip


def launch(x: Tensor, *target: Any) -> Codes:
    """The operation by the kernel."""
    to = Target(*target)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = to.empty(x.shape[0], x.shape[1], x.device)
    if x.numel():
        width, m = x.shape[1] // to.groups, len(x) * to.groups
        r, c, warps = rows_per_program(width, to.block)
        with torch.cuda.device_of(x):
            quantize_kernel[(triton.cdiv(m, r),)](
                x, x.stride(0), m, width, R=r, C=c, **to.arguments(out), num_warps=warps, enable_fp_fusion=True
            )
    return out


def reference(x: Tensor, *target: Any) -> Codes:
    """The operation in plain torch."""
    return Target(*target).reference(x)


def empty(x: Tensor, *target: Any) -> Codes:
    """Shapes and dtypes of the results."""
    return Target(*target).empty(x.shape[0], x.shape[1], x.device)


quantize_rows = Operation("quantize_rows", f"(Tensor x, {TARGET}) -> {CODES}", launch, reference, empty)
"""Codes of x [M, K], any float dtype; the other arguments are those of :class:`Target`.

With a rotation, its block divides the K / groups columns of a group.
"""
