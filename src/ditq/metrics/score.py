"""What a metric says of one model: a mean with its interval, the 16-bit model's own value, and a verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ditq.metrics.interval import Interval

__all__ = ["Curve", "Interval", "PairDifference", "Score", "Verdict", "verdict"]

Verdict = Literal["same", "better", "worse"]


class Score(Interval):
    """One metric of one model.

    Attributes:
        network: the feature network it was seen through, None for plain arithmetic.
        reference: the 16-bit model's own value, where the metric has one (alignment, distribution, temporal).
        difference: quantized minus 16-bit, paired by prompt and seed, where the metric has one.
        verdict: of ``difference``: "same" where its interval holds zero (no measurable difference);
            None for fidelity metrics, which compare with the 16-bit model by themselves, and from fewer than three
            pairs.
    """

    higher_is_better: bool
    network: str | None = None
    reference: Interval | None = None
    difference: Interval | None = None
    verdict: Verdict | None = None


class PairDifference(BaseModel):
    """Two quantized models on one metric: a minus b, paired; the verdict, if there are enough pairs, is on a."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: str
    a: str
    b: str
    difference: Interval
    verdict: Verdict | None


class Curve(BaseModel):
    """A quantity along the sampling trajectory; ``ci95`` has one (low, high) a step, or is empty (too few values)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    timesteps: list[float]
    mean: list[float]
    ci95: list[tuple[float, float]]
    n: int


def verdict(difference: Interval, higher_is_better: bool) -> Verdict | None:
    """Whether a difference is measurable, and to which side; None where it has no interval."""
    if difference.ci95 is None:
        return None
    low, high = difference.ci95
    if low <= 0 <= high:
        return "same"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
