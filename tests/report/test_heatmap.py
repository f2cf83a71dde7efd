"""The heat map: colours by decibels, one scale for all models, the worst layers."""

import base64
import io
import xml.etree.ElementTree as ET

import made_up
import numpy as np
from PIL import Image

from ditq.report import heatmap
from ditq.report.document import LayerErrors


def errors(values: list[list[float]]) -> LayerErrors:
    rows, columns = np.shape(values)
    return LayerErrors(
        layers=[f"blocks.{i // 2}.l{i % 2}" for i in range(rows)], roles=["ffn.up"] * rows,
        timesteps=[900.0 - 100 * j for j in range(columns)], sqnr_db=values, prompts=2,
    )  # fmt: skip


def luminance(rgb: np.ndarray) -> np.ndarray:
    linear = (rgb / 255.0) ** 2.2
    return linear @ [0.2126, 0.7152, 0.0722]


def test_colours_brighten_evenly_with_the_error() -> None:
    # Lightness alone must carry the value: colour-blind readers see nothing else.
    lightness = np.cbrt(luminance(heatmap.colours(np.linspace(40, 0, 64), 0, 40)))
    steps = np.diff(lightness)
    assert (steps > 0).all()
    assert steps.max() < 4 * steps.mean()


def test_colours_end_at_the_range() -> None:
    beyond = heatmap.colours(np.array([[-5.0, 0.0], [40.0, 99.0]]), 0, 40)
    assert (beyond[0, 0] == beyond[0, 1]).all()
    assert (beyond[1, 0] == beyond[1, 1]).all()


def test_one_pixel_a_cell() -> None:
    values = [[10.0, 20.0, 30.0], [40.0, 35.0, 5.0]]
    root = ET.fromstring(heatmap.chart(errors(values), 5, 40, "model"))
    image = next(root.iter("image"))
    png = base64.b64decode(image.get("href").removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert (pixels == heatmap.colours(np.array(values), 5, 40)).all()


def test_range_is_shared_and_not_stretched_by_exact_layers() -> None:
    exact = errors([[100.0] * 4] + [[22.0, 23.0, 24.0, 28.0]] * 40)
    low, high = heatmap.shared_range([exact, errors([[8.0, 30.0]] * 20)])
    assert (low, high) == (5, 30)


def test_range_of_a_model_without_any_error() -> None:
    low, high = heatmap.shared_range([errors([[100.0, 100.0]])])
    assert high > low


def test_worst_layers_are_those_with_the_lowest_mean() -> None:
    found = heatmap.worst(errors([[30.0, 30.0], [40.0, 4.0], [25.0, 29.0], [50.0, 50.0]]), 3)
    assert [(w.name, w.mean_db, w.row, w.column) for w in found] == [
        ("blocks.0.l1", 22.0, 1, 1),
        ("blocks.1.l0", 27.0, 2, 0),
        ("blocks.0.l0", 30.0, 0, 0),
    ]


def test_blocks_and_timesteps_are_labelled() -> None:
    model = made_up.report().models[0]
    root = ET.fromstring(heatmap.chart(model.layer_errors, 0, 40, model.name))
    ticks = [t.text for t in root.iter("text") if t.get("class") == "tick"]
    assert ticks[:8] == [str(i) for i in range(8)]
    assert (ticks[8], ticks[-1]) == ("999", "49")
    assert model.name in root.find("title").text
