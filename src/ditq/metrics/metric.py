"""What a metric is, for people: its name in tables, its unit, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["fidelity", "alignment", "distribution", "temporal"]


@dataclass(frozen=True)
class Description:
    """What stands beside the numbers of one metric.

    Attributes:
        name: the key in ``report.json``, e.g. ``"kid"``.
        title: the heading of its column, e.g. ``"KID"``.
        unit: e.g. ``"dB"``; empty for pure numbers.
        family: what it compares with: the 16-bit model's images, the prompt, real images, or the other frames.
        about: a sentence on what it measures and how to read it, with the paper.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    family: Family
    about: str
