"""Clipping: a narrower range has a finer grid, which can reduce the error although it cuts off a few values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.numerics.grid import Grid
from ditq.numerics.uniform import fake_quantize, group_view

# Below half of the range the cut-off values dominate, whatever the distribution of a weight.
DEFAULT_RATIOS = tuple(1.0 - 0.025 * step for step in range(21))

# Normal levels start from the root mean square, which is best for normal numbers. For 98 % of the rows of rotated
# 4-bit weights the best ratio is between 0.8 and 1.3, for groups of 64 between 0.67 and 1.4; finer steps gain up to
# 0.05 dB.
NORMAL_RATIOS = tuple(0.6 + 0.05 * step for step in range(21))


def search_clip_ratio(
    x: Tensor,
    grid: Grid,
    *,
    ratios: Sequence[float] | None = None,
    norm: float = 2.0,
    importance: Tensor | None = None,
) -> Tensor:
    """The clip ratio with the smallest error for every group, by exhaustive search.

    argmin_r  sum_k importance_k |x_k - Q(x_k; r)|^norm

    Ratio 1 is always a candidate, and wins ties: the result is never worse than the full range. For normal levels
    ratio 1 is the scale of normal numbers, see ``scale_and_zero_point``, and the best ratio may be larger.

    Args:
        x: [R, K], any real dtype; computed in float32.
        ratios: candidates in (0, 1], or positive for normal levels; by default 1.0, 0.975, ... 0.5, or 0.6, 0.65, ...
            1.6.
        norm: p, positive. 2 is the squared error; larger norms (such as 2.4) preserve the largest values better.
        importance: [K], not negative, e.g. the mean square of each input channel of a weight.

    Returns:
        float32 [R, G] ([1, 1] for granularity "tensor"), for ``quantize(..., clip_ratio=)``.

    Raises:
        ValueError: as ``quantize``, or a ratio, ``norm`` or the shape of ``importance`` is not as above.
    """
    normal = grid.levels == "normal"
    candidates = (NORMAL_RATIOS if normal else DEFAULT_RATIOS) if ratios is None else tuple(ratios)
    invalid = [ratio for ratio in candidates if not 0 < ratio <= (math.inf if normal else 1)]
    if invalid:
        raise ValueError(f"ratios must be {'positive' if normal else 'in (0, 1]'}, got {invalid[0]}")
    if not norm > 0:
        raise ValueError(f"norm must be positive, got {norm}")
    groups = group_view(x, grid).float()
    if importance is not None and importance.shape != x.shape[1:]:
        raise ValueError(f"importance must have shape ({x.shape[1]},), got {tuple(importance.shape)}")
    best = torch.ones(groups.shape[:2], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return best
    weight = None
    if importance is not None:
        weight = group_view(importance.float().expand(x.shape), grid)
    # Errors are relative to the group's maximum: their powers neither overflow nor underflow in float32.
    largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)

    def error(ratio: float) -> Tensor:
        rounded = fake_quantize(x, grid, clip_ratio=ratio)
        powers = group_view(rounded, grid).sub(groups).div_(unit).abs_().pow_(norm)
        if weight is not None:
            powers = powers.mul_(weight)
        # Errors of neighbouring ratios can differ in the seventh digit only, and the result must never be worse.
        return powers.sum(-1, dtype=torch.float64)

    smallest = error(1.0)
    for ratio in sorted(set(candidates) - {1.0}, reverse=True):
        candidate = error(ratio)
        better = candidate < smallest
        smallest = torch.where(better, candidate, smallest)
        best = torch.where(better, ratio, best)
    return best
