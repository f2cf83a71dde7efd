"""Measures all metrics of any number of models against one reference, with intervals and verdicts.

A metric is one of three kinds:

* *paired* (fidelity): one value for each prompt, which compares the quantized model's image with the reference's.
* *own* (alignment, temporal): one value for each prompt and model. The reference has one too, and the difference is
  paired.
* *set* (distribution): one value for all images of a model, compared with real images. Differences are paired through
  common resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, combinations
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from ditq.errors import UsageError, unknown
from ditq.metrics import alignment, distribution, fidelity, networks, temporal
from ditq.metrics.alignment import Clip
from ditq.metrics.interval import Interval, aggregate, paired_difference
from ditq.metrics.metric import Description
from ditq.metrics.networks import Extractor, Features, MissingWeights
from ditq.metrics.real import Real
from ditq.metrics.score import Curve, PairDifference, Score, verdict
from ditq.sampling import Samples

# The default metrics: they need neither a feature network nor real images.
BASIC = ("psnr_db", "ssim", "latent_sqnr_db")

# The feature networks that "auto" tries, in this order.
NETWORKS = ("inception-v3", "efficientnet-lite0")


@dataclass
class View:
    """One model's images, with their features in every network that a metric needs, each computed once."""

    samples: Samples
    network: Callable[[], Extractor]
    clip: Callable[[], Clip]
    _precision_recall: tuple[distribution.Estimate, distribution.Estimate] | None = None

    @cached_property
    def frames(self) -> list[list[Image.Image]]:
        """The frames of every image or video; an image has one."""
        return [[x] if isinstance(x, Image.Image) else list(x) for x in self.samples.images]

    @property
    def flat(self) -> list[Image.Image]:
        """All frames of all images or videos."""
        return [frame for frames in self.frames for frame in frames]

    @cached_property
    def features(self) -> list[Features]:
        """Features of the frames of every image or video."""
        flat = self.network()(self.flat)
        ends = list(accumulate(map(len, self.frames)))
        return [flat[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def clip_features(self) -> list[Tensor]:
        """CLIP embeddings of the frames of every image or video."""
        return list(self.clip().images(self.flat).split(list(map(len, self.frames))))

    def precision_recall(self, real: Features, seed: int) -> tuple[distribution.Estimate, distribution.Estimate]:
        """Precision and recall, computed together and once, because they share their distances."""
        if self._precision_recall is None:
            self._precision_recall = distribution.precision_recall(real, Features.cat(self.features), seed=seed)
        return self._precision_recall

    @cached_property
    def motions(self) -> list[temporal.Motion]:
        """Optical flow of every video."""
        return [temporal.motion(frames) for frames in self.frames]


Kind = Literal["paired", "own", "set"]
Look = Literal["features", "clip"]


@dataclass(frozen=True)
class Measure:
    """A metric and the function that computes it.

    Attributes:
        function: its arguments and result depend on ``kind``. Paired: (reference view, quantized view) to values.
            Own: a view to values. Set: a view, the features of real images (or of the frames of each real video) and
            a seed to an estimate.
        through: the network it uses, whose name is printed beside the number: the feature network, or CLIP.
        medium: whether it applies to images, videos or both.
    """

    description: Description
    kind: Kind
    function: Callable[..., Any]
    through: Look | None = None
    medium: Literal["any", "image", "video"] = "any"

    def fits(self, video: bool) -> bool:
        """Whether it applies to videos, or else to images."""
        return self.medium in ("any", "video" if video else "image")


@dataclass
class Measurement:
    """The results of :func:`measure`.

    Attributes:
        values: for each model and metric, the value of each prompt; those of the reference are under ``""``.
        scores: for each model and metric.
        differences: between every two quantized models.
        curves: for each model, latent SQNR in dB along the trajectory.
        descriptions: of the measured metrics.
        skipped: the metrics that were not measured, with the reason.
    """

    values: dict[str, dict[str, list[float]]]
    scores: dict[str, dict[str, Score]]
    differences: list[PairDifference]
    curves: dict[str, Curve]
    descriptions: list[Description]
    skipped: dict[str, str]


def measure(
    reference: Samples,
    models: Mapping[str, Samples],
    *,
    metrics: Sequence[str] | Literal["all"] = BASIC,
    network: str = "auto",
    real: Real | None = None,
    seed: int = 0,
    on_metric: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measures every model against the reference. All samples must share prompts, seeds and sizes.

    Args:
        reference: the reference's samples.
        models: each quantized model's samples, by name.
        metrics: names, or "all" for every metric that these samples and this machine allow; the others are listed as
            skipped.
        network: the feature network by name; ``auto`` is the first of ``NETWORKS`` whose weights are on this machine.
        real: the real images or videos that distribution metrics compare with.
        seed: of the resamples of distribution metrics.
        on_metric: called with (number of finished metrics, number of all metrics).

    Raises:
        UsageError: an unknown metric or network; prompts, seeds or sizes differ; or a metric that was selected by
            name cannot be measured.
        MissingWeights: a metric that was selected by name needs a network that is not on this machine.
    """
    for name, samples in models.items():
        if samples.conditions != reference.conditions or samples.seeds != reference.seeds:
            raise UsageError(f"{name} and the reference were not generated from the same prompts and seeds.")
        if (size := _size(samples)) != (reference_size := _size(reference)):
            raise UsageError(
                f"{name} generates {size}, the reference {reference_size}; only equal sizes can be compared."
            )
    available = {m.description.name: m for m in MEASURES if m.fits(reference.is_video)}
    for name in () if metrics == "all" else metrics:
        if name not in available:
            hint = next((f"It applies to {m.medium}s only." for m in MEASURES if m.description.name == name), "")
            raise unknown("metric", name, available, hint)
    chosen = list(available.values()) if metrics == "all" else [available[name] for name in metrics]
    load_network = feature_network(network)
    views = {name: View(samples, load_network, _clip) for name, samples in {"": reference, **models}.items()}
    results = Measurement({name: {} for name in views}, {name: {} for name in models}, [], {}, [], {})
    estimates: dict[str, dict[str, distribution.Estimate]] = {name: {} for name in views}
    for i, entry in enumerate(chosen):
        try:
            _add_metric(entry, views, results, estimates, real, seed)
            results.descriptions.append(entry.description)
        except (MissingWeights, UsageError) as error:
            if metrics != "all":
                raise
            results.skipped[entry.description.name] = str(error)
        if on_metric:
            on_metric(i + 1, len(chosen))
    for a, b in combinations(models, 2):
        for description in results.descriptions:
            results.differences.append(_difference(description, a, b, results, estimates))
    for name, samples in models.items():
        results.curves[name] = _curve(reference, samples)
    return results


def _size(samples: Samples) -> str:
    """The medium and size of samples in words."""
    first = samples.images[0]
    frames = [first] if isinstance(first, Image.Image) else first
    pixels = f"{frames[0].width} x {frames[0].height} pixels"
    return f"videos of {len(frames)} frames of {pixels}" if samples.is_video else f"images of {pixels}"


def feature_network(name: str) -> Callable[[], Extractor]:
    """A function that loads the network ``name``; ``auto`` is the first of ``NETWORKS`` whose weights are available.

    Raises:
        UsageError: no network has this name. Raised at once, before the function is called.
    """
    if name != "auto" and name not in networks.names():
        raise unknown("feature network", name, networks.names())

    def load_network() -> Extractor:
        if name != "auto":
            return networks.load(name)
        reasons = []
        for candidate in NETWORKS:
            try:
                return networks.load(candidate)
            except MissingWeights as error:
                reasons.append(str(error))
        raise MissingWeights(" Or: ".join(reasons))

    return load_network


@cache
def _clip() -> Clip:
    return Clip()


def _add_metric(
    entry: Measure,
    views: dict[str, View],
    results: Measurement,
    estimates: dict[str, dict[str, distribution.Estimate]],
    real: Real | None,
    seed: int,
) -> None:
    """Adds one metric of every model to ``results``."""
    name, better = entry.description.name, entry.description.higher_is_better
    reference, others = views[""], {key: view for key, view in views.items() if key}
    label = {"features": lambda: reference.network().name, "clip": lambda: reference.clip().name, None: lambda: None}[
        entry.through
    ]()
    if entry.kind == "paired":
        for key, view in others.items():
            values = entry.function(reference, view)
            results.values[key][name] = values
            results.scores[key][name] = Score(**dict(aggregate(values)), higher_is_better=better, network=label)
        return
    if entry.kind == "own":
        values_of = {key: entry.function(view) for key, view in views.items()}
        for key, values in values_of.items():
            results.values[key][name] = values
        reference_value = aggregate(values_of[""])
        for key in others:
            gap = paired_difference(values_of[key], values_of[""])
            results.scores[key][name] = _score(aggregate(values_of[key]), reference_value, gap, better, label)
        return
    features: Any = None
    if name != "inception_score":  # the only set metric without real images
        if real is None:
            medium = "videos" if entry.medium == "video" else "images"
            raise UsageError(f"there are no real {medium} to compare with: pass --real FOLDER")
        features_of = real.videos_seen_by if entry.medium == "video" else real.seen_by
        features = features_of(reference.network())
    for key, view in views.items():
        estimates[key][name] = entry.function(view, features, seed)
    reference_value = estimates[""][name].interval()
    for key in others:
        gap = (estimates[key][name] - estimates[""][name]).interval()
        results.scores[key][name] = _score(estimates[key][name].interval(), reference_value, gap, better, label)


def _score(value: Interval, reference: Interval, difference: Interval, better: bool, network: str | None) -> Score:
    return Score(
        **dict(value), higher_is_better=better, network=network, reference=reference, difference=difference,
        verdict=verdict(difference, better),
    )  # fmt: skip


def _difference(
    entry: Description,
    a: str,
    b: str,
    results: Measurement,
    estimates: dict[str, dict[str, distribution.Estimate]],
) -> PairDifference:
    if entry.name in results.values[a]:
        gap = paired_difference(results.values[a][entry.name], results.values[b][entry.name])
    else:
        gap = (estimates[a][entry.name] - estimates[b][entry.name]).interval()
    return PairDifference(metric=entry.name, a=a, b=b, difference=gap, verdict=verdict(gap, entry.higher_is_better))


def _curve(reference: Samples, samples: Samples) -> Curve:
    """Latent SQNR after every sampling step."""
    steps = fidelity.latent_sqnr_by_step(reference.trajectory, samples.trajectory)
    intervals = [aggregate(column.tolist()) for column in steps.T]
    return Curve(
        timesteps=reference.timesteps,
        mean=[i.mean for i in intervals],
        ci95=[i.ci95 for i in intervals if i.ci95],
        n=len(steps),
    )


# --------------------------------------------------------------------------------------- the metrics


def _framewise(function: Callable[..., float]) -> Callable[[View, View], list[float]]:
    """Turns a distance between two images into one between two videos: the mean over frames."""

    def values(reference: View, other: View) -> list[float]:
        pairs = zip(reference.frames, other.frames, strict=True)
        return [sum(map(function, a, b)) / len(a) for a, b in pairs]

    return values


def _latent_sqnr(reference: View, other: View) -> list[float]:
    pairs = zip(reference.samples.latents, other.samples.latents, strict=True)
    return [fidelity.latent_sqnr_db(a, b) for a, b in pairs]


def _feature_distance(reference: View, other: View) -> list[float]:
    network = reference.network()
    return _framewise(lambda a, b: fidelity.feature_distance(a, b, network))(reference, other)


def _lpips(reference: View, other: View) -> list[float]:
    return _framewise(fidelity.lpips)(reference, other)


def _clip_score(view: View) -> list[float]:
    texts = [view.clip().text(prompt) for prompt in view.samples.conditions]
    return [alignment.clip_score(x, text) for x, text in zip(view.clip_features, texts, strict=True)]


def _by_concept(function: Callable[[Tensor, int], float]) -> Callable[[View], list[float]]:
    """Scores the concept that each prompt names, with the classes of the feature network."""

    def values(view: View) -> list[float]:
        network = view.network()
        if not network.labels:
            raise UsageError(f"the feature network {network.name!r} has no named classes to compare prompts with")
        concepts = [alignment.concept(prompt, network.labels) for prompt in view.samples.conditions]
        probabilities = [f.probabilities for f in view.features]
        return [function(p, c) for p, c in zip(probabilities, concepts, strict=True) if p is not None]

    return values


def _estimate(name: str) -> Callable[[View, Features, int], distribution.Estimate]:
    if name in ("precision", "recall"):
        return lambda view, real, seed: view.precision_recall(real, seed)[name == "recall"]
    if name == "inception_score":
        return lambda view, _, seed: distribution.inception_score(Features.cat(view.features), seed)
    function = getattr(distribution, name)
    return lambda view, real, seed: function(real, Features.cat(view.features), seed)


def _of_videos(
    function: Callable[[Sequence[Features], Sequence[Features], int], distribution.Estimate],
) -> Callable[[View, Sequence[Features], int], distribution.Estimate]:
    return lambda view, real, seed: function(real, view.features, seed)


def _of_motion(function: Callable[[temporal.Motion], float]) -> Callable[[View], list[float]]:
    return lambda view: [function(motion) for motion in view.motions]


def _of_frames(function: Callable[[temporal.Video], float]) -> Callable[[View], list[float]]:
    return lambda view: [function(frames) for frames in view.frames]


def _delta_flow(reference: View, other: View) -> list[float]:
    return [temporal.delta_flow(a, b) for a, b in zip(reference.motions, other.motions, strict=True)]


def _warping_error(view: View) -> list[float]:
    return [temporal.warping_error(f, m) for f, m in zip(view.frames, view.motions, strict=True)]


def _subject_consistency(view: View) -> list[float]:
    return [temporal.consistency(features.pooled) for features in view.features]


def _of_clip(function: Callable[[Tensor], float]) -> Callable[[View], list[float]]:
    return lambda view: [function(features) for features in view.clip_features]


def _measures() -> tuple[Measure, ...]:
    about = {
        d.name: d
        for d in (
            *fidelity.FIDELITY, *alignment.ALIGNMENT, *distribution.DISTRIBUTION, *temporal.TEMPORAL
        )
    }  # fmt: skip
    return (
        Measure(about["psnr_db"], "paired", _framewise(fidelity.psnr_db)),
        Measure(about["ssim"], "paired", _framewise(fidelity.ssim)),
        Measure(about["ms_ssim"], "paired", _framewise(fidelity.ms_ssim)),
        Measure(about["latent_sqnr_db"], "paired", _latent_sqnr),
        Measure(about["lpips"], "paired", _lpips),
        Measure(about["feature_distance"], "paired", _feature_distance, "features"),
        Measure(about["clip_score"], "own", _clip_score, "clip"),
        Measure(about["concept_score"], "own", _by_concept(alignment.concept_score), "features"),
        Measure(about["concept_accuracy"], "own", _by_concept(alignment.concept_accuracy), "features"),
        *(Measure(d, "set", _estimate(d.name), "features", "image") for d in distribution.DISTRIBUTION),
        Measure(about["kvd"], "set", _of_videos(temporal.kvd), "features", "video"),
        Measure(about["fvd"], "set", _of_videos(temporal.fvd), "features", "video"),
        Measure(about["delta_flow"], "paired", _delta_flow, None, "video"),
        Measure(about["flow_score"], "own", _of_motion(temporal.flow_score), None, "video"),
        Measure(about["dynamic_degree"], "own", _of_motion(temporal.dynamic_degree), None, "video"),
        Measure(about["warping_error"], "own", _warping_error, None, "video"),
        Measure(about["motion_smoothness"], "own", _of_frames(temporal.motion_smoothness), None, "video"),
        Measure(about["clip_temp"], "own", _of_clip(temporal.clip_temp), "clip", "video"),
        Measure(about["subject_consistency"], "own", _subject_consistency, "features", "video"),
        Measure(about["background_consistency"], "own", _of_clip(temporal.consistency), "clip", "video"),
        Measure(
            about["scene_consistency"], "own", _by_concept(temporal.scene_consistency), "features", "video"
        ),
    )  # fmt: skip


MEASURES = _measures()
