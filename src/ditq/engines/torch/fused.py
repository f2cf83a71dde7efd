"""What surrounds the integer product: codes of the activations before, rescaling after, unpacked weights beside.

Each is a handful of passes over memory. On a CPU they run chunk by chunk, so that all but the first find their
numbers in the cache, and in place, since fresh memory costs as much as the arithmetic. ``torch.compile`` of a
whole model fuses the passes itself; it sees one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.numerics import Quantized, code_range, unpack

# Half of the 1 MiB or more of L2 cache that a core usually has.
_CHUNK_BYTES = 2**19


def quantize_tokens(x: Tensor, bits: int) -> Quantized:
    """Symmetric codes per token of x [M, K]: equal bit by bit to ``numerics.quantize``, and faster."""
    top = code_range(bits, True)[1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), 1, device=x.device)
    for x_rows, codes_rows, scale_rows in _chunks(x, codes, scale):
        s = _token_scale(x_rows, top)
        scale_rows.copy_(s)
        # No clamp: |x| / (max|x| / top) never rounds to more than top.
        codes_rows.copy_((x_rows / s).round_())
    return Quantized(codes, scale, None)


def _token_scale(x: Tensor, top: int) -> Tensor:
    # Two reductions beat abs() or an infinity norm by a factor of four on a CPU.
    largest = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
    # A row of zeros (padding) has no range: any positive scale will do, its codes are zero.
    return torch.where(largest > 0, (largest / top).clamp_min_(torch.finfo(torch.float32).tiny), 1.0 / top)


def weight_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The integers of a weight, int8 [N, K], and the zero points, int8 [N, G], that are still to be subtracted.

    Up to 7 bits, code - zero_point fits in int8: the integer product then needs no correction.
    """
    bits, zero = weight.format.bits, weight.zero_point
    codes = unpack(weight.packed, bits, weight.columns)
    if zero is None or bits == 8:
        return codes, zero
    codes.unflatten(1, (zero.shape[1], -1)).sub_(zero[..., None])
    return codes, None


def rescale_(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, corrections: Sequence[tuple[Tensor, Tensor]], plus: Tensor | None
) -> Tensor:
    """The output x_scale w_scale (acc - outer products) + plus, float32 [M, N], in the memory of ``acc``.

    :func:`rescale` says it plainly. They are equal bit by bit but for the last sum, which may be a fused
    multiply-add here.

    Args:
        acc: int32 [M, N], contiguous; overwritten.
        x_scale: float32 [M, 1] or [1, 1].
        w_scale: float32 [N] or [1].
        corrections: pairs of int32 [M, 1] or [1, 1] and [N] or [1]; subtracted in int32, where that is exact.
        plus: float32 [N] or [M, N].
    """
    out = acc.view(torch.float32)
    m, n = acc.shape
    rows = [x_scale.expand(m, 1), *(row.expand(m, 1) for row, _ in corrections)]
    if plus is not None:
        rows.append(plus.expand(m, n))
    for a, y, scale, *rest in _chunks(acc, out, *rows):
        for row, (_, column) in zip(rest, corrections, strict=False):
            a.addcmul_(row, column, value=-1)
        # From one type to the other in the same memory: elements are as wide, and each is read before it is written.
        y.copy_(a).mul_(scale)
        if plus is None:
            y.mul_(w_scale)
        else:
            torch.addcmul(rest[-1], y, w_scale, out=y)
    return out


def rescale(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, corrections: Sequence[tuple[Tensor, Tensor]], plus: Tensor | None
) -> Tensor:
    """:func:`rescale_` in plain arithmetic, the reference."""
    for row, column in corrections:
        acc = acc - row * column
    y = acc.float() * x_scale * w_scale
    return y if plus is None else plus + y


def _chunks(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Rows of all matrices, as many at a time as fit in the cache when the first is float32; on other devices all."""
    first = matrices[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling():
        return [matrices]
    rows = _CHUNK_BYTES * torch.get_num_threads() // (4 * max(1, first.shape[1]))
    if len(first) <= max(1, rows):
        return [matrices]
    return zip(*(matrix.split(max(1, rows)) for matrix in matrices), strict=True)
