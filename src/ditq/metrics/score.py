"""The result of one metric for one model: a mean with its interval, the reference's value, and a verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ditq.metrics.interval import Interval

__all__ = ["Curve", "Interval", "PairDifference", "Score", "Verdict", "verdict"]

Verdict = Literal["same", "better", "worse"]


class Score(Interval):
    """One metric of one model.

    Attributes:
        network: the feature network behind the number; None for metrics without a network.
        reference: the 16-bit model's value; None for fidelity metrics.
        difference: quantized minus 16-bit, paired by prompt and seed; None for fidelity metrics.
        verdict: on ``difference``: "same" (not measurable) where its interval contains zero. None for fidelity
            metrics, which already compare with the 16-bit model, and for fewer than three pairs.
    """

    higher_is_better: bool
    network: str | None = None
    reference: Interval | None = None
    difference: Interval | None = None
    verdict: Verdict | None = None


class PairDifference(BaseModel):
    """The paired difference a minus b of two quantized models on one metric.

    The verdict is on a; it is None if there are too few pairs.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    metric: str
    a: str
    b: str
    difference: Interval
    verdict: Verdict | None


class Curve(BaseModel):
    """A quantity along the sampling trajectory. ``ci95`` has one (low, high) for each step, or none for few values."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    timesteps: list[float]
    mean: list[float]
    ci95: list[tuple[float, float]]
    n: int


def verdict(difference: Interval, higher_is_better: bool) -> Verdict | None:
    """Whether a difference is measurable, and in which direction; None if it has no interval."""
    if difference.ci95 is None:
        return None
    low, high = difference.ci95
    if low <= 0 <= high:
        return "same"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
