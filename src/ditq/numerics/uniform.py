"""The quantizer: rounds floats to signed codes of ``bits`` bits, on an evenly spaced grid or on normal levels.

    x  ~  scale * (codes - zero_point)

Codes of normal levels are the levels themselves, integers of 8 bits (see :mod:`ditq.numerics.codebook`). So only
rounding, packing and the choice of a scale depend on the levels; products and dequantizing do not.

This is the reference for the tests of engines. It divides by the scale. An engine that multiplies by the reciprocal
instead may round values within an ulp of a rounding boundary to the neighbouring code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditq.numerics.codebook import nearest_level, normal_scale
from ditq.numerics.grid import Grid

# Scales below the smallest normal float32 would lose digits, flush to zero on some devices, or divide to Inf.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Quantized(NamedTuple):
    """Integers and their grid.

    Attributes:
        codes: int8 [R, K].
        scale: float32 [R, G], the value of code 1 (without zero point); [1, 1] for granularity "tensor".
        zero_point: int16 [R, G], the code of 0.0; None when symmetric.
        grid: bits and granularity.
        sums: int32 [R, G], the sums of the codes; optional, if already computed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    sums: Tensor | None = None


def group_view(x: Tensor, grid: Grid) -> Tensor:
    """Reshapes ``x`` so that the elements along the last axis share a scale.

    Args:
        x: [R, K], any dtype.

    Returns:
        [1, 1, R K] for granularity "tensor", [R, 1, K] for "channel" and "token", [R, K / g, g] for "group"; a view
        if the strides allow it.

    Raises:
        ValueError: ``x`` is not a matrix, or the group size does not divide K.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix [R, K], got shape {tuple(x.shape)}")
    rows, columns = x.shape
    if grid.granularity == "tensor":
        return x.reshape(1, 1, rows * columns)
    groups = grid.groups(columns)
    return x.reshape(rows, groups, columns // groups)


def scale_and_zero_point(x: Tensor, grid: Grid, *, clip_ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
    """The scales that span the range of ``x``, narrowed by ``clip_ratio`` r.

    Symmetric: scale = r max|x| / (2^(b-1) - 1). Asymmetric, with l = r min(x, 0) and h = r max(x, 0):
    scale = (h - l) / (2^b - 1), zero_point = round(-l / scale) - 2^(b-1), which is a code, so 0.0 is exact.
    Full: |scale| = max(m / 2^(b-1), n / (2^(b-1) - 1/2)) with the larger m and the smaller n of h and -l; the scale is
    negative if m = h, whose code is -2^(b-1). So nothing is rounded by more than half a step.
    A group of zeros counts as having the range 1, so a scale is never 0. A group with NaN or Inf has a scale of NaN or
    Inf: codes cannot represent these, and results computed from codes alone would look plausible.

    Args:
        x: [R, K], any real dtype; computed in float32.
        clip_ratio: r, positive; a float, or a tensor that broadcasts to [R, G].

    Returns:
        The scale, float32 [R, G], and the zero point, int16 [R, G] or None; [1, 1] for granularity "tensor".

    Raises:
        ValueError: as :func:`group_view`, or ``clip_ratio`` is not positive or does not broadcast.
    """
    bottom, top = grid.code_range
    groups = group_view(x, grid).float()
    ratio = _clip_ratio(clip_ratio, groups)
    if groups.numel() == 0:  # an empty batch has the range of a batch of zeros
        groups = groups.new_zeros(*groups.shape[:2], 1)
    if grid.levels == "normal":
        return (normal_scale(groups, grid.bits) * ratio).clamp_min(_SMALLEST_SCALE), None
    if grid.full:
        return _full_scale(groups, ratio, top), None
    if grid.symmetric:
        largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1)
        scale = (largest * ratio / top).clamp_min(_SMALLEST_SCALE)
        return torch.where(largest == 0, 1.0 / top, scale), None
    low, high = groups.aminmax(dim=-1)
    low, high = low.clamp_max(0.0) * ratio, high.clamp_min(0.0) * ratio
    levels = top - bottom
    # Halved first: the difference of two finite ends may overflow. Factors of two are exact.
    scale = ((high * 0.5 - low * 0.5) / levels * 2.0).clamp_min(_SMALLEST_SCALE)
    scale = torch.where(high == low, 1.0 / levels, scale)
    zero_point = ((-low / scale).round() + bottom).clamp(bottom, top)
    return scale, zero_point.to(torch.int16)


def _full_scale(groups: Tensor, ratio: float | Tensor, top: int) -> Tensor:
    low, high = groups.aminmax(dim=-1)
    larger, smaller = torch.maximum(high, -low), torch.minimum(high, -low)
    size = (torch.maximum(larger / (top + 1), smaller / (top + 0.5)) * ratio).clamp_min(_SMALLEST_SCALE)
    return torch.where(larger == 0, 1.0 / top, torch.where(high > -low, -size, size))


def quantize(
    x: Tensor,
    grid: Grid,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> Quantized:
    """Rounds: codes = clamp(round(x / scale) + zero_point), ties to even; dynamic unless a scale is given.

    Args:
        x: [R, K], any real dtype; computed in float32. The code of a number that is not finite is arbitrary;
            its dynamic scale is NaN or Inf, but a static one does not show it (see :func:`not_finite`).
        scale: static scale, positive; broadcasts to [R, G] ([1, 1] for granularity "tensor"). None: from
            the range of ``x``, see :func:`scale_and_zero_point`.
        zero_point: static zero point of an asymmetric grid, same shape.
        clip_ratio: narrows a dynamic range.

    Raises:
        ValueError: as :func:`scale_and_zero_point`, or the static arguments do not fit together.

    Example:
        >>> import torch
        >>> from ditq.numerics import Grid
        >>> q = quantize(torch.tensor([[0.0, 0.5, -3.5, 7.0]]), Grid(bits=4, granularity="channel"))
        >>> q.codes.tolist(), q.scale.tolist()
        ([[0, 0, -4, 7]], [[1.0]])
        >>> dequantize(q).tolist()
        [[0.0, 0.0, -4.0, 7.0]]
    """
    groups = group_view(x, grid).float()
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point needs a scale, got None; pass both (static) or neither (dynamic)")
        scale, zero_point = scale_and_zero_point(x, grid, clip_ratio=clip_ratio)
    else:
        if isinstance(clip_ratio, Tensor) or clip_ratio != 1.0:
            raise ValueError(f"clip_ratio must be 1.0 when a scale is given, got {clip_ratio}; multiply the scale")
        if grid.symmetric != (zero_point is None):
            raise ValueError(
                f"zero_point is for static asymmetric grids, got symmetric={grid.symmetric} and "
                f"zero_point={'None' if zero_point is None else 'a tensor'}"
            )
        scale = _per_group(scale, groups, "scale").float()
        if zero_point is not None:
            zero_point = _per_group(zero_point, groups, "zero_point").to(torch.int16)
    codes = round_codes(groups / scale[..., None], None if zero_point is None else zero_point[..., None], grid)
    return Quantized(codes.to(torch.int8).reshape(x.shape), scale, zero_point, grid)


def round_codes(values: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The nearest code of each of ``values`` (x / scale, float32, any shape), float32 or int8; may overwrite them.

    Ties of uniform levels are rounded to even before the zero point is added; those of normal levels go to the lower
    level.
    """
    if grid.levels == "normal":
        return nearest_level(values, grid.bits)
    codes = values.round_()
    if zero_point is not None:
        # Added after rounding, so that the grid is the shifted symmetric one, and ties are rounded the same way.
        codes = codes.add_(zero_point)
    # Clamped in float: casting a larger value to int8 is undefined.
    return codes.clamp_(*grid.code_range)


def dequantize(q: Quantized) -> Tensor:
    """Back to floats: scale * (codes - zero_point), float32 [R, K].

    Raises:
        ValueError: as :func:`group_view`, or the scale or zero point does not broadcast to one per group.
    """
    groups = group_view(q.codes, q.grid)
    scale = _per_group(q.scale, groups, "scale")
    values = groups.to(torch.float32)
    if q.zero_point is not None:
        values = values - _per_group(q.zero_point, groups, "zero_point")[..., None]
    return (values * scale[..., None]).reshape(q.codes.shape)


def fake_quantize(
    x: Tensor,
    grid: Grid,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> Tensor:
    """``dequantize(quantize(x))``, float32 [R, K]: the rounded values of ``x``. Arguments as in :func:`quantize`."""
    return dequantize(quantize(x, grid, scale=scale, zero_point=zero_point, clip_ratio=clip_ratio))


def not_finite(x: Tensor) -> Tensor:
    """NaN for each row of ``x`` [R, K] with NaN or Inf, else 0: float32 [R, 1]. Add it to a scale to pass NaN on.

    A sum is the cheapest pass over ``x``; a sum that overflows counts as not finite.
    """
    return x.sum(1, keepdim=True, dtype=torch.float32) * 0.0


def check_finite(x: Tensor, name: str) -> None:
    """Raises if ``x`` is not finite. A separate step, since it synchronizes with the device.

    Raises:
        ValueError: ``x`` contains NaN or Inf; the message contains ``name``.
    """
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise ValueError(f"{name} contains NaN or Inf ({bad} of {x.numel()} values); all values must be finite")


def _per_group(value: Tensor, groups: Tensor, name: str) -> Tensor:
    """``value`` broadcast to one number per group."""
    shape = groups.shape[:2]
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, one per group, got {tuple(value.shape)}") from None


def _clip_ratio(clip_ratio: float | Tensor, groups: Tensor) -> float | Tensor:
    if isinstance(clip_ratio, Tensor):
        return _per_group(clip_ratio, groups, "clip_ratio").float()
    if not clip_ratio > 0:
        raise ValueError(f"clip_ratio must be positive, got {clip_ratio}")
    return clip_ratio
