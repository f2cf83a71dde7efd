"""Numbers, units and verdicts in words, the same on the page and in the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ditq.metrics.score import Interval, Verdict
from ditq.report.document import ModelReport

VERDICTS: dict[Verdict, str] = {"same": "no measurable difference", "better": "better", "worse": "worse"}


def digits(intervals: Iterable[Interval]) -> int:
    """Decimal places that keep one digit of the narrowest interval and about three of the largest mean, at most 5."""
    known = list(intervals)
    halves = [half for i in known if (half := (i.ci95[1] - i.ci95[0]) / 2) > 0]
    if not halves:
        return 2
    places = -math.floor(math.log10(min(halves)))
    largest = max(abs(i.mean) for i in known)
    if largest > 0 and places + math.floor(math.log10(largest)) + 1 < 3:
        places += 1
    return min(5, max(0, places))


def number(value: float, places: int, sign: bool = False) -> str:
    """With a real minus sign, and never minus zero."""
    text = f"{value:{'+' if sign else ''}.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(i: Interval, places: int, sign: bool = False) -> str:
    """The interval alone: ``28.8 to 30.1``; negative numbers make a dash hard to read."""
    return f"{number(i.ci95[0], places, sign)} to {number(i.ci95[1], places, sign)}"


def megabytes(count: int) -> str:
    """Decimal units, as file managers and download pages count."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def bits(model: ModelReport) -> str:
    """``W4A8``; empty for the 16-bit reference."""
    nominal = model.nominal_bits
    return f"W{nominal['weights']}A{nominal['activations']}" if nominal else ""


def tensor(width: int, granularity: str | None) -> str:
    """A cell of the plan: ``int4 per channel``; what has no granularity is not quantized."""
    return f"int{width} per {granularity}" if granularity else "16 bit"


def seeds(values: Sequence[int]) -> str:
    """``0 to 63`` where they are consecutive, else all of them."""
    if len(values) > 2 and list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def settings(values: dict[str, object]) -> list[tuple[str, str]]:
    """A dictionary of settings as (name, value) for people; what is not set is left out."""
    rows = []
    for name, value in values.items():
        if value is None or value == "":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        rows.append((name.replace("_", " "), str(value)))
    return rows
