"""Charts: every point where its numbers say, names escaped, labels apart."""

import re
import xml.etree.ElementTree as ET

import made_up
import pytest

from ditq.metrics.score import Interval
from ditq.report import charts
from ditq.report.document import ModelReport


def drawn(text: str | None) -> ET.Element:
    assert text is not None
    return ET.fromstring(text)


def models(*points: tuple[str, int, float]) -> list[ModelReport]:
    """Models of (name, bytes, PSNR with an interval of 1 dB either way)."""
    one = made_up.report().models[0]
    score = one.metrics["psnr_db"]
    return [
        one.model_copy(
            update={
                "name": name,
                "transformer_bytes": size,
                "metrics": {"psnr_db": score.model_copy(update={"mean": mean, "ci95": (mean - 1, mean + 1)})},
            }
        )
        for name, size, mean in points
    ]


def scale(root: ET.Element, axis: str) -> tuple[float, float]:
    """Offset and slope from values to units of one axis, read off its first and last tick."""
    ticks = [t for t in root.iter("text") if t.get("class") == "tick"]
    ends = {"x": "middle", "y": "end"}
    shift = {"x": 0.0, "y": -4.0}[axis]  # the baseline of a label is below the line it names
    at = [(float(t.text), float(t.get(axis)) + shift) for t in ticks if t.get("text-anchor") == ends[axis]]
    (v0, u0), (v1, u1) = at[0], at[-1]
    slope = (u1 - u0) / (v1 - v0)
    return u0 - slope * v0, slope


def places(root: ET.Element) -> dict[str, tuple[float, float]]:
    """Where each model's mark is, by the name in its tooltip."""
    found = {}
    for group in root.iter("g"):
        mark = next(e for e in group if "mark" in e.get("class", "") and "translate" in e.get("transform", ""))
        x, y = re.match(r"translate\(([-\d.]+) ([-\d.]+)\)", mark.get("transform")).groups()
        found[group.find("title").text.split(":")[0]] = (float(x), float(y))
    return found


def test_pareto_puts_points_where_their_numbers_are() -> None:
    points = [("small", 4_000_000, 31.0), ("large", 11_000_000, 44.0)]
    root = drawn(charts.pareto(models(*points), made_up.report().reference, "psnr_db", "PSNR", "dB"))
    (x0, dx), (y0, dy) = scale(root, "x"), scale(root, "y")
    for name, size, psnr in points:
        assert places(root)[name] == pytest.approx((x0 + dx * size / 1e6, y0 + dy * psnr), abs=0.1)
    assert dy < 0 < dx
    limit = next(e for e in root.iter("line") if e.get("class") == "limit")
    assert float(limit.get("x1")) == pytest.approx(x0 + dx * made_up.REFERENCE_BYTES / 1e6, abs=0.1)


def test_pareto_front_passes_by_what_is_beaten_in_both() -> None:
    points = [("a", 4_000_000, 30.0), ("b", 8_000_000, 28.0), ("c", 10_000_000, 40.0)]
    root = drawn(charts.pareto(models(*points), made_up.report().reference, "psnr_db", "PSNR", "dB"))
    front = next(e for e in root.iter("polyline")).get("points").split()
    corners = [tuple(map(float, corner.split(","))) for corner in front]
    assert corners == [pytest.approx(places(root)[name], abs=0.1) for name in "ac"]


def names_beside_points(count: int) -> list[ET.Element]:
    points = [(f"recipe-number-{i}", 5_000_000 + 20_000 * i, 30 + 0.1 * i) for i in range(count)]
    root = drawn(charts.pareto(models(*points), made_up.report().reference, "psnr_db", "PSNR", "dB"))
    return [text for text in root.iter("text") if text.text.startswith("recipe")]


def test_labels_of_neighbours_do_not_overlap() -> None:
    heights = sorted(float(text.get("y")) for text in names_beside_points(charts.NAMED))
    assert len(heights) == charts.NAMED
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 12


def test_many_models_have_a_legend_instead_of_labels() -> None:
    assert not names_beside_points(charts.NAMED + 1)


def test_curves_have_a_point_a_step_and_a_band_of_the_interval() -> None:
    report = made_up.report()
    root = drawn(charts.curves(report.models, "Latent SQNR", "dB"))
    y0, dy = scale(root, "y")
    for group, model in zip(root.iter("g"), report.models, strict=True):
        curve = model.latent_sqnr_by_step
        line, band = group.find("polyline"), group.find("polygon")
        heights = [float(p.split(",")[1]) for p in line.get("points").split()]
        assert heights == pytest.approx([y0 + dy * v for v in curve.mean], abs=0.1)
        edges = [float(p.split(",")[1]) for p in band.get("points").split()]
        ends = [high for _, high in curve.ci95] + [low for low, _ in curve.ci95][::-1]
        assert edges == pytest.approx([y0 + dy * v for v in ends], abs=0.1)
        assert f"{model.name}, step 1 (t = 999)" in "".join(group.itertext())


def test_nothing_is_drawn_of_nothing() -> None:
    report = made_up.report()
    bare = [m.model_copy(update={"latent_sqnr_by_step": None, "transformer_bytes": 0}) for m in report.models]
    assert charts.curves(bare, "Latent SQNR", "dB") is None
    assert charts.pareto(bare, report.reference, "psnr_db", "PSNR", "dB") is None


def test_names_are_text() -> None:
    name = "<script>alert('1')</script> & \"more\""
    text = charts.pareto(models((name, 4_000_000, 30.0)), made_up.report().reference, "psnr_db", "PSNR", "dB")
    assert "<script" not in text
    assert name in "".join(drawn(text).itertext())


def test_whiskers_of_a_row_share_one_scale() -> None:
    row = [Interval(mean=m, ci95=(m - 1, m + 1), n=9) for m in (10, 20)]
    lines = [
        next(e for e in drawn(charts.whisker(i, row, None, 0)).iter("line") if e.get("class") == "whisker")
        for i in row
    ]
    spans = [(float(e.get("x1")), float(e.get("x2"))) for e in lines]
    assert spans[0][0] == 5 and spans[1][1] == 95
    assert spans[0][1] - spans[0][0] == pytest.approx(spans[1][1] - spans[1][0])


def test_identical_models_make_no_division_by_zero() -> None:
    same = Interval(mean=100, ci95=(100, 100), n=9)
    assert "whisker" in charts.whisker(same, [same], None, 0)
    identical = models(("a", 4_000_000, 100.0))
    identical[0].metrics["psnr_db"] = identical[0].metrics["psnr_db"].model_copy(update={"ci95": (100.0, 100.0)})
    assert charts.pareto(identical, made_up.report().reference, "psnr_db", "PSNR", "dB")


@pytest.mark.parametrize(("low", "high"), [(28.8, 49.2), (0, 18.2), (0.0012, 0.0019), (-3, 3), (7, 7)])
def test_ticks_cover_the_range_in_round_steps(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 9


def test_without_intervals_points_and_curves_remain() -> None:
    report = made_up.without_intervals(made_up.report())
    plot = charts.pareto(report.models, report.reference, "psnr_db", "PSNR", "dB")
    assert plot is not None
    assert "interval not available" in plot
    lines = charts.curves(report.models, "Latent SQNR", "dB")
    assert lines is not None
    assert 'class="band"' not in lines
    assert lines.count('class="curve"') == len(report.models)
    score = report.models[0].metrics["psnr_db"]
    assert "nan" not in charts.whisker(score, [score], None, 0)
