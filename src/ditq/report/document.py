"""The report as data: the contents of ``report.json``, and the source of the HTML page and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ditq.errors import DitqError, UsageError
from ditq.metrics.interval import Interval
from ditq.metrics.layer_errors import LayerErrors, StepTime
from ditq.metrics.score import Curve, PairDifference, Score

__all__ = [
    "Curve",
    "Interval",
    "LayerErrors",
    "MetricInfo",
    "ModelReport",
    "PairDifference",
    "Report",
    "Score",
    "Skipped",
    "StepTime",
    "read",
]

FORMAT_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModelReport(_Model):
    """One model of the comparison. The fields of a plan are None for the 16-bit reference.

    Attributes:
        layers: rows of ``ditq inspect --json`` (name, role, weight_bits, activation_bits, granularity, balance, ...).
        seconds_per_picture: seconds to generate one image, VAE and text encoder included; None if all images came
            from the cache of another machine.
    """

    name: str
    path: str
    fingerprint: str
    pipeline: str
    recipe: str | None = None
    plan_hash: str | None = None
    nominal_bits: dict[str, int] | None = None
    average_bits: float | None = None
    transformer_bytes: int
    seconds_per_picture: float | None = None
    step_time: StepTime | None = None
    metrics: dict[str, Score] = {}
    latent_sqnr_by_step: Curve | None = None
    layer_errors: LayerErrors | None = None
    layers: list[dict[str, Any]] = []


class Skipped(_Model):
    """A metric that was not measured, and why."""

    metric: str
    reason: str


class MetricInfo(_Model):
    """The description of a metric for readers. ``family`` orders the table."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    family: Literal["fidelity", "alignment", "distribution", "temporal"]
    about: str


class Report(_Model):
    """All results of one comparison.

    Attributes:
        summary: sentences for readers; the first one covers all models.
        sampler: scheduler, steps, guidance_scale, width, height, frames.
        environment: device, cpu, threads, versions.
        real: the real images that the distribution metrics compare with: {"name", "n"}.
    """

    format_version: Literal[1] = 1
    title: str
    date: str
    summary: list[str]
    kind: Literal["image", "video"]
    reference: ModelReport
    models: list[ModelReport]
    differences: list[PairDifference] = []
    metrics: list[MetricInfo]
    skipped: list[Skipped] = []
    prompts: list[str]
    seeds: list[int]
    sampler: dict[str, Any]
    environment: dict[str, Any]
    command: str
    real: dict[str, Any] | None = None


def read(path: Path) -> Report:
    """Reads a report.

    Args:
        path: a ``report.json``, or the folder that holds one.

    Raises:
        UsageError: the file does not exist.
        DitqError: it is not a report that this version of ditq can read.
    """
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"There is no report at {file}. `ditq compare ... --out DIR` writes DIR/report.json.")
    try:
        return Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DitqError(f"{file} is not a report of this version of ditq: {field}: {first['msg']}.") from error
