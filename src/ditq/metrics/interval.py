"""Means with 95 % bootstrap intervals, and paired differences of two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

RESAMPLES = 2000

# Fewer values get no interval: a bootstrap of one value has no width, and that of two values spans just the two.
FEWEST = 3


class Interval(BaseModel):
    """A mean, its 95 % interval (None for too few values) and the number of values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    ci95: tuple[float, float] | None
    n: int

    def __str__(self) -> str:
        bounds = "no interval" if self.ci95 is None else f"{self.ci95[0]:.2f}, {self.ci95[1]:.2f}"
        return f"{self.mean:.2f} [{bounds}]"


def aggregate(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval (2000 resamples, seeded). Fewer than three values get no interval.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"values must be finite and at least one, got {list(values)[:5]}")
    if x.size < FEWEST:
        return Interval(mean=float(x.mean()), ci95=None, n=int(x.size))
    picks = np.random.default_rng(seed).integers(0, x.size, (RESAMPLES, x.size))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return Interval(mean=float(x.mean()), ci95=(float(low), float(high)), n=int(x.size))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """The mean of a - b over pairs, with its interval, which is narrower than the intervals of a and b suggest."""
    return aggregate(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)  # type: ignore[arg-type]
