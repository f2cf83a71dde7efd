"""Shared by the quantizing kernels: rows of floats in registers become codes, scales and sums of codes.

The arithmetic is that of ``ditq.numerics.quantize``, so codes and scales are bitwise equal for equal floats. A group
with NaN or Inf gets the scale NaN (in ``quantize`` NaN or Inf), which the product carries into the whole output row.
An explicit test is needed here, because maxima on a GPU drop NaN.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.numerics import Grid, Quantized, hadamard_matrix, quantize
from ditq.numerics.grid import Granularity

# 1.5 * 2^23: adding this to a number below 2^22 rounds it to an integer, ties to even, in the lowest bits. This costs
# one addition; conversions from float to int run at a quarter of its rate.
_ROUND = tl.constexpr(12582912.0)
_ROUND_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def divide(x, s, reciprocal):
    """``x / s`` rounded as in IEEE 754, for ``reciprocal`` = 1 / s, in three instructions (Markstein, 1990)."""
    q = x * reciprocal
    return tl.fma(tl.fma(-q, s, x), reciprocal, q)


@triton.jit
def nearest(v):
    """``v``, below 2^22, as int32, ties to even."""
    return (v + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS


@triton.jit
def clip(v, low, high):
    return tl.minimum(tl.maximum(v, low), high)


@triton.jit
def grid_of(y, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale, float32 [R, G], and zero point, int32 [R, G], that span ``y`` [R, G, C]."""
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    LEVELS: tl.constexpr = 2**BITS - 1
    if SYMMETRIC:
        largest = tl.max(tl.abs(y), 2)
        scale = tl.maximum(tl.div_rn(largest, TOP * 1.0), _TINY)
        scale = tl.where(largest > 0, scale, 1.0 / TOP)
        zero = tl.zeros_like(scale).to(tl.int32)
    else:
        low = tl.minimum(tl.min(y, 2), 0.0)
        high = tl.maximum(tl.max(y, 2), 0.0)
        scale = tl.maximum(tl.div_rn(high * 0.5 - low * 0.5, LEVELS * 1.0) * 2.0, _TINY)
        scale = tl.where(high > low, scale, 1.0 / LEVELS)
        zero = nearest(clip(tl.div_rn(-low, scale), 0.0, LEVELS * 1.0)) - TOP - 1
    return scale, zero


@triton.jit
def rotate_blocks(y, hadamard_ptr, BLOCK: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """``y`` [R, C] times blockdiag(H, ..., H), H [BLOCK, BLOCK] with entries +-1.

    Two 16-bit products on tensor cores, with the high and the low half of each number: H is exact in 16 bit, and the
    result keeps 16 bits of mantissa. This costs as much as one product in TF32, which keeps 11.
    """
    at = tl.arange(0, BLOCK)
    h = tl.load(hadamard_ptr + at[:, None] * BLOCK + at[None, :])
    y = tl.reshape(y, (R * C // BLOCK, BLOCK))
    high = y.to(h.dtype)
    low = (y - high.to(tl.float32)).to(h.dtype)
    # The order matters: in the opposite one, rows of 12288 spill registers.
    y = tl.dot(high, h, tl.dot(low, h, input_precision="ieee"), input_precision="ieee")
    return tl.reshape(y, (R, C))


@triton.jit
def balance_and_quantize(
    y, rows, columns, start, first_group, kept, K, G,
    smooth_ptr, signs_ptr, hadamard_ptr, given_ptr, given_stride, codes_ptr, scale_ptr, zero_ptr, sums_ptr,
    R: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Stores codes of ``y`` [R, C] / smooth @ Q, their scales, zero points and sums. Missing pointers are None.

    Args:
        y: float32, 0 where not kept.
        rows: int64 [R], the output row of each row; columns: [1, C], counted from ``start`` [R]; kept: [R, C], whether
            an element exists.
        first_group: [R], the group of the first column; a group has GROUP columns.
        given_ptr: static scales of the groups, float32, with stride ``given_stride``.
        zero_ptr: zero points; None if the codes are symmetric.
    """
    if smooth_ptr is not None:
        y = y / tl.load(smooth_ptr + start[:, None] + columns, kept, 1.0)
    if hadamard_ptr is not None:
        y = rotate_blocks(y * tl.load(signs_ptr + start[:, None] + columns, kept, 0.0), hadamard_ptr, BLOCK, R, C)
    y = tl.reshape(y, (R, C // GROUP, GROUP))
    kept = tl.reshape(tl.broadcast_to(kept, (R, C)), (R, C // GROUP, GROUP))
    columns = tl.reshape(tl.broadcast_to(columns, (R, C)), (R, C // GROUP, GROUP))
    groups = first_group[:, None] + tl.arange(0, C // GROUP)[None, :]
    group_kept = tl.max(kept.to(tl.int32), 2) > 0
    if given_ptr is not None:
        scale = tl.load(given_ptr + groups * given_stride, group_kept, 1.0)
        zero = tl.zeros_like(scale).to(tl.int32)
    else:
        scale, zero = grid_of(y, BITS, zero_ptr is None)
    scale += tl.sum(y * 0.0, 2)  # 0, or NaN where a number is not finite
    s = tl.expand_dims(scale, 2)
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    q = nearest(clip(divide(y, s, tl.div_rn(1.0, s)), -256.0, 256.0)) + tl.expand_dims(zero, 2)
    if zero_ptr is None:
        q = clip(q, -TOP, TOP)
    else:
        q = clip(q, -TOP - 1, TOP)
    tl.store(codes_ptr + tl.expand_dims((rows * K + start)[:, None], 2) + columns, q.to(tl.int8), kept)
    at = rows[:, None] * G + groups
    tl.store(scale_ptr + at, scale, group_kept)
    tl.store(sums_ptr + at, tl.sum(tl.where(kept, q, 0), 2), group_kept)
    if zero_ptr is not None:
        tl.store(zero_ptr + at, zero.to(tl.int16), group_kept)


# --------------------------------------------------------------------------------------- around the kernels


Codes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Codes int8 [M, K], scale float32 [M, G], zero point int16 [M, G] (empty if symmetric), sums int32 [M, G]."""

# Codes, and the fields of Target, in the schemas of operations.
CODES = "(Tensor codes, Tensor scale, Tensor zero, Tensor sums)"
TARGET = (
    "Tensor? smooth, Tensor? signs, int block, int bits, bool symmetric, int groups, Tensor? given, bool regular=False"
)


class Target(NamedTuple):
    """How rows x [M, K] are quantized: x / smooth, times Q = diag(signs) blockdiag(H) / sqrt(block), then codes.

    Attributes:
        smooth: float32 [K], or None.
        signs: float32 [K], divided by sqrt(block) already; None without rotation.
        block: the order of H, 16, 32, 64 or 128; 0 without rotation.
        bits: 2 to 8.
        groups: scales per row.
        given: static symmetric scales, float32 [1, 1] or [1, groups]; None for dynamic ones.
        regular: whether H is the regular matrix of its order, see ``ditq.numerics.hadamard``.
    """

    smooth: Tensor | None
    signs: Tensor | None
    block: int
    bits: int
    symmetric: bool
    groups: int
    given: Tensor | None
    regular: bool = False

    def reference(self, x: Tensor) -> Codes:
        """Codes, scale, zero point and sums of x [M, K] in plain torch."""
        y = x.float()
        if self.smooth is not None:
            y = y / self.smooth
        if self.signs is not None:
            matrix = hadamard(self.block, self.regular, x.device, torch.float32)
            y = ((y * self.signs).reshape(-1, self.block) @ matrix).reshape(y.shape)
        size = None if self.groups == 1 else y.shape[1] // self.groups
        granularity: Granularity = "token" if size is None else "group"
        grid = Grid(bits=self.bits, symmetric=self.symmetric, granularity=granularity, group_size=size)
        q = quantize(y, grid, scale=self.given)
        scale = q.scale.expand(len(y), self.groups).contiguous()
        zero = no_zero(x.device) if q.zero_point is None else q.zero_point
        return q.codes, scale, zero, sums_of(q.codes, self.groups)

    def empty(self, rows: int, columns: int, device: torch.device) -> Codes:
        """Empty codes, scale, zero point (without elements if symmetric) and sums, for the kernel to write."""
        return (
            torch.empty(rows, columns, dtype=torch.int8, device=device),
            torch.empty(rows, self.groups, dtype=torch.float32, device=device),
            no_zero(device) if self.symmetric else torch.empty(rows, self.groups, dtype=torch.int16, device=device),
            torch.empty(rows, self.groups, dtype=torch.int32, device=device),
        )

    def arguments(self, out: Codes) -> dict[str, Any]:
        """The arguments of :func:`balance_and_quantize` that all kernels share."""
        codes, scale, zero, sums = out
        # The interpreter multiplies 16-bit matrices incorrectly; its float32 products are exact.
        kind = torch.float32 if INTERPRETED else torch.bfloat16
        return {
            "K": codes.shape[1], "G": self.groups, "smooth_ptr": self.smooth, "signs_ptr": self.signs,
            "hadamard_ptr": None if self.signs is None else hadamard(self.block, self.regular, codes.device, kind),
            "given_ptr": self.given, "given_stride": 0 if self.given is None or self.given.shape[1] == 1 else 1,
            "codes_ptr": codes, "scale_ptr": scale, "zero_ptr": None if self.symmetric else zero, "sums_ptr": sums,
            "BLOCK": self.block, "BITS": self.bits,
        }  # fmt: skip


INTERPRETED: bool = triton.knobs.runtime.interpret


class Rows(NamedTuple):
    """Work of one program: R rows of C columns (a power of two), and its number of warps."""

    R: int
    C: int
    warps: int


def rows_per_program(width: int, block: int) -> Rows:
    """16 to 32 numbers per thread; more rows with a rotation, to spread the cost of loading the Hadamard matrix."""
    c = max(triton.next_power_of_2(width), block, 16)
    elements = max(c, 4096 if block == 0 else 8192)
    # The product with the matrix needs registers, and each of sixteen warps has half as many of them.
    return Rows(elements // c, c, min(16 if block == 0 else 8, max(4, elements // 1024)))


def quantized(out: Codes, grid: Grid) -> Quantized:
    """The result of an operation as a ``Quantized``."""
    codes, scale, zero, sums = out
    return Quantized(codes, scale, zero if zero.ndim == 2 else None, grid, sums)


def no_zero(device: torch.device) -> Tensor:
    """An empty tensor in place of the zero point of symmetric codes: operations cannot return None."""
    return torch.empty(0, dtype=torch.int16, device=device)


def sums_of(codes: Tensor, groups: int) -> Tensor:
    """Sums of the codes [M, K] in each group, int32 [M, groups]."""
    return codes.unflatten(1, (groups, codes.shape[1] // groups)).sum(-1, dtype=torch.int32)


@cache
def hadamard(block: int, regular: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Filled outside of inference mode, like the caches of ditq.numerics.hadamard.
    with torch.inference_mode(False):
        return hadamard_matrix(block, "regular" if regular else "hadamard").to(device, dtype)
