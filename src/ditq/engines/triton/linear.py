"""Rescaled products of integers: the linear layer after the quantizer. One kernel serves all formats.

    y[m, n] = sum over groups g of  sx[m, g] sw[n, g] (sum_k (x - zx)(w - zw))  + bias[n]

x: int8 codes per token, tensor or group, symmetric or not. w: codes of 8 or 4 bits as packed in checkpoints, which the
kernel unpacks, or int8. Optional epilogues: + low[m] . up[n], a low-rank branch in 16 bit, before the bias; and
residual[m, n] + gate[sample of m, n] * y[m, n].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditq.engines.torch.engine import MAX_COLUMNS, grouped_products
from ditq.engines.triton.expand import expand
from ditq.engines.triton.operation import Operation
from ditq.engines.triton.rows import sums_of
from ditq.engines.triton.tiles import ARCHITECTURES, Tile, Work, tile_for
from ditq.engines.triton.tuning import best_tile
from ditq.numerics import Grid, Quantized, unpack


@triton.jit(do_not_specialize=["M", "T"])
def linear_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K,
    x_scale_ptr, x_zero_ptr, x_scale_row, x_sum_ptr, w_scale_ptr, w_zero_ptr, w_scale_row,
    bias_ptr, gate_ptr, gate_row, T, residual_ptr, low_ptr, up_ptr, RANK,
    BITS: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    X_EACH: tl.constexpr, W_EACH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, ONE_SAMPLE: tl.constexpr,
):  # fmt: skip
    """A tile of y. The weight is the left operand, [BN, BK] @ [BK, BM]: this operand may come from registers, where it
    is unpacked, and does not have to return to shared memory.

    Args:
        BITS: 8 or 4, packed; 0 for int8.
        PARTS: runs of input features with one pair of scales each; a group of x has X_EACH of them, one of w W_EACH.
        STEP: features of a part; 0 for all K, so that layers of any K share a program. EVEN: BK divides them.
        gate_row, T: stride of the gate between samples, and tokens per sample; ONE_SAMPLE: no tile spans two samples.
        RANK, BR: columns of low and up, and the next power of two from 16 on.
    """
    # Bands of eight rows of tiles, so that their operands stay in the L2 cache.
    tiles_n = tl.cdiv(N, BN)
    band = tl.program_id(0) // (8 * tiles_n)
    height = min(tl.cdiv(M, BM) - band * 8, 8)
    place = tl.program_id(0) % (8 * tiles_n)
    m = (band * 8 + place % height) * BM + tl.arange(0, BM)
    n = (place // height) * BN + tl.arange(0, BN)
    # Rows beyond the end read the first row and are not stored.
    mm = tl.where(m < M, m, 0)
    nn = tl.where(n < N, n, 0)
    k = tl.arange(0, BK)
    CODES_PER_BYTE: tl.constexpr = 2 if BITS == 4 else 1
    OFFSET: tl.constexpr = 8 if BITS == 4 else 0  # nibbles are unsigned
    if PARTS == 1:
        step = K
    else:
        step = STEP
    chunks = tl.cdiv(step, BK)
    b = tl.arange(0, BK // CODES_PER_BYTE)
    width = (K + CODES_PER_BYTE - 1) // CODES_PER_BYTE
    x_rows = x_ptr + mm.to(tl.int64)[:, None] * K
    w_rows = w_ptr + nn.to(tl.int64)[:, None] * width

    acc = tl.zeros((BN, BM), tl.int32)
    total = tl.zeros((BN, BM), tl.float32)
    w_sum = tl.zeros((BN,), tl.int32)
    for chunk in range(0, PARTS * chunks):
        if PARTS == 1:
            part = 0
            done = chunk * BK
        else:
            part = chunk // chunks
            done = (chunk % chunks) * BK
        start = part * step + done
        x_at = x_rows + (start + k)[None, :]
        w_at = w_rows + (start // CODES_PER_BYTE + b)[None, :]
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, (k < step - done)[None, :], 0)
            w = tl.load(w_at, (b * CODES_PER_BYTE < step - done)[None, :], 0)
        if BITS == 8:
            w = w ^ -128
        if BITS == 4:
            w = tl.reshape(tl.join(w & 15, (w >> 4) & 15), (BN, BK))
        if x_zero_ptr is not None:
            if not EVEN:
                w = tl.where((k < step - done)[None, :], w, 0)
            w_sum += tl.sum(w.to(tl.int32), 1)
        acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
        if PARTS > 1:
            # A part may have several chunks: its zero points are subtracted with the last one.
            last = done + BK >= step
            acc = subtract_zeros(
                acc, w_sum, x_zero_ptr, mm * x_scale_row + part // X_EACH, x_sum_ptr, mm * PARTS + part,
                w_zero_ptr, nn * w_scale_row + part // W_EACH, OFFSET, step, last,
            )  # fmt: skip
            sx = tl.load(x_scale_ptr + mm * x_scale_row + part // X_EACH)
            sw = tl.load(w_scale_ptr + nn * w_scale_row + part // W_EACH)
            total += acc.to(tl.float32) * sx[None, :] * sw[:, None]
            acc = tl.zeros((BN, BM), tl.int32)
            w_sum = tl.where(last, 0, w_sum)
    if PARTS == 1:
        acc = subtract_zeros(
            acc, w_sum, x_zero_ptr, mm * x_scale_row, x_sum_ptr, mm, w_zero_ptr, nn * w_scale_row, OFFSET, step, True
        )
        sx = tl.load(x_scale_ptr + mm * x_scale_row)
        sw = tl.load(w_scale_ptr + nn * w_scale_row)
        total = acc.to(tl.float32) * sx[None, :] * sw[:, None]
    if low_ptr is not None:
        r = tl.arange(0, BR)
        low = tl.load(low_ptr + mm.to(tl.int64)[:, None] * RANK + r[None, :], (r < RANK)[None, :], 0.0)
        up = tl.load(up_ptr + nn[:, None] * RANK + r[None, :], (r < RANK)[None, :], 0.0)
        total = tl.dot(up, low.T, total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + nn).to(tl.float32)[:, None]
    kept = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if gate_ptr is not None:
        if ONE_SAMPLE:
            sample = ((band * 8 + place % height) * BM) // T
            total *= tl.load(gate_ptr + sample * gate_row + nn).to(tl.float32)[:, None]
        else:
            total *= tl.load(gate_ptr + (mm // T)[None, :] * gate_row + nn[:, None]).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, kept, 0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), kept)


@triton.jit
def subtract_zeros(
    acc, w_sum, x_zero_ptr, x_zero_at, x_sum_ptr, x_sum_at, w_zero_ptr, w_zero_at,
    OFFSET: tl.constexpr, step, here,
):  # fmt: skip
    """sum_k (x - zx)(w - zw) = acc - zw (sum x - K zx) - zx sum w, all in int32; no change unless ``here``."""
    if x_zero_ptr is not None:
        x_zero = tl.load(x_zero_ptr + x_zero_at).to(tl.int32)
        acc -= tl.where(here, x_zero, 0)[None, :] * w_sum[:, None]
    if w_zero_ptr is not None or OFFSET > 0:
        x_sum = tl.load(x_sum_ptr + x_sum_at)
        if x_zero_ptr is not None:
            x_sum -= step * x_zero
        x_sum = tl.where(here, x_sum, 0)
        if w_zero_ptr is not None:
            acc -= x_sum[None, :] * (tl.load(w_zero_ptr + w_zero_at).to(tl.int32) + OFFSET)[:, None]
        else:
            acc -= (x_sum * OFFSET)[None, :]
    return acc


class Arguments(NamedTuple):
    """The arguments of the operation.

    Attributes:
        x: int8 [M, K].
        x_scale: float32 [M, G], [1, G] or [1, 1]; x_zero: int16 likewise, or None.
        x_sum: int32 [M, G], the sums of the codes; None: computed if needed.
        weight: uint8 [N, ceil(K bits / 8)], packed, or int8 [N, K].
        w_scale: float32 [N, H] or [1, 1]; w_zero: int8 likewise, or None.
        bias: [N], any float dtype, like the following tensors.
        gate: [samples, N], samples dividing M; may be a chunk of a wider tensor.
        residual: [M, N].
        low, up: [M, R] and [N, R], both or neither, of one dtype.
    """

    x: Tensor
    x_scale: Tensor
    x_zero: Tensor | None
    x_sum: Tensor | None
    weight: Tensor
    bits: int
    w_scale: Tensor
    w_zero: Tensor | None
    bias: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    low: Tensor | None
    up: Tensor | None
    dtype: torch.dtype


SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor? x_zero, Tensor? x_sum, Tensor weight, int bits, Tensor w_scale,"
    " Tensor? w_zero, Tensor? bias, Tensor? gate, Tensor? residual, Tensor? low, Tensor? up, ScalarType dtype)"
    " -> Tensor"
)


def launch(*arguments: Any, tile: Tile | None = None) -> Tensor:
    """The operation by the kernel; ``tile`` overrides the table.

    Raises:
        ValueError: K is so large that an int32 sum could overflow, or one of low and up is missing.
    """
    a = Arguments(*arguments)
    x, weight, w_zero, x_sum = a.x.contiguous(), a.weight, a.w_zero, a.x_sum
    (m, k), n = x.shape, len(weight)
    x_groups, w_groups = a.x_scale.shape[1], a.w_scale.shape[1]
    parts = math.lcm(x_groups, w_groups)
    step = k // parts
    if step > MAX_COLUMNS:
        raise ValueError(f"in_features must be at most {MAX_COLUMNS} for int32 accumulation, got {step}")
    if (a.low is None) != (a.up is None):
        raise ValueError("low and up must be passed together: pass both or neither")
    y = torch.empty(m, n, dtype=a.dtype, device=x.device)
    if not y.numel():
        return y
    if weight.dtype == torch.uint8 and not unpacks(a.bits, parts, step):
        weight, w_zero = expand(weight, a.bits, k, w_zero), None
    packed = 0 if weight.dtype == torch.int8 else a.bits
    if (w_zero is not None or packed == 4) and (x_sum is None or x_sum.shape[1] != parts):
        x_sum = sums_of(x, parts)
    gate, residual = a.gate, None if a.residual is None else a.residual.contiguous()
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    tokens = 1 if gate is None else m // len(gate)
    low, up = (None if t is None else t.contiguous() for t in (a.low, a.up))
    rank = 0 if low is None else low.shape[1]
    if tile is None:
        capability, work = capability_of(x.device), _work(a, packed, tokens)
        if parts == 1:
            tile = best_tile(m, n, k, packed, capability, work)
        else:
            tile = tile_for(m, n, capability, step, work)
    with torch.cuda.device_of(x):
        linear_kernel[(triton.cdiv(m, tile.BM) * triton.cdiv(n, tile.BN),)](
            x, weight.view(torch.int8), y, m, n, k,
            a.x_scale, a.x_zero, 0 if len(a.x_scale) == 1 else x_groups, x_sum,
            a.w_scale, w_zero, 0 if len(a.w_scale) == 1 else w_groups,
            a.bias, gate, 0 if gate is None else gate.stride(0), tokens, residual, low, up, rank,
            packed, parts, 0 if parts == 1 else step, step % tile.BK == 0, parts // x_groups, parts // w_groups,
            tile.BM, tile.BN, tile.BK,
            max(16, triton.next_power_of_2(rank)), tokens % tile.BM == 0,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _work(a: Arguments, packed: int, tokens: int) -> Work:
    """The register use of the work besides products, for ``tokens`` per sample and weights of ``packed`` bits."""
    if a.x_zero is not None or (a.gate is not None and tokens % 128):
        return "most"
    plain = a.gate is None and a.residual is None and a.low is None and packed != 4
    return "plain" if plain else "more"


def unpacks(bits: int, parts: int, step: int) -> bool:
    """Whether the kernel unpacks weights of this width itself: every part must start at a whole byte."""
    return bits == 8 or (bits == 4 and (parts == 1 or step % 2 == 0))


def reference(*arguments: Any) -> Tensor:
    """The operation in plain torch."""
    a = Arguments(*arguments)
    codes = a.weight if a.weight.dtype == torch.int8 else unpack(a.weight, a.bits, a.x.shape[1])
    x = Quantized(a.x, a.x_scale, a.x_zero, Grid(bits=8, granularity="token"))  # the scales may be per group
    y = grouped_products(x, codes, a.w_scale, a.w_zero, a.bias)
    if a.low is not None and a.up is not None:
        y = y + a.low.float() @ a.up.float().T
    if a.gate is not None:
        y = a.gate.float().repeat_interleave(len(y) // len(a.gate), 0) * y
    if a.residual is not None:
        y = a.residual.float() + y
    return y.to(a.dtype)


def empty(*arguments: Any) -> Tensor:
    """Shape and dtype of the result."""
    a = Arguments(*arguments)
    return torch.empty(a.x.shape[0], a.weight.shape[0], dtype=a.dtype, device=a.x.device)


def capability_of(device: torch.device) -> int:
    """The compute capability of a GPU, 90 for 9.0; the interpreter counts as the oldest one."""
    if device.type == "cpu":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


int8_linear = Operation("int8_linear", SCHEMA, launch, reference, empty)
"""The linear layer on codes, [M, N] in ``dtype``; see :class:`Arguments`."""
