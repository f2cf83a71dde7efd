"""Formats numbers, units and verdicts, the same way on the page and in the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ditq.metrics.interval import FEWEST
from ditq.metrics.score import Interval, Verdict
from ditq.plan import ALWAYS, LayerPlan, TensorFormat
from ditq.report.document import ModelReport

NO_INTERVAL = "interval not available"
NO_VERDICT = f"no verdict from fewer than {FEWEST} pairs"
VERDICTS: dict[Verdict, str] = {"same": "no measurable difference", "better": "better", "worse": "worse"}


def digits(intervals: Iterable[Interval]) -> int:
    """Decimal places for a row: one digit of the narrowest interval, about three of the largest mean, at most 5."""
    values = list(intervals)
    half_widths = [half for i in values if i.ci95 and (half := (i.ci95[1] - i.ci95[0]) / 2) > 0]
    if not half_widths:
        return 2 if all(i.ci95 for i in values) else three_digits(max(abs(i.mean) for i in values))
    places = -math.floor(math.log10(min(half_widths)))
    largest = max(abs(i.mean) for i in values)
    if largest > 0 and places + math.floor(math.log10(largest)) + 1 < 3:
        places += 1
    return min(5, max(0, places))


def three_digits(value: float) -> int:
    """Decimal places that keep about three digits, from 1 to 5; 2 for zero."""
    return 2 if value == 0 else min(5, max(1, 2 - math.floor(math.log10(value))))


def number(value: float, places: int, sign: bool = False) -> str:
    """A number with a real minus sign, and without a sign if it rounds to zero."""
    text = f"{value:{'+' if sign else ''}.{places}f}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(i: Interval, places: int, sign: bool = False) -> str:
    """The interval alone: ``28.8 to 30.1``. A dash would be hard to read between negative numbers."""
    return NO_INTERVAL if i.ci95 is None else f"{number(i.ci95[0], places, sign)} to {number(i.ci95[1], places, sign)}"


def counted(n: int, noun: str) -> str:
    """``1 image``, ``2 images``; ``noun`` is in the singular."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def verdict(value: Verdict | None) -> str:
    """The verdict on a paired difference, in words."""
    return VERDICTS[value] if value else NO_VERDICT


def megabytes(count: int) -> str:
    """A size in decimal units, as in file managers and on download pages."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def bits(model: ModelReport) -> str:
    """``W4A8``, or "" for a model that is not quantized."""
    nominal = model.nominal_bits
    return f"W{nominal['weights']}A{nominal['activations']}" if nominal else ""


def reference(model: ModelReport) -> str:
    """A short name for the reference: ``16 bit``, or its bits if it is itself quantized."""
    return bits(model) or "16 bit"


def tensor(width: int, granularity: str | None) -> str:
    """A cell of the plan: ``int4 per channel``, or ``16 bit`` without a granularity."""
    return f"int{width} per {granularity}" if granularity else "16 bit"


def weights(fmt: TensorFormat) -> str:
    """The format of weights: ``W4 group 128 asym``, ``W4 normal group 64``."""
    return " ".join(["W" + str(fmt.bits), *_granularity(fmt)])


def inputs(fmt: TensorFormat | None) -> str:
    """The format of inputs: ``A8 token dyn``, or ``16 bit`` where they are not quantized."""
    return (
        "16 bit"
        if fmt is None
        else " ".join(["A" + str(fmt.bits), *_granularity(fmt), "dyn" if fmt.dynamic else "static"])
    )


def steps(layer: LayerPlan) -> str:
    """Bits of the inputs by timestep: ``A8, A4 at t 120-870``; "" if they do not change."""
    parts = [f"A{_bits(step.activation)} at t {_range(step.begin, step.end)}" for step in layer.steps or ()]
    return "; ".join(parts)


def ranges(layer: LayerPlan) -> str:
    """The timestep ranges of a layer, with the bits of their weights if they differ."""
    if layer.timesteps is None:
        return ""
    if layer.range_weights is None:
        return f"{len(layer.timesteps)} timestep ranges"
    pairs = zip(layer.range_weights, layer.timesteps, strict=True)
    return "; ".join(f"W{grid.bits} at t {_range(*between)}" for grid, between in pairs)


def _bits(fmt: TensorFormat | None) -> int:
    return 16 if fmt is None else fmt.bits


def _range(begin: float, end: float) -> str:
    """``120-870``, or with an open end ``>870`` and ``<120``."""
    if end >= ALWAYS:
        return f">{begin:.4g}" if begin > -ALWAYS else "any"
    return f"<{end:.4g}" if begin <= -ALWAYS else f"{begin:.4g}-{end:.4g}"


def _granularity(fmt: TensorFormat) -> list[str]:
    size = [str(fmt.group_size)] if fmt.group_size else []
    levels = ["full"] if fmt.full else [] if fmt.levels == "uniform" else [fmt.levels]
    return [*levels, fmt.granularity, *size, *([] if fmt.symmetric else ["asym"])]


def balance(layers: Sequence[LayerPlan]) -> str:
    """The balance of layers that differ in smoothing strength only: ``smooth 0.1-0.6 + hadamard 256``."""
    alphas = sorted({layer.smooth.alpha for layer in layers if layer.smooth})
    first = layers[0].balance
    if len(alphas) < 2 or layers[0].smooth is None:
        return "" if first == "none" else first
    return first.replace(f"smooth {layers[0].smooth.alpha:g}", f"smooth {alphas[0]:g}-{alphas[-1]:g}", 1)


def seeds(values: Sequence[int]) -> str:
    """Consecutive seeds as ``0 to 63``, others as a list."""
    if len(values) > 2 and list(values) == list(range(values[0], values[0] + len(values))):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def settings(values: dict[str, object]) -> list[tuple[str, str]]:
    """A dictionary of settings as readable (name, value) pairs. Values that are None or "" are left out."""
    rows = []
    for name, value in values.items():
        if value is None or value == "":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        rows.append((name.replace("_", " "), str(value)))
    return rows
