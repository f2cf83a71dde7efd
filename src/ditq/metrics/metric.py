"""The description of a metric for readers: its name in tables, its unit, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["fidelity", "alignment", "distribution", "temporal"]


@dataclass(frozen=True)
class Description:
    """The texts beside the numbers of one metric.

    Attributes:
        name: the key in ``report.json``, e.g. ``"kid"``.
        title: the heading in tables, e.g. ``"KID"``.
        unit: e.g. ``"dB"``; empty for dimensionless numbers.
        higher_is_better: whether a larger value is the better one.
        family: what images are compared with: the 16-bit model's images, the prompt, real images, or other frames.
        about: a sentence on what the metric measures and how to read it, with its paper.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    family: Family
    about: str
