"""Packed weights of 2 to 7 bits -> int8, for formats that the product does not unpack itself.

It reads the packed weight once and writes the int8 weight once, which takes 360 / M of the product's time at M rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.engines.triton.operation import Operation
from ditq.numerics import unpack


@triton.jit
def expand_kernel(
    packed_ptr, zero_ptr, codes_ptr, N, K, WIDTH, GROUP, zero_row,
    BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """codes[n, k] = the k-th code of row n, minus its zero point."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    kept = (n < N)[:, None] & (k < K)[None, :]
    start = k * BITS
    at = packed_ptr + n.to(tl.int64)[:, None] * WIDTH + (start // 8)[None, :]
    # A code may begin in one byte and end in the next.
    spills = (start % 8 + BITS > 8)[None, :]
    word = tl.load(at, kept, 0).to(tl.int32) | (tl.load(at + 1, kept & spills, 0).to(tl.int32) << 8)
    code = ((word >> (start % 8)[None, :]) & (2**BITS - 1)) - 2 ** (BITS - 1)
    if zero_ptr is not None:
        code -= tl.load(zero_ptr + n[:, None] * zero_row + (k // GROUP)[None, :], kept, 0).to(tl.int32)
    tl.store(codes_ptr + n.to(tl.int64)[:, None] * K + k[None, :], code.to(tl.int8), kept)


def launch(packed: Tensor, bits: int, columns: int, zero: Tensor | None) -> Tensor:
    """The operation by the kernel."""
    codes = empty(packed, bits, columns, zero)
    n = len(packed)
    groups = 1 if zero is None else zero.shape[1]
    row = 0 if zero is None or len(zero) == 1 else groups
    bn, bk = 16, 256
    if codes.numel():
        with torch.cuda.device_of(packed):
            expand_kernel[(triton.cdiv(n, bn), triton.cdiv(columns, bk))](
                packed, zero, codes, n, columns, packed.shape[1], columns // groups, row, bits, bn, bk, num_warps=4
            )
    return codes


def reference(packed: Tensor, bits: int, columns: int, zero: Tensor | None) -> Tensor:
    """The operation in plain torch."""
    codes = unpack(packed, bits, columns)
    if zero is not None:
        codes = codes - zero.to(torch.int8).repeat_interleave(columns // zero.shape[1], 1)
    return codes


def empty(packed: Tensor, bits: int, columns: int, zero: Tensor | None) -> Tensor:
    """Shape and dtype of the result."""
    return torch.empty(packed.shape[0], columns, dtype=torch.int8, device=packed.device)


expand = Operation(
    "expand", "(Tensor packed, int bits, int columns, Tensor? zero) -> Tensor", launch, reference, empty
)
"""code - zero, int8 [N, columns], of packed uint8 [N, ceil(columns bits / 8)], bits 2 to 7.

``zero`` is int8 [N, G] or [1, 1]; None: 0. Up to 7 bits the difference fits in 8.
"""
