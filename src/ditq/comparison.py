"""``compare``: measures any number of quantized models against a 16-bit one on the same prompts and noise."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch
from torch import nn

from ditq import api, architectures
from ditq.architectures import Architecture
from ditq.checkpoint.folder import resolve
from ditq.checkpoint.variants import has_variant
from ditq.components import plan_of, prefixed, transformers
from ditq.environment import environment
from ditq.errors import DitqError, UsageError
from ditq.metrics.interval import Interval
from ditq.metrics.layer_errors import LayerErrors, StepTime, TimedCall, layer_errors, step_times
from ditq.metrics.measure import BASIC, Measurement, measure
from ditq.metrics.real import Real, from_features, from_folder, videos_from_folder
from ditq.metrics.score import Curve, Score
from ditq.plan import Plan
from ditq.report.document import MetricInfo, ModelReport, Report, Skipped
from ditq.report.summary import summary
from ditq.report.tables import layer_json
from ditq.sampling import PictureCache, Samples, Sampling, condition_list, first_call, sample

BUNDLED_NETWORK = "emoji-classifier"

# A pipeline; a path (folder, hub id, bundled:NAME) or a function without arguments, from which the pipeline is loaded
# when it is needed; or Samples.
Side = Any


@dataclass
class Subject:
    """One model of a comparison.

    Attributes:
        name: of the model in tables and reports.
        path: folder, hub id or ``bundled:NAME``; empty if the model was not loaded from one.
        samples: the images or videos that the model generated.
        pipeline: class name of the pipeline; empty if only samples were passed.
        plans: plans of the quantized transformers, by component.
        bytes_of: stored bytes of each transformer's parameters; those not quantized count as 16 bit.
        scheduler: class name of the scheduler; empty if only samples were passed.
        errors: layer errors of a quantized model against the reference; None if they were not measured.
        step_time: time of one transformer call; None if it was not measured.
    """

    name: str
    path: str
    samples: Samples
    pipeline: str = ""
    plans: dict[str, Plan] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    scheduler: str = ""
    errors: LayerErrors | None = None
    step_time: StepTime | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan of the first quantized transformer; None if there is none."""
        return next(iter(self.plans.values()), None)

    @property
    def transformer_bytes(self) -> int:
        """Bytes of all transformers together."""
        return sum(self.bytes_of.values())


@dataclass
class Comparison:
    """The result of :func:`compare`: models on the same prompts and seeds.

    Attributes:
        reference: the 16-bit model.
        models: the quantized models by name.
        measurement: every metric of every model, differences between models, and skipped metrics with the reason.
        settings: seed, steps, guidance scale and batch size of the run.
        real: real images or videos, if they were used.
        environment: versions and hardware.
    """

    reference: Subject
    models: dict[str, Subject]
    measurement: Measurement
    settings: dict[str, Any]
    real: Real | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Interval]:
        """The metrics of the first quantized model by name."""
        return dict(next(iter(self.measurement.scores.values())))

    @property
    def values(self) -> dict[str, list[float]]:
        """Values per prompt of the first quantized model, for the metrics that have one per prompt."""
        return next(v for name, v in self.measurement.values.items() if name)

    @property
    def other(self) -> Samples:
        """The samples of the first quantized model."""
        return next(iter(self.models.values())).samples

    def report(self, title: str = "", command: str = "") -> Report:
        """The whole measurement as the data of ``report.json``.

        Args:
            title: of the report; by default the names of the models.
            command: command line that repeats the comparison.
        """
        samples = self.reference.samples
        first = samples.images[0]
        width, height = first[0].size if samples.is_video else first.size
        report = Report(
            title=title or f"{', '.join(self.models)} against {self.reference.name}",
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            summary=[],
            kind="video" if samples.is_video else "image",
            reference=_model_report(self.reference),
            models=[
                _model_report(subject, self.measurement.scores[name], self.measurement.curves[name])
                for name, subject in self.models.items()
            ],
            differences=self.measurement.differences,
            metrics=[MetricInfo(**asdict(d)) for d in self.measurement.descriptions],
            skipped=[Skipped(metric=k, reason=v) for k, v in self.measurement.skipped.items()],
            prompts=samples.conditions,
            seeds=samples.seeds,
            sampler={
                "scheduler": self.reference.scheduler,
                "steps": len(samples.timesteps),
                "guidance_scale": self.settings["guidance_scale"] or "the pipeline's default",
                "batch_size": self.settings["batch_size"],
                "width": width,
                "height": height,
                "frames": len(first) if samples.is_video else 1,
            },
            environment=self.environment,
            command=command,
            real=None if self.real is None else {"name": self.real.name, "n": len(self.real)},
        )
        report.summary = summary(report)
        return report

    def pictures(self) -> dict[str, list[Any]]:
        """The images or videos of every model by name, the reference first."""
        return {s.name: s.samples.images for s in (self.reference, *self.models.values())}

    def as_dict(self) -> dict[str, Any]:
        """The stable JSON of ``ditq compare --json``; metrics at the top are those of the first quantized model."""
        scores = {
            name: {metric: _score_json(score) for metric, score in by_metric.items()}
            for name, by_metric in self.measurement.scores.items()
        }
        return {
            "pairs": len(self.reference.samples.images),
            "seed": self.settings["seed"],
            "prompts": self.reference.samples.conditions,
            **next(iter(scores.values())),
            "models": scores,
            "differences": [d.model_dump(mode="json") for d in self.measurement.differences],
            "skipped": self.measurement.skipped,
            "settings": self.settings,
        }


def compare(
    reference: Side,
    quantized: Side | Sequence[Side] | Mapping[str, Side],
    prompts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    arguments: Mapping[str, Any] | None = None,
    architecture: str | Path | Architecture | None = None,
    metrics: Sequence[str] | Literal["all"] = BASIC,
    network: str = "auto",
    real: Real | Path | None = None,
    cache: PictureCache | None = None,
    explain: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    progress: api.Progress | None = None,
) -> Comparison:
    """Generates the same prompts with the same noise by all pipelines and compares the images pair by pair.

    Paths are loaded (and functions called) one after the other, so that at most two models are in memory. Any model
    may be passed as finished :class:`Samples`, so that a reference is sampled once for many models.

    Args:
        reference: the 16-bit model: a pipeline, a path, a function that returns a pipeline, or samples.
        quantized: one model, a list (named by their folders) or a mapping from names to models.
        prompts: prompts, or class names or numbers. Not needed if all models are samples.
        seed, steps, guidance_scale, batch_size: see :class:`ditq.sampling.Sampling`.
        arguments: of the pipelines' calls, e.g. ``{"height": 256, "width": 256, "num_frames": 17}``.
        architecture: name or YAML file, if ditq does not support the transformer's class.
        metrics, network: see :func:`ditq.metrics.measure.measure`.
        real: real images or videos, or a folder of them. A ``bundled:`` reference of images has default real images
            with a feature network of their own.
        cache: where images are kept; None keeps none.
        explain: number of prompts on which the error of every layer and the time of a transformer call are measured,
            if both sides are models; 0 measures neither. With two transformers (Wan 2.2), the layers of both.
        device, dtype: of pipelines that are loaded from a path.
        variant: of the weights of the reference, as in ``ditq.load(path, variant=...)``, and of those of the quantized
            models that have it.
        progress: called with (stage, done, total).

    Raises:
        UsageError: no prompts or an empty prompt, two models with the same name, or see
            :func:`ditq.metrics.measure.measure`.
        DitqError: a model generates NaN or Inf.

    Example:
        >>> import ditq
        >>> pipe = ditq.load("bundled:emoji-t2i")
        >>> plan = ditq.quantize(pipe, "rtn-w8a8").plan
        >>> prompts = [f"a noto style emoji of a {thing}" for thing in ("dog", "red apple", "house")]
        >>> result = ditq.compare("bundled:emoji-t2i", {"W8A8": pipe}, prompts, steps=2)
        >>> result.metrics["psnr_db"].mean > 30, result.metrics["psnr_db"].n
        (True, 3)
    """
    named = _named(quantized)
    sampling = Sampling(seed, steps, guidance_scale, batch_size, dict(arguments or {}))
    prompts = None if prompts is None else condition_list(prompts)  # before a model is loaded
    run = _Run(prompts, sampling, architecture, cache, device, dtype, progress)
    base = run.open(reference, variant)
    first = run.subject(_name(reference, "reference"), reference, base, "reference")
    models: dict[str, Subject] = {}
    for name, side in named.items():
        pipe = run.open(side, variant if _has_variant(side, variant) else None)
        subject = models[name] = run.subject(name, side, pipe, "quantized" if len(named) == 1 else name)
        if explain and subject.plans and not isinstance(base, Samples):
            subject.errors, first.step_time, subject.step_time = run.explain(base, pipe, name, explain)
        del pipe
        gc.collect()
    if network == "auto" and isinstance(reference, str) and reference.startswith("bundled:"):
        network, real = BUNDLED_NETWORK, real or (None if first.samples.is_video else bundled_real())
    if isinstance(real, Path):
        example = first.samples.images[0]
        video = first.samples.is_video
        real = videos_from_folder(real, example[0].size) if video else from_folder(real, example.size)
    measurement = measure(
        first.samples, {name: s.samples for name, s in models.items()}, metrics=metrics, network=network,
        real=real, on_metric=None if progress is None else lambda done, total: progress("metrics", done, total),
    )  # fmt: skip
    if cache is not None:
        cache.prune()
    return Comparison(first, models, measurement, _settings(sampling), real, environment())


@dataclass(frozen=True)
class _Run:
    """Settings shared by all sides of one comparison; see :func:`compare`."""

    prompts: Sequence[str] | None
    sampling: Sampling
    architecture: str | Path | Architecture | None
    cache: PictureCache | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    progress: api.Progress | None

    def open(self, side: Side, variant: str | None) -> Any:
        """The pipeline of a side, loaded if necessary; or its samples."""
        if isinstance(side, FunctionType):
            return side()
        if not isinstance(side, str | Path):
            return side
        pipe = api.load(side, dtype=self.dtype, variant=variant)
        return pipe.to(self.device) if self.device is not None else pipe

    def subject(self, name: str, side: Side, pipe: Any, stage: str) -> Subject:
        """A side with its samples."""
        path = str(side) if isinstance(side, str | Path) else ""
        if isinstance(pipe, Samples):
            return Subject(name, path, pipe)
        if self.prompts is None:
            raise UsageError("compare() needs prompts, unless all sides are Samples.")
        prompts = condition_list(self.prompts)
        samples = sample(
            pipe, self._architecture_of(pipe), prompts, self.sampling, cache=self.cache,
            on_batch=self._ticker(stage, len(prompts)),
        )  # fmt: skip
        if not bool(torch.isfinite(samples.trajectory).all()):
            raise DitqError(f"The {stage} model generates NaN or Inf.")
        models = transformers(pipe)
        return Subject(
            name, path, samples, type(pipe).__name__,
            {component: plan for component, model in models.items() if (plan := plan_of(model)) is not None},
            {component: _bytes(model) for component, model in models.items()}, type(pipe.scheduler).__name__,
        )  # fmt: skip

    def explain(self, base: Any, pipe: Any, name: str, count: int) -> tuple[LayerErrors | None, StepTime, StepTime]:
        """Layer errors on ``count`` prompts, and the times of a transformer call of both pipelines."""
        assert self.prompts is not None
        architecture, prompts = self._architecture_of(base), condition_list(self.prompts)[:count]
        if any(_compiled(model) for model in transformers(pipe).values()):  # the layers of a graph cannot be hooked
            with torch.no_grad():
                call = first_call(base, architecture, prompts, self.sampling)
                return None, *step_times([TimedCall(base.transformer, pipe.transformer, (), call)])
        on_step = self._ticker(f"layers of {name}", 0)
        return layer_errors(base, pipe, architecture, prompts, self.sampling, on_step=on_step)

    def _architecture_of(self, pipe: Any) -> Architecture:
        if self.architecture:
            return architectures.load(self.architecture)
        return architectures.match(pipe.transformer)

    def _ticker(self, stage: str, total: int) -> Callable[[int], None]:
        """A function that sums finished steps and reports the sum as progress."""
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if self.progress:
                self.progress(stage, done, max(total, done))

        return tick


def _has_variant(side: Side, variant: str | None) -> bool:
    folder = resolve(side) if isinstance(side, str | Path) else None
    return variant is not None and isinstance(folder, Path) and has_variant(folder, variant)


def _settings(sampling: Sampling) -> dict[str, Any]:
    """Settings as in the JSON of a comparison; without an empty ``arguments``."""
    settings = asdict(sampling)
    return settings if sampling.arguments else {k: v for k, v in settings.items() if k != "arguments"}


def _score_json(score: Score) -> dict[str, Any]:
    """One metric as JSON. With too few pairs, its interval and its verdict are null."""
    data = score.model_dump(mode="json", exclude_none=True)
    for part in (data, data.get("reference"), data.get("difference")):
        if part is not None:
            part.setdefault("ci95", None)
    return {**data, "verdict": score.verdict} if score.difference else data


def _model_report(
    subject: Subject, metrics: dict[str, Score] | None = None, curve: Curve | None = None
) -> ModelReport:
    plans, samples = list(subject.plans.values()), subject.samples
    first = plans[0] if plans else None
    return ModelReport(
        name=subject.name,
        path=subject.path,
        fingerprint=samples.fingerprint,
        pipeline=subject.pipeline,
        recipe=", ".join(dict.fromkeys(plan.recipe for plan in plans)) if plans else None,
        plan_hash=" ".join(plan.hash() for plan in plans) if plans else None,
        nominal_bits=(
            {"weights": first.nominal_weight_bits, "activations": first.nominal_activation_bits} if first else None
        ),
        average_bits=_average_bits(subject),
        transformer_bytes=subject.transformer_bytes,
        seconds_per_picture=statistics.median(samples.seconds),
        step_time=subject.step_time,
        metrics=metrics or {},
        latent_sqnr_by_step=curve,
        layer_errors=subject.errors,
        layers=[
            {**layer_json(layer), "name": prefixed(component, layer.name)}
            for component, plan in subject.plans.items()
            for layer in plan
        ],
    )


def _average_bits(subject: Subject) -> float | None:
    """Average bits per weight over all transformers of a pipeline; None if all of them are in 16 bit."""
    if not subject.plans:
        return None
    if len(subject.bytes_of) == 1:
        return next(iter(subject.plans.values())).average_bits
    bits = parameters = 0.0
    for component, size in subject.bytes_of.items():
        plan = subject.plans.get(component)
        count = (plan.memory()[1] if plan else size) / 2
        bits += count * (plan.average_bits if plan else 16)
        parameters += count
    return bits / parameters


def bundled_real() -> Real | None:
    """Features of the artwork on which the bundled models were trained, by their feature network."""
    import ditq_bundled

    try:
        path = Path(ditq_bundled.network(BUNDLED_NETWORK)) / "reference.safetensors"
    except ValueError:  # an older version of ditq-bundled
        return None
    return from_features("the artwork it learned", BUNDLED_NETWORK, path)


def _named(quantized: Side | Sequence[Side] | Mapping[str, Side]) -> dict[str, Side]:
    if isinstance(quantized, Mapping):
        return dict(quantized)
    if not isinstance(quantized, list | tuple):
        return {_name(quantized, "quantized"): quantized}
    if not quantized:
        raise UsageError("There is nothing to compare: pass at least one quantized model.")
    names = [_name(side, f"quantized {i + 1}") for i, side in enumerate(quantized)]
    if len(set(names)) < len(names):  # folders with the same name: use their paths
        names = [
            str(side) if isinstance(side, str | Path) else name for side, name in zip(quantized, names, strict=True)
        ]
    if len(set(names)) < len(names):
        raise UsageError(f"Two models have the same name: {', '.join(names)}. Pass a mapping from names to models.")
    return dict(zip(names, quantized, strict=True))


def _name(side: Side, otherwise: str) -> str:
    if not isinstance(side, str | Path):
        return otherwise
    return str(side).removeprefix("bundled:") if str(side).startswith("bundled:") else Path(side).name


def _compiled(model: nn.Module) -> bool:
    """Whether another runtime executes the blocks."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "compiled", False))


def _bytes(model: nn.Module) -> int:
    plan: Plan | None = plan_of(model)
    return plan.memory()[0] if plan else sum(2 * p.numel() for p in model.parameters())
