"""Means with 95 % bootstrap intervals; two models are compared pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Aggregate:
    """A mean, the 2.5 and 97.5 percentiles of its bootstrap distribution, and the number of values."""

    mean: float
    ci95: tuple[float, float]
    n: int

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "ci95": list(self.ci95)}

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.ci95[0]:.2f}, {self.ci95[1]:.2f}]"


def aggregate(values: Sequence[float], seed: int = 0) -> Aggregate:
    """Mean and percentile bootstrap interval (2000 resamples, seeded).

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"values must be finite and at least one, got {list(values)[:5]}")
    picks = np.random.default_rng(seed).integers(0, x.size, (RESAMPLES, x.size))
    low, high = np.percentile(x[picks].mean(1), [2.5, 97.5])
    return Aggregate(float(x.mean()), (float(low), float(high)), int(x.size))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Aggregate:
    """The mean of a - b over pairs, with its interval: smaller than the intervals of a and b suggest."""
    return aggregate(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), seed)  # type: ignore[arg-type]
