"""What a metric says of one model: a mean with its interval, the 16-bit model's own value, and a verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["same", "better", "worse"]


class Interval(BaseModel):
    """A mean, its 95 % interval and the number of values behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    ci95: tuple[float, float]
    n: int


class Score(Interval):
    """One metric of one model.

    Attributes:
        network: the feature network it was seen through, None for plain arithmetic.
        reference: the 16-bit model's own value, where the metric has one (alignment, distribution, temporal).
        difference: quantized minus 16-bit, paired by prompt and seed, where the metric has one.
        verdict: of ``difference``: "same" where its interval holds zero (no measurable difference);
            None for fidelity metrics, which compare with the 16-bit model by themselves.
    """

    higher_is_better: bool
    network: str | None = None
    reference: Interval | None = None
    difference: Interval | None = None
    verdict: Verdict | None = None


def verdict(difference: Interval, higher_is_better: bool) -> Verdict:
    """Whether a difference is measurable, and to which side."""
    low, high = difference.ci95
    if low <= 0 <= high:
        return "same"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"
