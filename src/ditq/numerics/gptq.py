"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounds column by column; later columns compensate the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ditq.numerics.clipping import search_clip_ratio
from ditq.numerics.grid import Grid
from ditq.numerics.uniform import (
    Quantized,
    check_finite,
    dequantize,
    quantize,
    round_codes,
    scale_and_zero_point,
)

Order = Literal["natural", "activation"]

# A triangular matrix up to this size is inverted by LAPACK, which also processes its zeros; larger ones by halves.
_LAPACK_SIZE = 256

# Rows of inputs that are converted to float32 at a time.
_CHUNK = 8192

# Float32 sums of squared errors are accurate to six digits; a smaller relative gain does not count.
_MARGIN = 1e-4


@dataclass(frozen=True)
class Rounded:
    """A weight rounded by GPTQ, and its error compared with rounding to nearest.

    Attributes:
        quantized: rounded by GPTQ.
        error: ||X (w - q)^T||^2 of each row on the inputs of the Hessian, float64 [N].
        nearest: the same error of rounding to nearest, float64 [N]; never below ``error``.
    """

    quantized: Quantized
    error: Tensor
    nearest: Tensor


def add_inputs(hessian: Tensor, x: Tensor) -> None:
    """Adds 2 X^T X to ``hessian`` in place: the Hessian of ||X (W - Q)^T||^2 for one row of W.

    Args:
        hessian: float32 or float64 [K, K].
        x: inputs [R, K], any float dtype; R may be 0.
    """
    for rows in x.split(_CHUNK):
        rows = rows.to(hessian.dtype)
        hessian.addmm_(rows.T, rows, alpha=2)


def output_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """||X d^T||^2 of each row d of ``difference`` [N, K], from the Hessian of X; float64 [N]."""
    d = difference.to(hessian.dtype)
    return ((d @ hessian) * d).sum(1, dtype=torch.float64) / 2


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    clip: bool = False,
    damping: float = 0.01,
    order: Order = "natural",
    block: int = 128,
    factor: Tensor | None = None,
) -> Rounded:
    """Rounds so that ||X (W - Q)^T||^2 becomes small rather than ||W - Q||^2.

    Scales per tensor and per row come from the original weights. Scales of a group come from the weights at the time
    its first column is rounded, which compensate the errors of earlier columns. With the order "activation", which
    rounds the columns of one group at different times, they come from the original weights. The layout of codes and
    scales is that of ``quantize``, whatever the order.

    A row that GPTQ does not improve is rounded to nearest, so that no row has a larger output error on the inputs of
    ``hessian`` than with ``quantize``.

    Args:
        weight: [N, K], any real dtype; computed in float32.
        hessian: 2 X^T X, float32 or float64 [K, K], see :func:`add_inputs`.
        clip: whether ranges are narrowed by ``search_clip_ratio``.
        damping: added to the diagonal of the Hessian, relative to its mean. Inputs that are always zero cause no
            feedback; their columns are rounded to nearest.
        order: "natural", or "activation": columns of large inputs first.
        block: columns that are compensated at a time; affects the speed only.
        factor: ``inverse_factor(hessian, damping, order)``, for several weights that read the same inputs.

    Raises:
        ValueError: as ``quantize``; or the Hessian has another shape, or contains NaN or Inf; or ``damping`` or
            ``block`` is not positive.
    """
    _check(weight, hessian, block)
    factor = inverse_factor(hessian, damping, order) if factor is None else factor
    weight = weight.float()
    static = _scales(weight, grid, clip)
    nearest = quantize(weight, grid, scale=static[0], zero_point=static[1])
    nearest = Quantized(nearest.codes, *static, grid)
    compensated = _compensated(weight, grid, static, _column_order(hessian, order), factor, clip, block)
    before, after = (output_errors(weight - dequantize(q), hessian) for q in (nearest, compensated))
    better = after < before * (1 - _MARGIN)
    return Rounded(_chosen(better[:, None], compensated, nearest), torch.where(better, after, before), before)


def _check(weight: Tensor, hessian: Tensor, block: int) -> None:
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian must be [{columns}, {columns}], got {list(hessian.shape)}")
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")


def _scales(x: Tensor, grid: Grid, clip: bool) -> tuple[Tensor, Tensor | None]:
    ratio = search_clip_ratio(x, grid) if clip else 1.0
    return scale_and_zero_point(x, grid, clip_ratio=ratio)


def _compensated(
    weight: Tensor,
    grid: Grid,
    static: tuple[Tensor, Tensor | None],
    columns_in_order: Tensor | None,
    factor: Tensor,
    clip: bool,
    block: int,
) -> Quantized:
    """Rounds column by column, and subtracts the error, weighted by the factor, from the columns not yet rounded.

    Args:
        static: scales and zero points of the original weight.
        columns_in_order: the columns in the order of rounding, see :func:`_column_order`.
    """
    rows, columns = weight.shape
    size = grid.group_size or columns
    scales_come_late = grid.granularity == "group" and columns_in_order is None
    one_row = grid.model_copy(update={"granularity": "channel", "group_size": None})
    # Transposed, since the loop works on columns.
    remaining = (weight if columns_in_order is None else weight[:, columns_in_order]).T.contiguous()  # [K, N]
    scale = static[0].expand(rows, -1).T.clone()  # [G, N]
    zero = torch.zeros_like(scale) if static[1] is None else static[1].expand(rows, -1).T.float()
    codes = torch.empty_like(remaining)
    column_ids = torch.arange(columns) if columns_in_order is None else columns_in_order.cpu()
    group_of = column_ids.div(size, rounding_mode="floor").tolist()
    # A group whose scale is computed late must not extend beyond the columns that are already compensated.
    step = max(block // size * size, size) if scales_come_late else block
    for begin in range(0, columns, step):
        end = min(begin + step, columns)
        errors = torch.empty_like(remaining[begin:end])
        for i in range(begin, end):
            group = group_of[i]
            if scales_come_late and i % size == 0:
                group_scale, group_zero = _scales(remaining[i : i + size].T, one_row, clip)
                scale[group] = group_scale[:, 0]
                if group_zero is not None:
                    zero[group] = group_zero[:, 0].float()
            w, s, z = remaining[i], scale[group], zero[group]
            code = codes[i].copy_(round_codes(w / s, z, grid))
            error = torch.div(w - (code - z) * s, factor[i, i], out=errors[i - begin])
            remaining[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        remaining[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    final = codes.T.to(torch.int8)
    if columns_in_order is not None:
        final = torch.empty_like(final).index_copy_(1, columns_in_order, final)
    scales, zeros = scale.T.contiguous(), zero.T.contiguous().to(torch.int16)
    if grid.granularity == "tensor":
        scales, zeros = scales[:1], zeros[:1]
    return Quantized(final, scales, None if grid.symmetric else zeros, grid)


def _chosen(better: Tensor, a: Quantized, b: Quantized) -> Quantized:
    """Rows of ``a`` where they are ``better`` [N, 1], those of ``b`` elsewhere."""
    codes = torch.where(better, a.codes, b.codes)
    if b.grid.granularity == "tensor":  # one scale, the same in both
        return b._replace(codes=codes)
    zero = None
    if a.zero_point is not None and b.zero_point is not None:
        zero = torch.where(better, a.zero_point, b.zero_point)
    return Quantized(codes, torch.where(better, a.scale, b.scale), zero, b.grid)


def _column_order(hessian: Tensor, order: Order) -> Tensor | None:
    """The columns in the order in which they are rounded; None: the natural order."""
    return hessian.diagonal().argsort(descending=True) if order == "activation" else None


def inverse_factor(hessian: Tensor, damping: float = 0.01, order: Order = "natural") -> Tensor:
    """The upper triangular U with H^-1 = U^T U for the damped H, float32 [K, K]; row i holds the feedback of column i.

    One decomposition of H is enough: J H J = L L^T (Cholesky, with J the order of the columns reversed), U = J L^-1 J.

    Args:
        hessian, damping, order: see :func:`gptq`; rows and columns of U are in the order of rounding.

    Raises:
        ValueError: the Hessian contains NaN or Inf, or ``damping`` is not positive.
    """
    check_finite(hessian, "hessian")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    columns = _column_order(hessian, order)
    h = (hessian if columns is None else hessian[columns][:, columns]).double().flip(0, 1)
    diagonal = h.diagonal()
    added = damping * (float(diagonal.mean()) or 1.0)  # a Hessian of zeros gets the identity: no feedback
    diagonal.add_(added)
    lower, failed = torch.linalg.cholesky_ex(h)
    while bool(failed):  # inputs of low rank need more damping
        diagonal.add_(9 * added)
        added *= 10
        lower, failed = torch.linalg.cholesky_ex(h)
    del h, diagonal  # for the widest layers each of these matrices takes hundreds of megabytes
    _invert_lower(lower)
    return lower.float().flip(0, 1)


def _invert_lower(x: Tensor) -> None:
    """Inverts a lower triangular matrix in place: a third of the work of solving for the identity."""
    n = len(x)
    if n <= _LAPACK_SIZE:
        identity = torch.eye(n, dtype=x.dtype, device=x.device)
        x.copy_(torch.linalg.solve_triangular(x, identity, upper=False))
        return
    h = n // 2
    top, left, bottom = x[:h, :h], x[h:, :h], x[h:, h:]
    _invert_lower(top)
    _invert_lower(bottom)
    left.copy_(-bottom @ (left @ top))
