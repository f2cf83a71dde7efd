"""Clipping: a narrower range has a finer grid, which can be worth the few values it cuts off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditq.numerics.grid import Grid
from ditq.numerics.uniform import fake_quantize, group_view

# Below half of the range the cut-off values dominate, whatever the distribution of a weight.
DEFAULT_RATIOS = tuple(1.0 - 0.025 * step for step in range(21))


def search_clip_ratio(
    x: Tensor,
    grid: Grid,
    *,
    ratios: Sequence[float] | None = None,
    norm: float = 2.0,
    importance: Tensor | None = None,
) -> Tensor:
    """The clip ratio of every group with the smallest error, by trying them all.

    argmin_r  sum_k importance_k |x_k - Q(x_k; r)|^norm

    Ratio 1 is always tried, and wins ties: the result is never worse than the full range.

    Args:
        x: [R, K], any real dtype; computed in float32.
        ratios: candidates in (0, 1]; by default 1.0, 0.975, ... 0.5.
        norm: p, positive. 2 is the squared error; larger ones (2.4 is in use) spare the largest values.
        importance: [K], not negative, e.g. the mean square of each input channel of a weight.

    Returns:
        float32 [R, G] ([1, 1] for granularity "tensor"), fit for ``quantize(..., clip_ratio=)``.

    Raises:
        ValueError: as ``quantize``, or a ratio, ``norm`` or the shape of ``importance`` is not as above.
    """
    candidates = DEFAULT_RATIOS if ratios is None else tuple(ratios)
    wrong = [ratio for ratio in candidates if not 0 < ratio <= 1]
    if wrong:
        raise ValueError(f"ratios must be in (0, 1], got {wrong[0]}")
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
    # Errors relative to the group's maximum: their powers neither overflow nor vanish in float32.
    largest = torch.linalg.vector_norm(groups, float("inf"), dim=-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)

    def error(ratio: float) -> Tensor:
        rounded = fake_quantize(x, grid, clip_ratio=ratio)
        powers = group_view(rounded, grid).sub(groups).div_(unit).abs_().pow_(norm)
        if weight is not None:
            powers = powers.mul_(weight)
        # Neighbouring ratios can differ in the seventh digit, and "never worse" is meant literally.
        return powers.sum(-1, dtype=torch.float64)

    smallest = error(1.0)
    for ratio in sorted(set(candidates) - {1.0}, reverse=True):
        candidate = error(ratio)
        better = candidate < smallest
        smallest = torch.where(better, candidate, smallest)
        best = torch.where(better, ratio, best)
    return best
