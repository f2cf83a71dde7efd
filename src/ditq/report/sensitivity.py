"""Sensitivity scores for readers: tables, heat maps by timestep, and one self-contained HTML page."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ditq.allocation.choices import Segment, segments_of
from ditq.allocation.decoupled import decoupling
from ditq.allocation.scores import PREDICTION, Scores, mean_and_error
from ditq.files import write_text
from ditq.report import charts, heatmap, html, wording
from ditq.report.charts import drawing, element, svg
from ditq.report.document import LayerErrors
from ditq.report.tables import folded
from ditq.report.terminal import table
from ditq.report.wording import counted, number

Array = NDArray[np.float64]
Matrix = Sequence[Sequence[float]] | Array

PARTS = 4  # of the sampling run in a heat map
PART_NAMES = {1: "run", 2: "half", 3: "third", 4: "quarter"}

MOST = 60  # genes in a table of the terminal
NAME_ROOM = 24  # columns of the terminal for the names of genes, at least
BETWEEN = 3  # columns of the terminal between two columns of a table
WORST = 10  # genes in the list beside a heat map

# Units of the view box of a heat map, see charts.py. Text has 12 units on a phone and 10 elsewhere.
WIDTH, RIGHT, TOP = 420.0, 414.0, 24.0
TEXT, LETTER, GAP = 13.0, 7.2, 6.0
LETTERS = 20  # of a label
SMALLEST_ERROR = 1e-10  # 100 dB, as in the heat map of layer errors


class Decoupling(TypedDict):
    """Arguments of :func:`decoupling_table`."""

    name: str
    groups: Sequence[str]
    metrics: Sequence[str]
    drops: Matrix
    errors: Matrix
    loads: Matrix


@dataclass(frozen=True)
class Shown:
    """A metric of scores as it is shown: the mean of every gene at every choice, and its standard error.

    Attributes:
        title: with the unit.
        higher_is_better: of the shown numbers.
        mean, error: [genes][choices]. Errors become percent, decibels are those of the mean error, and values against
            the 16-bit image stay as they are. The error is NaN with a single prompt.
        places: decimal places of each choice.
        worst: the gene with the largest harm at each choice.
    """

    title: str
    higher_is_better: bool
    mean: Array
    error: Array
    places: tuple[int, ...]
    worst: tuple[int, ...]

    def text(self, gene: int, choice: int) -> str:
        """``0.45 ± 0.10``; without the error if there is a single prompt."""
        places = self.places[choice]
        mean, error = number(self.mean[gene, choice], places), self.error[gene, choice]
        return f"{mean} ± {number(error, places)}" if np.isfinite(error) else mean


def shown(scores: Scores, metric: str = PREDICTION) -> Shown:
    """The numbers of a metric for tables.

    Raises:
        UsageError: the scores do not have this metric.
    """
    mean, error = mean_and_error(scores.harms(metric))
    worst = tuple(map(int, mean.argmax(0)))
    kind = scores.metrics[metric]
    title, higher = kind.title, False
    if kind.kind == "decibel":
        least = np.maximum(mean, SMALLEST_ERROR)
        mean, error = -10 * np.log10(least), 10 / math.log(10) * error / least
        title, higher = f"{title}, dB", True
    elif kind.kind == "paired":
        mean, higher = (-mean if kind.higher_is_better else mean), kind.higher_is_better
    else:
        mean, error = 100 * mean, 100 * error
        title = f"{title}, drop from 16 bit in %" if kind.kind == "own" else f"{title}, %"
    places = tuple(_places(mean[:, i], error[:, i]) for i in range(len(scores.choices)))
    return Shown(title, higher, mean, error, places, worst)


def _places(mean: Array, error: Array) -> int:
    """Decimal places: one digit of the smaller errors and about three of the largest mean, at most 6."""
    errors, largest = error[np.isfinite(error) & (error > 0)], float(np.abs(mean).max())
    first = math.floor(math.log10(largest)) if largest > 0 else 0
    places = 2 - first
    if errors.size:
        places = -math.floor(math.log10(np.quantile(errors, 0.1)))
        places += places + first < 2
    return min(6, max(0, places))


def label(scores: Scores, several: bool = False) -> str:
    """``weights``, or ``transformer_2, weights`` on a page of several transformers."""
    component = scores.info.get("component", "")
    return f"{component}, {scores.part}" if several and component else scores.part


def has_several(scores: Sequence[Scores]) -> bool:
    """Whether the scores are of more than one transformer."""
    return len({one.info.get("component", "") for one in scores}) > 1


def tables(scores: Scores, metric: str = PREDICTION, *, name: str = "", width: int = 80) -> list[Table]:
    """The table of a metric for the terminal: genes in the order of the model, choices to the right.

    Choices that do not fit into the width continue in another table. Of more than :data:`MOST` genes, the worst at the
    last choice are shown.

    Args:
        name: of the scores in the title, see :func:`label`; by default the part.
        width: columns of the terminal.

    Raises:
        UsageError: the scores do not have this metric.
    """
    values = shown(scores, metric)
    genes = _listed(scores, metric)
    cells = [
        [values.text(gene, i) + (" *" if gene == values.worst[i] else "  ") for i in range(len(scores.choices))]
        for gene in genes
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(scores.choices))]
    room = min(max(len(scores.genes[gene]) for gene in genes), NAME_ROOM)
    chunks: list[list[int]] = [[]]
    for i in range(len(scores.choices)):
        if chunks[-1] and room + sum(widths[j] + BETWEEN for j in [*chunks[-1], i]) > width:
            chunks.append([])
        chunks[-1].append(i)
    n = len(set(scores.prompts))
    notes = [f"mean ± standard error over {counted(n, 'prompt')}" if n > 1 else "one prompt: no standard error"]
    notes.append("* worst of its column")
    if len(genes) < len(scores.genes):
        notes.append(f"the {len(genes)} worst of {len(scores.genes)} at {scores.choices[-1]}")
    caption = "; ".join(notes)
    result = []
    for chunk in chunks:
        title = f"{name or scores.part}: {values.title} {'↑' if values.higher_is_better else '↓'}"
        one = table(title=title, caption=caption)
        others = sum(widths[i] + BETWEEN for i in chunk)
        left = max(room, width - others)
        # As wide as the lines above and below it, which would be wrapped otherwise.
        one.add_column(scores.unit, min_width=min(left, max(len(title), len(caption)) - others))
        for i in chunk:
            one.add_column(scores.choices[i] + "  ", justify="right", no_wrap=True)
        for gene, row in zip(genes, cells, strict=True):
            one.add_row(folded(scores.genes[gene], left), *(row[i] for i in chunk))
        result.append(one)
    return result


def _listed(scores: Scores, metric: str) -> list[int]:
    """The genes of a table of the terminal, in the order of the model."""
    if len(scores.genes) <= MOST:
        return list(range(len(scores.genes)))
    mean, _ = mean_and_error(scores.harms(metric))
    return sorted(np.argsort(-mean[:, -1], kind="stable")[:MOST].tolist())


def sentence(scores: Scores, name: str = "") -> str:
    """The most sensitive gene at the last choice, and how far it is from the median one."""
    values, last = shown(scores), len(scores.choices) - 1
    gene = values.worst[last]
    mean = values.mean[:, last]
    text = (
        f"{(name or scores.part).capitalize()} at {scores.choices[last]}: {scores.genes[gene]} is the most sensitive "
        f"{scores.unit}, with a prediction error of {values.text(gene, last)} %"
    )
    median = float(np.median(mean))
    return f"{text}, {number(mean[gene] / median, 1)} × the median {scores.unit}." if median > 0 else f"{text}."


def decoupling_table(
    groups: Sequence[str], metrics: Sequence[str], drops: Matrix, errors: Matrix, loads: Matrix, name: str = ""
) -> Table:
    """Which group of roles moves which metric (ViDiT-Q, Figure 20), for the terminal.

    Args:
        groups: of roles, e.g. content (cross-attention), quality (self-attention and FFN), temporal.
        metrics: their titles.
        drops: relative drop of the metric if this group alone is quantized, [groups][metrics].
        errors: standard errors of the drops; NaN if unknown.
        loads: how the effect of a group is shared between the metrics, from 0 to 1, [groups][metrics].
        name: of the scores and the choice in the title.
    """
    title = "drop of each metric with one group quantized, %"
    title = f"{name}: {title}" if name else title
    result = table(
        "group", title=title, min_width=len(title),
        caption="mean ± standard error; load: share of the metric in the effect of the group; * the largest",
    )  # fmt: skip
    for metric in metrics:
        result.add_column(metric, justify="right", overflow="fold")
    for group, row in zip(groups, _decoupled(drops, errors, loads), strict=True):
        result.add_row(
            group, *(f"{text}{' *' if most else '  '}\nload {number(load, 2)}  " for text, load, most in row)
        )
    return result


def decoupling_of(scores: Scores, name: str = "") -> Decoupling | None:
    """Which group of roles moves which metric at the cheapest choice.

    Args:
        name: of the scores in the title, see :func:`label`; by default the part.

    Returns:
        None for scores without metrics of images, and for those by block: a block has roles of several groups.
    """
    if len(scores.metrics) < 2 or scores.unit == "block":
        return None
    found = decoupling(scores, scores.choices[-1])
    unknown = np.full(found.errors.shape, np.nan)
    return {
        "name": f"{name or scores.part} at {found.choice}", "groups": found.groups,
        "metrics": [scores.metrics[metric].title for metric in found.metrics],
        "drops": found.drops, "errors": found.errors if len(set(scores.prompts)) > 1 else unknown,
        "loads": found.loads,
    }  # fmt: skip


def _decoupled(drops: Matrix, errors: Matrix, loads: Matrix) -> list[list[tuple[str, float, bool]]]:
    """[groups][metrics]: the drop with its error in percent, the load, and whether it is the largest of the group."""
    mean, error, load = (np.asarray(x, dtype=np.float64) for x in (drops, errors, loads))
    count = mean.shape[1]
    places = [_places(100 * mean[:, j], 100 * error[:, j]) for j in range(count)]
    return [
        [
            (
                number(100 * mean[i, j], places[j])
                + (f" ± {number(100 * error[i, j], places[j])}" if np.isfinite(error[i, j]) else ""),
                float(load[i, j]),
                count > 1 and int(load[i].argmax()) == j,
            )
            for j in range(count)
        ]
        for i in range(len(mean))
    ]


def parts_of(scores: Scores) -> tuple[Segment, ...]:
    """The quarters of the sampling run; fewer parts of a run of fewer steps."""
    return segments_of(scores.steps, min(PARTS, len(scores.steps)))


def by_timestep(scores: Scores) -> LayerErrors:
    """The prediction error in dB (SQNR, at most 100) of every gene at every choice and part of the sampling run.

    Returns:
        One row for each gene. The columns are the parts of the first choice, then those of the second, and so on. A
        cell without a measured timestep is None.
    """
    columns = []
    segments = parts_of(scores)
    for choice in range(len(scores.choices)):
        for segment in segments:
            harms = scores.harms(between=(segment.begin, segment.end))[:, choice]
            known: NDArray[np.bool_] = ~np.isnan(harms)
            mean = np.where(known, harms, 0).sum(1) / np.maximum(known.sum(1), 1)
            decibels = -10 * np.log10(np.maximum(mean, SMALLEST_ERROR))
            columns.append([float(x) if known[i].any() else None for i, x in enumerate(decibels)])
    return LayerErrors(
        layers=list(scores.genes), roles=[", ".join(dict.fromkeys(roles)) for roles in scores.roles],
        timesteps=[float(i) for i in range(len(columns))], sqnr_db=[list(row) for row in zip(*columns, strict=True)],
        prompts=len(set(scores.prompts)),
    )  # fmt: skip


def heat_map(scores: Scores, low: float, high: float, name: str = "") -> str:
    """The prediction error by part of the sampling run as SVG: genes downwards, choices and their parts to the right.

    A cell says its numbers when the pointer rests on it. Cells without a measured timestep are grey.

    Args:
        low, high: range of the colours in dB, see :func:`ditq.report.heatmap.shared_range`.
        name: of the scores in the title, see :func:`label`; by default the part.
    """
    values, segments = by_timestep(scores).sqnr_db, parts_of(scores)
    labels = _row_labels(scores)
    left = max(34.0, 14 + LETTER * max(map(len, labels.values()), default=0))
    row = min(14.0, max(1.5, 420 / len(scores.genes)))
    bottom = TOP + row * len(scores.genes)
    root = drawing(
        WIDTH, bottom + 36, f"Prediction error by part of the sampling run, {name or scores.part}",
        sentence(scores, name),
    )  # fmt: skip
    heading = "block" if scores.unit == "layer" else scores.unit
    element(root, "text", heading, class_="axis", x=2, y=12)
    last = -20.0
    for i, text in labels.items():
        y = TOP + row * i
        if y - last >= TEXT:
            element(root, "text", text, class_="tick", x=left - 8, y=y + 10, text_anchor="end")
            element(root, "line", class_="notch", x1=left - 5, x2=left, y1=y, y2=y)
            last = y
    group = (RIGHT - left + GAP) / len(scores.choices)
    cell = (group - GAP) / len(segments)
    cells = element(root, "g", shape_rendering="crispEdges")
    for c, choice in enumerate(scores.choices):
        x = left + group * c
        element(root, "text", choice, class_="tick", x=x + (group - GAP) / 2, y=TOP - 6, text_anchor="middle")
        for s, segment in enumerate(segments):
            element(root, "text", str(s + 1), class_="tick", x=x + cell * (s + 0.5), y=bottom + 14,
                    text_anchor="middle")  # fmt: skip
            for i, gene in enumerate(scores.genes):
                _cell(cells, x + cell * s, TOP + row * i, cell, row, values[i][c * len(segments) + s], low, high,
                      f"{gene}, {choice}, {segment}")  # fmt: skip
    axis = f"{PART_NAMES[len(segments)]} of the sampling run, from noise to image"
    element(root, "text", axis, class_="axis", x=WIDTH / 2, y=bottom + 31, text_anchor="middle")
    return svg(root)


def _row_labels(scores: Scores) -> dict[int, str]:
    """Labels by row: the number of a block, the first layer of each block, or a role."""
    if scores.unit == "layer":
        return dict(heatmap.first_layers(scores.genes))
    last = [gene.rpartition(".")[2] for gene in scores.genes]
    names = [digits if digits.isdigit() else gene for digits, gene in zip(last, scores.genes, strict=True)]
    return {i: name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…" for i, name in enumerate(names)}


def _cell(
    parent: ET.Element, x: float, y: float, width: float, height: float, decibels: float | None, low: float,
    high: float, name: str,
) -> None:  # fmt: skip
    if decibels is None:
        text, colour = "no timestep was measured", {"class_": "gap"}
    else:
        rgb = heatmap.colours(np.array(decibels), low, high)
        text = f"{100 * 10 ** (-decibels / 10):.2g} %, {number(decibels, 1)} dB"
        colour = {"fill": "#" + bytes(rgb).hex()}
    rect = element(parent, "rect", x=x, y=y, width=width, height=height, **colour)
    element(rect, "title", f"{name}: {text}")


def worst(scores: Scores) -> list[tuple[str, str]]:
    """(gene, prediction error) of the worst genes at the last choice, worst first."""
    values, last = shown(scores), len(scores.choices) - 1
    order = np.argsort(-values.mean[:, last], kind="stable")[:WORST]
    return [(scores.genes[i], f"{values.text(int(i), last)} %") for i in order]


def render(
    scores: Sequence[Scores],
    agreement: Sequence[str] = (),
    decouplings: Sequence[Decoupling] = (),
    title: str = "",
) -> str:
    """The page as text, to be written in UTF-8. Arguments: see :func:`write_report`.

    The page has no script. Its content security policy allows the inline style that is hashed here, and data URIs.

    Raises:
        DitqError: jinja2 is not installed.
    """
    page = html.template("sensitivity.html.j2")
    style = html.asset("page.css")
    several = has_several(scores)
    return page.render(
        title=title or "Sensitivity to quantization",
        scores=[(f"scores-{i}", label(one, several), one) for i, one in enumerate(scores)],
        range=heatmap.shared_range([by_timestep(one) for one in scores]),
        shown=shown, sentence=sentence, worst=worst, heat_map=heat_map, parts_of=parts_of, part_names=PART_NAMES,
        agreement=list(agreement),
        decouplings=[(one, _decoupled(one["drops"], one["errors"], one["loads"])) for one in decouplings],
        charts=charts, heatmap=heatmap, words=wording, style=style, style_hash=html.sha256(style),
    )  # fmt: skip


def write_report(
    path: str | Path,
    scores: Scores | Sequence[Scores],
    agreement: Sequence[str] = (),
    decouplings: Sequence[Decoupling] = (),
    *,
    title: str = "",
) -> Path:
    """Writes the page of one or several scores atomically, replacing an earlier one.

    Args:
        path: the file, or an existing folder, in which it becomes ``report.html``.
        scores: of weights and activations, of one or several transformers.
        agreement: lines about the agreement of ranks between disjoint sets of prompts.
        decouplings: which group of roles moves which metric, see :func:`decoupling_of`.
        title: of the page.

    Returns:
        The path of the file.

    Raises:
        DitqError: jinja2 is not installed.
    """
    file = Path(path) / "report.html" if Path(path).is_dir() else Path(path)
    write_text(file, render([scores] if isinstance(scores, Scores) else scores, agreement, decouplings, title))
    return file
