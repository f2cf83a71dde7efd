"""The rows of the metrics table: by family, with the reference's value and the model that is measurably best."""

from __future__ import annotations

from dataclasses import dataclass

from ditq.metrics.score import Interval, Score, Verdict
from ditq.report import wording
from ditq.report.document import MetricInfo, Report

FAMILIES = {
    "fidelity": "Fidelity to the {reference} model, same prompt and seed",
    "alignment": "Alignment with the prompt",
    "distribution": "Distribution, against real images",
    "temporal": "Motion, from frame to frame",
}


@dataclass(frozen=True)
class Row:
    """One metric.

    Attributes:
        scores: one for each quantized model, in the report's order; None where it was not measured.
        reference: the 16-bit model's value; None for fidelity metrics, which compare with that model.
        best: name of the model that is measurably better than every other one, if there is one.
        places: decimal places that all cells of the row share.
        differences: paired differences: the text "a minus b", the difference, and the verdict on a (None for too
            few pairs).
    """

    info: MetricInfo
    scores: list[Score | None]
    reference: Interval | None
    best: str | None
    places: int
    differences: list[tuple[str, Interval, Verdict | None]]

    @property
    def measured(self) -> list[Score]:
        """The scores of the models for which the metric was measured."""
        return [score for score in self.scores if score is not None]

    @property
    def n(self) -> str:
        """``64``, or ``63 to 64`` where models differ."""
        counts = sorted({score.n for score in self.measured})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"

    @property
    def networks(self) -> list[str]:
        """The feature networks behind the numbers."""
        return sorted({score.network for score in self.measured if score.network})


def rows(report: Report) -> dict[str, list[Row]]:
    """The rows of each non-empty family, by the family's title, in the order of :data:`FAMILIES`."""
    families: dict[str, list[Row]] = {}
    base = wording.reference(report.reference)
    for family, template in FAMILIES.items():
        title = template.format(reference=base.replace(" ", "-"))
        for info in report.metrics:
            scores = [model.metrics.get(info.name) for model in report.models]
            measured = [score for score in scores if score is not None]
            if info.family != family or not measured:
                continue
            reference = next((score.reference for score in measured if score.reference), None)
            places = wording.digits([*measured, *([reference] if reference else [])])
            families.setdefault(title, []).append(
                Row(info, scores, reference, measurably_best(report, info.name), places, _paired(report, info.name))
            )
    return families


def _paired(report: Report, metric: str) -> list[tuple[str, Interval, Verdict | None]]:
    base = wording.reference(report.reference)
    scores = [(model.name, model.metrics[metric]) for model in report.models if metric in model.metrics]
    return [
        *((f"{name} minus {base}", s.difference, s.verdict) for name, s in scores if s.difference),
        *((f"{p.a} minus {p.b}", p.difference, p.verdict) for p in report.differences if p.metric == metric),
    ]


def measurably_best(report: Report, metric: str) -> str | None:
    """The model that is measurably better, by paired difference, than every other model with this metric."""
    beats = {model.name: set[str]() for model in report.models if metric in model.metrics}
    for pair in report.differences:
        if pair.metric == metric and pair.verdict in ("better", "worse"):
            winner, loser = (pair.a, pair.b) if pair.verdict == "better" else (pair.b, pair.a)
            beats[winner].add(loser)
    return next((name for name, lost in beats.items() if lost and lost == beats.keys() - {name}), None)
