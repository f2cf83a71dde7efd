"""All metrics of any number of models at once, against one 16-bit reference, with intervals and verdicts.

A metric is one of three kinds. *Paired*: a value for each prompt, of the quantized model's image against the
16-bit model's (fidelity). *Own*: a value for each prompt, of either model by itself (alignment, temporal): the
16-bit model has one too, and the difference is paired. *Set*: one value for all images against real ones
(distribution), paired through common resamples.
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

# What is always measured: needs no network and no real images.
BASIC = ("psnr_db", "ssim", "latent_sqnr_db")

# Tried in this order where nobody says which network to look through.
NETWORKS = ("inception-v3", "efficientnet-lite0")


@dataclass
class View:
    """One model's images, and what networks saw in them (each at most once)."""

    samples: Samples
    network: Callable[[], Extractor]
    clip: Callable[[], Clip]
    _precision_recall: tuple[distribution.Estimate, distribution.Estimate] | None = None

    @cached_property
    def frames(self) -> list[list[Image.Image]]:
        """Every image as a list of frames: one for images."""
        return [[x] if isinstance(x, Image.Image) else list(x) for x in self.samples.images]

    @property
    def flat(self) -> list[Image.Image]:
        """All frames of all images."""
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
        """Both at once, and once: they share their work."""
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
    """A metric and how to take it.

    Attributes:
        function: paired: (reference, quantized) views to values; own: a view to values; set: a view, features of
            real images (or of the frames of each real video) and a seed to an estimate.
        through: the network it looks through, whose name stands beside the number: the feature network, or CLIP.
        medium: what it is for.
    """

    description: Description
    kind: Kind
    function: Callable[..., Any]
    through: Look | None = None
    medium: Literal["any", "picture", "video"] = "any"

    def fits(self, video: bool) -> bool:
        """Whether it is for what was drawn."""
        return self.medium in ("any", "video" if video else "picture")


@dataclass
class Measurement:
    """What :func:`measure` found.

    Attributes:
        values: for each model and metric the value of each prompt; the 16-bit model's own under ``""``.
        scores: for each model and metric.
        differences: between every two quantized models.
        curves: latent SQNR in dB along the trajectory, for each model.
        skipped: metrics that were not measured, and why.
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
    """Measures every model against the reference; all were drawn from the same prompts and seeds.

    Args:
        metrics: names; "all" takes all that these images and this machine allow, and lists the others as skipped.
        network: the feature network by name; ``auto`` takes the first of ``NETWORKS`` whose weights are here.
        on_metric: called with (metrics done, metrics in all).

    Raises:
        UsageError: an unknown metric or network; prompts, seeds or sizes differ; or a metric that was asked for by
            name cannot be measured.
        MissingWeights: a metric that was asked for by name needs a network that is not on this machine.
    """
    for name, samples in models.items():
        if samples.conditions != reference.conditions or samples.seeds != reference.seeds:
            raise UsageError(f"{name} and the reference were not drawn from the same prompts and seeds.")
        if (here := _size(samples)) != (there := _size(reference)):
            raise UsageError(f"{name} draws {here}, the reference {there}; only equal sizes can be compared.")
    known = {m.description.name: m for m in MEASURES if m.fits(reference.is_video)}
    for name in () if metrics == "all" else metrics:
        if name not in known:
            elsewhere = next((f"It is for a {m.medium}." for m in MEASURES if m.description.name == name), "")
            raise unknown("metric", name, known, elsewhere)
    chosen = list(known.values()) if metrics == "all" else [known[name] for name in metrics]
    look = feature_network(network)
    views = {name: View(samples, look, _clip) for name, samples in {"": reference, **models}.items()}
    found = Measurement({name: {} for name in views}, {name: {} for name in models}, [], {}, [], {})
    estimates: dict[str, dict[str, distribution.Estimate]] = {name: {} for name in views}
    for i, entry in enumerate(chosen):
        try:
            _take(entry, views, found, estimates, real, seed)
            found.descriptions.append(entry.description)
        except (MissingWeights, UsageError) as error:
            if metrics != "all":
                raise
            found.skipped[entry.description.name] = str(error)
        if on_metric:
            on_metric(i + 1, len(chosen))
    for a, b in combinations(models, 2):
        for description in found.descriptions:
            found.differences.append(_difference(description, a, b, found, estimates))
    for name, samples in models.items():
        found.curves[name] = _curve(reference, samples)
    return found


def _size(samples: Samples) -> str:
    """What was drawn, in words: the medium, and the sizes there are."""
    first = samples.images[0]
    frames = [first] if isinstance(first, Image.Image) else first
    pixels = f"{frames[0].width} x {frames[0].height} pixels"
    return f"videos of {len(frames)} frames of {pixels}" if samples.is_video else f"images of {pixels}"


def feature_network(name: str) -> Callable[[], Extractor]:
    """Finds a network when it is needed; ``auto`` is the first of ``NETWORKS`` whose weights are here.

    Raises:
        UsageError: there is none of this name (at once).
    """
    if name != "auto" and name not in networks.names():
        raise unknown("feature network", name, networks.names())

    def look() -> Extractor:
        if name != "auto":
            return networks.load(name)
        reasons = []
        for candidate in NETWORKS:
            try:
                return networks.load(candidate)
            except MissingWeights as error:
                reasons.append(str(error))
        raise MissingWeights(" Or: ".join(reasons))

    return look


@cache
def _clip() -> Clip:
    return Clip()


def _take(
    entry: Measure,
    views: dict[str, View],
    found: Measurement,
    estimates: dict[str, dict[str, distribution.Estimate]],
    real: Real | None,
    seed: int,
) -> None:
    """Adds one metric of every model to ``found``."""
    name, better = entry.description.name, entry.description.higher_is_better
    reference, others = views[""], {key: view for key, view in views.items() if key}
    label = {"features": lambda: reference.network().name, "clip": lambda: reference.clip().name, None: lambda: None}[
        entry.through
    ]()
    if entry.kind == "paired":
        for key, view in others.items():
            values = entry.function(reference, view)
            found.values[key][name] = values
            found.scores[key][name] = Score(**dict(aggregate(values)), higher_is_better=better, network=label)
        return
    if entry.kind == "own":
        taken = {key: entry.function(view) for key, view in views.items()}
        for key, values in taken.items():
            found.values[key][name] = values
        own = aggregate(taken[""])
        for key in others:
            gap = paired_difference(taken[key], taken[""])
            found.scores[key][name] = _against(aggregate(taken[key]), own, gap, better, label)
        return
    features: Any = None
    if name != "inception_score":  # the only one that knows no real images
        if real is None:
            what = "videos" if entry.medium == "video" else "pictures"
            raise UsageError(f"there are no real {what} to compare with: --real FOLDER names some")
        look = real.videos_seen_by if entry.medium == "video" else real.seen_by
        features = look(reference.network())
    for key, view in views.items():
        estimates[key][name] = entry.function(view, features, seed)
    own = estimates[""][name].interval()
    for key in others:
        gap = (estimates[key][name] - estimates[""][name]).interval()
        found.scores[key][name] = _against(estimates[key][name].interval(), own, gap, better, label)


def _against(value: Interval, own: Interval, gap: Interval, better: bool, network: str | None) -> Score:
    return Score(
        **dict(value), higher_is_better=better, network=network, reference=own, difference=gap,
        verdict=verdict(gap, better),
    )  # fmt: skip


def _difference(
    entry: Description,
    a: str,
    b: str,
    found: Measurement,
    estimates: dict[str, dict[str, distribution.Estimate]],
) -> PairDifference:
    if entry.name in found.values[a]:
        gap = paired_difference(found.values[a][entry.name], found.values[b][entry.name])
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
    """A distance of two images, as one of two videos: the mean over frames."""

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
    """A score of the concept that each prompt names, by the classes of the feature network."""

    def values(view: View) -> list[float]:
        network = view.network()
        if not network.labels:
            raise UsageError(f"the feature network {network.name!r} has no named classes to compare prompts with")
        named = [alignment.concept(prompt, network.labels) for prompt in view.samples.conditions]
        probabilities = [f.probabilities for f in view.features]
        return [function(p, c) for p, c in zip(probabilities, named, strict=True) if p is not None]

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
        *(Measure(d, "set", _estimate(d.name), "features", "picture") for d in distribution.DISTRIBUTION),
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
