"""The uniform quantizer: a float becomes a signed code of ``bits`` bits on an evenly spaced grid.

    x  ~  scale * (codes - zero_point)

This is the reference that engines are tested against. It divides by the scale; an engine that
multiplies by the reciprocal instead may put values within an ulp of a rounding boundary one code away.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Granularity = Literal["tensor", "row", "group"]
"""What shares one scale: everything, one row (an output channel of a weight, a token of an activation), or
``group_size`` neighbouring columns of a row."""

# Scales below the smallest normal float32 would lose digits, flush to zero on some devices, or divide to Inf.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

_USUAL_GROUP_SIZES = (16, 32, 48, 64, 96, 128, 192, 256, 288, 384, 512)


class Quantized(NamedTuple):
    """Integers and the grid they stand on.

    Attributes:
        codes: int8 [R, K].
        scale: float32 [R, G], the distance of two neighbouring codes; [1, 1] for granularity "tensor".
        zero_point: int16 [R, G], the code of 0.0; None when symmetric.
        sums: int32 [R, G], the sums of the codes, where somebody had them at hand.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sums: Tensor | None = None


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code.

    Symmetric: +-(2^(b-1) - 1), so that -x has the code of x negated. Asymmetric: all 2^b codes,
    -2^(b-1) ... 2^(b-1) - 1.

    Raises:
        ValueError: ``bits`` is not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    top = 2 ** (bits - 1) - 1
    return (-top if symmetric else -top - 1), top


def group_view(x: Tensor, granularity: Granularity, group_size: int | None) -> Tensor:
    """What shares a scale, along the last axis.

    Args:
        x: [R, K], any dtype.
        granularity: "tensor", "row" or "group".
        group_size: g, columns per group; None unless the granularity is "group".

    Returns:
        [1, 1, R K] for "tensor", [R, 1, K] for "row", [R, K / g, g] for "group"; a view where strides allow.

    Raises:
        ValueError: ``x`` is not a matrix, the granularity is unknown, or ``group_size`` does not divide K.
    """
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix [R, K], got shape {tuple(x.shape)}")
    rows, columns = x.shape
    if granularity not in ("tensor", "row", "group"):
        raise ValueError(f"granularity must be 'tensor', 'row' or 'group', got {granularity!r}")
    if granularity != "group":
        if group_size is not None:
            raise ValueError(f"group_size must be None for granularity {granularity!r}, got {group_size}")
        return x.reshape(1, 1, rows * columns) if granularity == "tensor" else x.reshape(rows, 1, columns)
    if group_size is None or group_size < 1 or columns % group_size:
        possible = [g for g in _USUAL_GROUP_SIZES if columns % g == 0]
        possible = possible or [g for g in range(1, columns + 1) if columns % g == 0]
        raise ValueError(
            f"group_size must divide the {columns} columns, got {group_size}; "
            f"possible: {', '.join(map(str, possible))}"
        )
    return x.reshape(rows, columns // group_size, group_size)


def scale_and_zero_point(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    granularity: Granularity = "row",
    group_size: int | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The grid that spans the range of ``x``, narrowed by ``clip_ratio`` r.

    Symmetric: scale = r max|x| / (2^(b-1) - 1). Asymmetric, with l = r min(x, 0) and h = r max(x, 0):
    scale = (h - l) / (2^b - 1), zero_point = round(-l / scale) - 2^(b-1), which is a code, so 0.0 is exact.
    Where all of ``x`` is zero the range counts as 1, so a scale is never 0. Where a number is NaN or Inf the scale is
    NaN or Inf: codes cannot say that, and whatever is computed from them would look plausible.

    Args:
        x: [R, K], any real dtype; computed in float32.
        clip_ratio: r, positive; a float, or a tensor that broadcasts to [R, G].

    Returns:
        The scale, float32 [R, G], and the zero point, int16 [R, G] or None; [1, 1] for granularity "tensor".

    Raises:
        ValueError: as :func:`code_range` and :func:`group_view`, or ``clip_ratio`` is not positive or
            does not broadcast.
    """
    bottom, top = code_range(bits, symmetric)
    groups = group_view(x, granularity, group_size).float()
    ratio = _clip_ratio(clip_ratio, groups)
    if groups.numel() == 0:  # an empty batch has a range too: that of nothing but zeros
        groups = groups.new_zeros(*groups.shape[:2], 1)
    if symmetric:
        largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1)
        scale = (largest * ratio / top).clamp_min(_SMALLEST_SCALE)
        return torch.where(largest == 0, 1.0 / top, scale), None
    low, high = groups.aminmax(dim=-1)
    low, high = low.clamp_max(0.0) * ratio, high.clamp_min(0.0) * ratio
    levels = top - bottom
    # Halves: the difference of two finite ends may itself be out of range. Factors of two cost no digits.
    scale = ((high * 0.5 - low * 0.5) / levels * 2.0).clamp_min(_SMALLEST_SCALE)
    scale = torch.where(high == low, 1.0 / levels, scale)
    zero_point = ((-low / scale).round() + bottom).clamp(bottom, top)
    return scale, zero_point.to(torch.int16)


def quantize(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    granularity: Granularity = "row",
    group_size: int | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> Quantized:
    """Rounds: codes = clamp(round(x / scale) + zero_point), ties to even; dynamic unless a scale is given.

    Args:
        x: [R, K], any real dtype; computed in float32. The code of a number that is not finite is arbitrary; a
            dynamic scale is NaN or Inf there, a static one says nothing (see :func:`not_finite`).
        scale: static scale, positive; broadcasts to [R, G] ([1, 1] for granularity "tensor"). None: from
            the range of ``x``, see :func:`scale_and_zero_point`.
        zero_point: static zero point of an asymmetric grid, same shape.
        clip_ratio: narrows a dynamic range.

    Raises:
        ValueError: as :func:`scale_and_zero_point`, or the static arguments do not fit together.
    """
    bottom, top = code_range(bits, symmetric)
    groups = group_view(x, granularity, group_size).float()
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point needs a scale, got None; give both (static) or neither (dynamic)")
        scale, zero_point = scale_and_zero_point(
            x, bits, symmetric=symmetric, granularity=granularity, group_size=group_size, clip_ratio=clip_ratio
        )
    else:
        if isinstance(clip_ratio, Tensor) or clip_ratio != 1.0:
            raise ValueError(f"clip_ratio must be 1.0 when a scale is given, got {clip_ratio}; multiply the scale")
        if symmetric != (zero_point is None):
            raise ValueError(
                f"zero_point goes with a static asymmetric grid, got symmetric={symmetric} and "
                f"zero_point={'None' if zero_point is None else 'a tensor'}"
            )
        scale = _per_group(scale, groups, "scale").float()
        if zero_point is not None:
            zero_point = _per_group(zero_point, groups, "zero_point").to(torch.int16)
    codes = (groups / scale[..., None]).round_()
    if zero_point is not None:
        # After rounding, so that the grid is the symmetric one shifted, and ties fall the same way.
        codes = codes.add_(zero_point[..., None])
    # Clamp in float: the cast to int8 of a larger value is undefined.
    return Quantized(codes.clamp_(bottom, top).to(torch.int8).reshape(x.shape), scale, zero_point)


def dequantize(q: Quantized, granularity: Granularity = "row", group_size: int | None = None) -> Tensor:
    """Back to floats: scale * (codes - zero_point), float32 [R, K].

    Raises:
        ValueError: as :func:`group_view`, or the scales are not one per group.
    """
    groups = group_view(q.codes, granularity, group_size)
    scale = _per_group(q.scale, groups, "scale")
    values = groups.to(torch.float32)
    if q.zero_point is not None:
        values = values - _per_group(q.zero_point, groups, "zero_point")[..., None]
    return (values * scale[..., None]).reshape(q.codes.shape)


def fake_quantize(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool = True,
    granularity: Granularity = "row",
    group_size: int | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    clip_ratio: float | Tensor = 1.0,
) -> Tensor:
    """``dequantize(quantize(x))``, float32 [R, K]: what is left of ``x``, for error search. Arguments as there."""
    q = quantize(
        x,
        bits,
        symmetric=symmetric,
        granularity=granularity,
        group_size=group_size,
        scale=scale,
        zero_point=zero_point,
        clip_ratio=clip_ratio,
    )
    return dequantize(q, granularity, group_size)


def not_finite(x: Tensor) -> Tensor:
    """0, or NaN where a row of ``x`` [R, K] has NaN or Inf: float32 [R, 1], to be added to what must not hide it.

    A sum is the cheapest pass over ``x``; one that overflows counts as not finite.
    """
    return x.sum(1, keepdim=True, dtype=torch.float32) * 0.0


def check_finite(x: Tensor, name: str) -> None:
    """Scans ``x`` once; a separate step, since it waits for the device.

    Raises:
        ValueError: ``x`` contains NaN or Inf; ``name`` says which tensor that was.
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
