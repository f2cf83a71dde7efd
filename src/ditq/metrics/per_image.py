"""Metrics with one value per prompt, in the form that sensitivity measurements take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ditq.allocation.scores import MetricKind
from ditq.allocation.sensitivity import ImageMetrics
from ditq.errors import UsageError, unknown
from ditq.metrics.measure import MEASURES, measure
from ditq.sampling import Samples

DECIBELS = ("psnr_db", "latent_sqnr_db")


def image_metrics(names: Sequence[str], network: str = "auto") -> ImageMetrics:
    """Metrics of ``ditq compare`` by name, for :func:`ditq.allocation.measure_sensitivity`.

    Args:
        names: of metrics that have a value for each prompt.
        network: the feature network, for metrics that need one.

    Raises:
        UsageError: an unknown metric, or one that has a single value for all images (FID and the like).
    """
    known = {m.description.name: m for m in MEASURES if m.kind != "set"}
    for name in names:
        if any(m.description.name == name and m.kind == "set" for m in MEASURES):
            raise UsageError(
                f"{name} has one value for all images; sensitivity needs a value for each prompt: "
                f"{', '.join(sorted(known))}."
            )
        if name not in known:
            raise unknown("metric", name, known)
    kinds = {
        name: MetricKind(
            kind="decibel" if name in DECIBELS else "own" if known[name].kind == "own" else "paired",
            higher_is_better=known[name].description.higher_is_better,
            title=known[name].description.title,
        )
        for name in names
    }

    def values(reference: Samples, other: Samples) -> Mapping[str, Sequence[float]]:
        return measure(reference, {"probe": other}, metrics=list(names), network=network).values["probe"]

    return ImageMetrics(kinds, values)
