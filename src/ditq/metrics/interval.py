"""Means with 95 % bootstrap intervals; two models are compared pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

RESAMPLES = 2000

# From fewer values no interval is given: one value has none, and that of two is their distance.
FEWEST = 3


class Interval(BaseModel):
    """A mean, its 95 % interval (None where there are too few values for one) and the number of values behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    ci95: tuple[float, float] | None
    n: int

    def __str__(self) -> str:
        shown = "no interval" if self.ci95 is None else f"{self.ci95[0]:.2f}, {self.ci95[1]:.2f}"
        return f"{self.mean:.2f} [{shown}]"


def aggregate(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval (2000 resamples, seeded); of fewer than three values the mean alone.

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
    """The mean of a - b over pairs, with its interval: smaller than the intervals of a and b suggest."""
    return aggregate(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)  # type: ignore[arg-type]
