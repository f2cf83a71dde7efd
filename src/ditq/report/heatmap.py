"""The heat map of layer errors by timestep, and the list of the worst layers."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditq.report.charts import drawing, element, svg
from ditq.report.document import LayerErrors
from ditq.report.wording import number

# Nine colours of matplotlib's inferno (van der Walt and Smith, CC0), from good to bad. Lightness rises evenly with the
# error: the map is readable with any colour vision, and bad layers stand out on both themes.
INFERNO = np.array([
    [0x1B, 0x0C, 0x41], [0x4A, 0x0C, 0x6B], [0x78, 0x1C, 0x6D], [0xA5, 0x2C, 0x60], [0xCF, 0x44, 0x46],
    [0xED, 0x69, 0x25], [0xFB, 0x9B, 0x06], [0xF7, 0xD1, 0x3D], [0xFC, 0xFF, 0xA4],
])  # fmt: skip

WIDTH, LEFT, RIGHT, TOP = 420.0, 34.0, 414.0, 20.0


@dataclass(frozen=True)
class Worst:
    """An entry of the list of worst layers; ``row`` and ``column`` are those of its worst cell in the map."""

    name: str
    role: str
    mean_db: float
    row: int
    column: int


def worst(errors: LayerErrors, count: int = 10) -> list[Worst]:
    """The layers with the lowest mean SQNR over timesteps, worst first."""
    values = _decibels(errors)
    means = np.nanmean(values, 1)
    return [
        Worst(errors.layers[i], errors.roles[i], float(means[i]), int(i), int(np.nanargmin(values[i])))
        for i in np.argsort(means, kind="stable")[:count]
    ]


def _decibels(errors: LayerErrors) -> NDArray[np.float64]:
    """SQNR in dB [layers, timesteps]; NaN where a layer is not called."""
    return np.array(errors.sqnr_db, dtype=np.float64)


def shared_range(maps: Sequence[LayerErrors]) -> tuple[float, float]:
    """The range of the colours in dB, the same in all maps. Percentiles keep layers without error from widening it."""
    values = np.concatenate([np.ravel(_decibels(errors)) for errors in maps])
    low, high = np.nanpercentile(values, [0.5, 95])
    low = 5 * np.floor(low / 5)
    return float(low), float(max(low + 5, 5 * np.ceil(high / 5)))


def colours(sqnr_db: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Decibels of any shape to RGB: the lower, the brighter. NaN (a layer that is not called) counts as no error."""
    badness = np.clip((high - np.nan_to_num(sqnr_db, nan=high)) / (high - low), 0, 1) * (len(INFERNO) - 1)
    stops = np.arange(len(INFERNO))
    return np.stack([np.interp(badness, stops, INFERNO[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def chart(errors: LayerErrors, low: float, high: float, name: str) -> str:
    """The map as SVG: layers downwards in the order of execution, sampling steps to the right.

    The cells are one small image with one pixel for each cell. The browser enlarges it without smoothing.
    """
    values = _decibels(errors)
    layers, steps = values.shape
    row = min(14.0, max(1.5, 420 / layers))
    bottom = TOP + row * layers
    worst_layer = worst(errors, 1)[0]
    root = drawing(
        WIDTH, bottom + 36, f"Error of every layer by timestep, {name}",
        f"Mean signal to quantization noise {number(float(np.nanmean(values)), 1)} dB; worst layer {worst_layer.name} "
        f"with {number(worst_layer.mean_db, 1)} dB",
    )  # fmt: skip
    element(root, "text", "block", class_="axis", x=2, y=12)
    element(root, "image", class_="cells", x=LEFT, y=TOP, width=RIGHT - LEFT, height=row * layers,
            preserveAspectRatio="none", href=_png(colours(values, low, high)))  # fmt: skip
    last_label_y = -20.0
    for i, block in first_layers(errors.layers):
        y = TOP + row * i
        if y - last_label_y >= 13:
            element(root, "text", block, class_="tick", x=LEFT - 8, y=y + 10, text_anchor="end")
            element(root, "line", class_="notch", x1=LEFT - 5, x2=LEFT, y1=y, y2=y)
            last_label_y = y
    cell = (RIGHT - LEFT) / steps
    for j in sorted({round(k * (steps - 1) / 5) for k in range(6)}):
        element(root, "text", f"{errors.timesteps[j]:.0f}", class_="tick", x=LEFT + cell * (j + 0.5),
                y=bottom + 15, text_anchor="middle")  # fmt: skip
    element(root, "text", "timestep, from noise to image", class_="axis", x=(LEFT + RIGHT) / 2, y=bottom + 31,
            text_anchor="middle")  # fmt: skip
    element(root, "rect", class_="cursor", x=LEFT, y=TOP, width=cell, height=row, visibility="hidden")
    return svg(root)


def legend() -> str:
    """The colour scale from large errors to small ones, for an ``<img>``; the page prints the numbers beside it."""
    return _png(colours(np.linspace(0, 1, 96)[None], 0, 1))


def first_layers(names: Sequence[str]) -> list[tuple[int, str]]:
    """(row, block number) of the first layer of each block: ``transformer_blocks.3.ff.net.2`` is in block 3."""
    blocks = [match[1] if (match := re.match(r"(.*?\.\d+)\.", name)) else "" for name in names]
    return [
        (i, block.rpartition(".")[2])
        for i, block in enumerate(blocks)
        if block and (i == 0 or block != blocks[i - 1])
    ]  # fmt: skip


def _png(rgb: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
