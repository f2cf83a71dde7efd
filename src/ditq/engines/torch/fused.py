"""The operations around the integer product: quantizing the activations, rescaling the output, unpacking the weights.

Each takes a few passes over memory. On a CPU they run chunk by chunk, so that all passes but the first read from the
cache, and in place, since new memory costs as much as the arithmetic. ``torch.compile`` of a whole model fuses the
passes itself; there the whole matrix is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.numerics import Grid, Quantized, quantize, unpack

# Half of the 1 MiB or more of L2 cache that a core usually has.
_CHUNK_BYTES = 2**19


def quantize_rows(x: Tensor, format: Grid, smooth: Tensor | None = None) -> Quantized:
    """Codes of x / smooth [M, K] with dynamic scales per token or group, of uniform or normal levels.

    Bitwise equal to ``numerics.quantize(x.float() / smooth, format)``, but faster.
    """
    size = format.group_size or x.shape[1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), x.shape[1] // size, device=x.device)
    zero = None if format.symmetric else torch.empty(scale.shape, dtype=torch.int16, device=x.device)
    bottom, top = format.code_range
    for x_rows, codes_rows, scale_rows, *zero_rows in _chunks(x, codes, scale, *([] if zero is None else [zero])):
        if smooth is not None:
            x_rows = x_rows / smooth
        groups = x_rows.unflatten(1, (-1, size))
        if format.levels == "normal" or format.full:
            part = quantize(x_rows, format)
            codes_rows.copy_(part.codes)
            scale_rows.copy_(part.scale)
            continue
        # On a CPU two reductions are two to four times faster than aminmax(), abs() or an infinity norm.
        low, high = groups.amin(-1).float(), groups.amax(-1).float()
        s, z = _grid(low, high, bottom, top, format.symmetric)
        scale_rows.copy_(s)
        rounded = (groups / s[..., None]).round_()
        if z is not None:
            zero_rows[0].copy_(z)
            rounded.add_(z[..., None]).clamp_(bottom, top)
        # Symmetric codes need no clamp: |x| / (max|x| / top) never rounds to more than top.
        codes_rows.unflatten(1, (-1, size)).copy_(rounded)
    return Quantized(codes, scale, zero, format)


def _grid(low: Tensor, high: Tensor, bottom: int, top: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of ranges, both float32, by the arithmetic of ``numerics.scale_and_zero_point``.

    A range that is not finite has a scale that is not finite, which the product carries into the whole row.
    """
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        largest = torch.maximum(high, -low)
        # A row of zeros (padding) has no range: its codes are zero with any positive scale.
        return torch.where(largest == 0, 1.0 / top, (largest / top).clamp_min_(tiny)), None
    low, high = low.clamp_max_(0.0), high.clamp_min_(0.0)
    levels = top - bottom
    scale = torch.where(high == low, 1.0 / levels, ((high * 0.5 - low * 0.5) / levels * 2.0).clamp_min_(tiny))
    return scale, ((-low / scale).round_() + bottom).clamp_(bottom, top)


def weight_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """The integers of a weight, int8 [N, K], and the zero points, int8 [N, G], that remain to be subtracted.

    Up to 7 bits, code - zero_point fits in int8: the integer product then needs no correction.
    """
    bits, zero = weight.format.bits, weight.zero_point
    codes = unpack(weight.packed, weight.format, weight.columns)
    if zero is None or bits == 8:
        return codes, zero
    codes.unflatten(1, (zero.shape[1], -1)).sub_(zero[..., None])
    return codes, None


def rescale_(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, corrections: Sequence[tuple[Tensor, Tensor]], plus: Tensor | None
) -> Tensor:
    """The output x_scale w_scale (acc - outer products) + plus, float32 [M, N], in the memory of ``acc``.

    :func:`rescale` is the plain version. Both are bitwise equal except for the last sum, which may be a fused
    multiply-add here.

    Args:
        acc: int32 [M, N], contiguous; overwritten.
        x_scale: float32 [M, 1] or [1, 1].
        w_scale: float32 [N] or [1].
        corrections: pairs of int32 [M, 1] or [1, 1] and [N] or [1]; subtracted in int32, which is exact.
        plus: float32 [N] or [M, N].
    """
    out = acc.view(torch.float32)
    m, n = acc.shape
    rows = [x_scale.expand(m, 1), *(row.expand(m, 1) for row, _ in corrections)]
    if plus is not None:
        rows.append(plus.expand(m, n))
    for a, y, scale, *others in _chunks(acc, out, *rows):
        for row, (_, column) in zip(others, corrections, strict=False):
            a.addcmul_(row, column, value=-1)
        # Converts in place: elements of both types have the same width, and each is read before it is written.
        y.copy_(a).mul_(scale)
        if plus is None:
            y.mul_(w_scale)
        else:
            torch.addcmul(others[-1], y, w_scale, out=y)
    return out


def rescale(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, corrections: Sequence[tuple[Tensor, Tensor]], plus: Tensor | None
) -> Tensor:
    """:func:`rescale_` in plain arithmetic, the reference."""
    for row, column in corrections:
        acc = acc - row * column
    y = acc.float() * x_scale * w_scale
    return y if plus is None else plus + y


def row_slices(matrix: Tensor) -> list[slice]:
    """Runs of rows of a float32 or int32 matrix that fit in the cache; elsewhere, and compiled, all rows."""
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    rows = max(1, _CHUNK_BYTES * torch.get_num_threads() // (4 * max(1, matrix.shape[1])))
    return [slice(begin, begin + rows) for begin in range(0, len(matrix), rows)]


def _chunks(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Runs of rows of all matrices; a run of the first one, in float32, fits in the cache."""
    return (tuple(matrix[rows] for matrix in matrices) for rows in row_slices(matrices[0]))
