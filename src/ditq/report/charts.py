"""Charts as inline SVG, built as an element tree, so that every name in them is escaped."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from ditq.metrics.score import Interval
from ditq.report.document import ModelReport
from ditq.report.wording import interval, megabytes, number
from ditq.report.wording import reference as label

NAMED = 6  # up to this number of models, names stand beside the points; more models get a legend

# Units of the view box. Text of 12 units is still readable on a phone, where a chart is 350 pixels wide.
WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 38, 408, 30, 244

COLOURS = 6  # the classes m0 to m5 in page.css; with the markers they distinguish 30 models
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",  # circle
    "M-4 -4h8v8h-8z",  # square
    "M0 -5L5 4H-5z",  # triangle
    "M0 -5.5L5.5 0L0 5.5L-5.5 0z",  # diamond
    "M0 5L5 -4H-5z",  # triangle on its tip
)


def element(parent: ET.Element | None, tag: str, text: str = "", **attributes: object) -> ET.Element:
    """A new element. ``class_`` becomes ``class``, other underscores become hyphens; floats are rounded."""
    rendered = {
        name.rstrip("_").replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
    }
    new = ET.Element(tag, rendered) if parent is None else ET.SubElement(parent, tag, rendered)
    new.text = text or None
    return new


def drawing(width: float, height: float, title: str, description: str) -> ET.Element:
    """An empty SVG image that screen readers announce by its title and description."""
    root = element(None, "svg", role="img")
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("aria-label", f"{title}. {description}")
    element(root, "title", title)
    element(root, "desc", description)
    return root


def svg(root: ET.Element) -> str:
    """The image as text that can be embedded in an HTML page."""
    return ET.tostring(root, encoding="unicode")


def marker(index: int) -> str:
    """The marker of a model in legends and switches; the reference has index -1."""
    root = element(None, "svg", class_="marker", viewBox="-7 -7 14 14", aria_hidden="true")
    _mark(root, index, 0, 0)
    return svg(root)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about ``count`` of them, at least two."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def pareto(models: Sequence[ModelReport], reference: ModelReport, metric: str, title: str, unit: str) -> str | None:
    """Quality against memory: a point with its 95 % interval for each model. None if no model has both values.

    The dotted line connects the models that no other model beats in both.
    """
    points = [(i, m, m.metrics[metric]) for i, m in enumerate(models) if metric in m.metrics and m.transformer_bytes]
    if not points:
        return None
    described = "; ".join(
        f"{m.name}: {megabytes(m.transformer_bytes)}, {number(s.mean, 1)} {unit}, {interval(s, 1)}"
        for _, m, s in points
    )
    root = drawing(WIDTH, HEIGHT, f"{title} against memory of the transformer", described)
    scale = 1e9 if reference.transformer_bytes >= 1e9 else 1e6
    xs = ticks(0, max(reference.transformer_bytes, *(m.transformer_bytes for _, m, _ in points)) / scale)
    ys = ticks(min(_ends(s)[0] for *_, s in points), max(_ends(s)[1] for *_, s in points))
    x = _axis(xs[0], xs[-1], LEFT, RIGHT)
    y = _axis(ys[0], ys[-1], BOTTOM, TOP)
    _grid(root, x, y, xs, ys, f"transformer memory, {'GB' if scale == 1e9 else 'MB'}", f"{title}, {unit}")
    reference_x = x(reference.transformer_bytes / scale)
    element(root, "line", class_="limit", x1=reference_x, x2=reference_x, y1=float(TOP), y2=float(BOTTOM))
    element(root, "text", label(reference), class_="label m-ref", x=reference_x - 5, y=TOP + 10.0, text_anchor="end")
    by_size = sorted(points, key=lambda p: (p[1].transformer_bytes, -p[2].mean))
    front: list[tuple[float, float]] = []
    for _, m, s in by_size:
        if not front or s.mean > front[-1][1]:
            front.append((m.transformer_bytes, s.mean))
    if len(front) > 1:
        element(root, "polyline", class_="front", points=_points([(x(b / scale), y(q)) for b, q in front]))
    labels = _Labels()
    labels.boxes.append((reference_x - 50, reference_x, TOP + 5.0))
    positions = [(i, m, s, x(m.transformer_bytes / scale), y(s.mean)) for i, m, s in points]
    for i, m, s, px, py in positions:
        group = element(root, "g", class_=_colour(i))
        element(group, "title", f"{m.name}: {number(s.mean, 1)} {unit} at {megabytes(m.transformer_bytes)}")
        low, high = map(y, _ends(s))
        element(group, "path", class_="whisker", d=f"M{px:.2f} {low:.2f}V{high:.2f}M{px - 4:.2f} {low:.2f}h8"
                                                   f"M{px - 4:.2f} {high:.2f}h8")  # fmt: skip
        _mark(group, i, px, py)
        labels.boxes.append((px - 5, px + 5, py))
    if len(models) <= NAMED:
        for i, m, _, px, py in positions:
            labels.put(root, m.name, i, px, py)
    return svg(root)


def curves(models: Sequence[ModelReport], title: str, unit: str) -> str | None:
    """One line for each model along the sampling trajectory, with its 95 % band. None if no model has a curve."""
    plotted = [(i, m.name, m.latent_sqnr_by_step) for i, m in enumerate(models) if m.latent_sqnr_by_step]
    if not plotted:
        return None
    described = "; ".join(
        f"{name}: {number(c.mean[0], 1)} {unit} after the first step, {number(c.mean[-1], 1)} {unit} after the last"
        for _, name, c in plotted
    )
    root = drawing(WIDTH, HEIGHT, f"{title} by step", described)
    steps = max(len(c.mean) for *_, c in plotted)
    xs = [t for t in ticks(1, steps) if 1 <= t <= steps and t == int(t)]
    ends = [value for *_, c in plotted for value in (*c.mean, *(end for pair in c.ci95 for end in pair))]
    ys = ticks(min(ends), max(ends))
    x = _axis(1, max(2, steps), LEFT, RIGHT)
    y = _axis(ys[0], ys[-1], BOTTOM, TOP)
    _grid(root, x, y, xs, ys, "sampling step (the last one yields the image)", f"{title}, {unit}")
    labels = _Labels()
    for i, name, c in plotted:
        group = element(root, "g", class_=_colour(i))
        upper = [(x(k + 1), y(high)) for k, (_, high) in enumerate(c.ci95)]
        lower = [(x(k + 1), y(low)) for k, (low, _) in enumerate(c.ci95)]
        if c.ci95:
            element(group, "polygon", class_="band", points=_points(upper + lower[::-1]))
        element(group, "polyline", class_="curve", points=_points([(x(k + 1), y(v)) for k, v in enumerate(c.mean)]))
        for k, value in enumerate(c.mean):
            point = _mark(group, i, x(k + 1), y(value), small=True)
            element(point, "title", f"{name}, step {k + 1} (t = {c.timesteps[k]:.0f}): {number(value, 1)} {unit}")
    if len(models) <= NAMED:
        for i, name, c in plotted:
            middle = len(c.mean) // 2
            labels.put(root, name, i, x(middle + 1), y(c.mean[middle]) - 9)
    return svg(root)


def bar(share: float, full: float, index: int, mark: float | None = None) -> str:
    """A bar of length ``share`` on a track of length ``full``, with a tick at ``mark``; the numbers are beside it."""
    root = element(None, "svg", class_="bar", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true")
    element(root, "rect", class_="track", width=100, height=10)
    element(root, "rect", class_=f"fill {_colour(index)}", width=100 * share / full, height=10)
    if mark is not None:
        element(root, "rect", class_="one", x=100 * mark / full - 0.2, width=0.4, height=10)
    return svg(root)


def whisker(value: Interval, row: Sequence[Interval], reference: Interval | None, index: int) -> str:
    """Mean and interval on a scale that all cells of a table row share; the tick marks the 16-bit model's mean."""
    intervals = [*row, *([reference] if reference else [])]
    low, high = min(_ends(i)[0] for i in intervals), max(_ends(i)[1] for i in intervals)
    x = _axis(low, high if high > low else low + 1, 5, 95)
    root = element(None, "svg", class_=f"whiskers {_colour(index)}", viewBox="0 0 100 12", aria_hidden="true")
    element(root, "line", class_="rail", x1=0, x2=100, y1=6, y2=6)
    if reference:
        element(root, "line", class_="limit", x1=x(reference.mean), x2=x(reference.mean), y1=0, y2=12)
    first, last = map(x, _ends(value))
    element(root, "line", class_="whisker", x1=first, x2=last, y1=6, y2=6)
    element(root, "circle", class_="mark", cx=x(value.mean), cy=6, r=3)
    return svg(root)


def _ends(i: Interval) -> tuple[float, float]:
    """The ends of the interval, or the mean twice if there is no interval."""
    return i.ci95 or (i.mean, i.mean)


class _Labels:
    """Names beside points, moved up or down until they overlap neither each other nor a point."""

    def __init__(self) -> None:
        self.boxes: list[tuple[float, float, float]] = []  # left, right, middle height

    def put(self, root: ET.Element, name: str, index: int, x: float, y: float) -> None:
        width = 6.4 * len(name)
        rightwards = x + 9 + width <= WIDTH
        left = x + 9 if rightwards else max(0.0, x - 9 - width)
        offsets = sorted(range(-15, 16), key=abs)
        middle = next((y + 7 * k for k in offsets if self._free(left, left + width, y + 7 * k)), y)
        self.boxes.append((left, left + width, middle))
        anchor = "start" if rightwards else "end"
        element(root, "text", name, class_=f"label {_colour(index)}", x=left if rightwards else left + width,
                y=middle + 4, text_anchor=anchor)  # fmt: skip

    def _free(self, left: float, right: float, middle: float) -> bool:
        inside = TOP <= middle <= BOTTOM - 4
        return inside and all(right < a or left > b or abs(middle - m) >= 13 for a, b, m in self.boxes)


class _axis:  # noqa: N801
    """A linear map from values to units of the view box."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start, self.slope = low, start, (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _grid(
    root: ET.Element, x: _axis, y: _axis, xs: Sequence[float], ys: Sequence[float], below: str, above: str
) -> None:
    for value in ys:
        element(root, "line", class_="rail", x1=LEFT, x2=RIGHT, y1=y(value), y2=y(value))
        element(root, "text", _tick(value, ys), class_="tick", x=LEFT - 6, y=y(value) + 4, text_anchor="end")
    for value in xs:
        element(root, "text", _tick(value, xs), class_="tick", x=x(value), y=BOTTOM + 18, text_anchor="middle")
    element(root, "text", below, class_="axis", x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle")
    element(root, "text", above, class_="axis", x=4, y=14)


def _tick(value: float, values: Sequence[float]) -> str:
    step = values[1] - values[0] if len(values) > 1 else 1
    return number(value, max(0, -math.floor(math.log10(step) + 1e-9)))


def _mark(parent: ET.Element, index: int, x: float, y: float, small: bool = False) -> ET.Element:
    shape = MARKERS[index % len(MARKERS)]
    scale = " scale(0.55)" if small else ""
    return element(parent, "path", class_=f"mark {_colour(index)}", d=shape,
                   transform=f"translate({x:.2f} {y:.2f}){scale}")  # fmt: skip


def _colour(index: int) -> str:
    return "m-ref" if index < 0 else f"m{index % COLOURS}"


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in pairs)
