"""All metrics at once: kinds, verdicts, pairing, and what happens to those that cannot be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditq.errors import UsageError
from ditq.metrics import networks
from ditq.metrics.measure import BASIC, MEASURES, measure
from ditq.metrics.networks import Extractor, Features, MissingWeights
from ditq.metrics.real import Real
from ditq.sampling import Samples

WORDS = ("red", "green", "blue")
N = 48


class Colours(Extractor):
    """A stand-in network that knows three concepts, by the mean colour of an image."""

    name = "colours"
    labels = WORDS

    @classmethod
    def load(cls) -> Colours:
        return cls()

    def features(self, images: Tensor) -> Features:
        grid = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        mean = images.mean((2, 3))
        return Features(mean, grid, (20 * mean).softmax(1))

    def stages(self, images: Tensor) -> list[Tensor]:
        return [images, torch.nn.functional.avg_pool2d(images, 2)]


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**networks._networks(), "colours": Colours}
    monkeypatch.setattr(networks, "_networks", lambda: known)


def picture(word: str, noise: float, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    values = np.full((24, 24, 3), 90.0)
    values[..., WORDS.index(word)] = 160
    values += 25 * rng.standard_normal(3) + np.linspace(-20, 20, 24)[:, None, None]
    values += noise * np.random.default_rng(seed + 1000).standard_normal((24, 24, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def samples(noise: float = 0.0, change: Callable[[int, str], str] | None = None, n: int = N) -> Samples:
    words = [WORDS[i % 3] for i in range(n)]
    shown = [change(i, w) if change else w for i, w in enumerate(words)]
    pictures = [picture(w, noise, i) for i, w in enumerate(shown)]
    generator = torch.Generator().manual_seed(0)
    trajectory = torch.randn(n, 3, 4, 2, 2, generator=generator)
    trajectory = trajectory + 0.01 * noise * torch.randn(trajectory.shape, generator=generator)
    conditions = [f"a {w} wall" for w in words]
    return Samples(conditions, list(range(n)), pictures, trajectory, [900.0, 500.0, 100.0], [0.1] * n)


def real(n: int = 80) -> Real:
    return Real("walls", [picture(WORDS[i % 3], 0, 5000 + i) for i in range(n)])


def run(models: dict[str, Samples], **options: Any) -> Any:
    return measure(samples(), models, **{"metrics": "all", "network": "colours", "real": real(), **options})


def test_identity_is_perfect_and_nothing_else_differs() -> None:
    found = run({"same": samples()})
    scores = found.scores["same"]
    assert scores["psnr_db"].mean == scores["latent_sqnr_db"].mean == 100
    assert scores["ssim"].mean == pytest.approx(1)
    assert scores["feature_distance"].mean == 0
    for name in ("concept_score", "kid", "precision"):
        assert scores[name].verdict == "same"
        assert scores[name].difference.ci95 == (0, 0)  # type: ignore[union-attr]
        assert scores[name].reference.mean == scores[name].mean  # type: ignore[union-attr]
    assert found.curves["same"].mean == [100, 100, 100]


def test_damage_is_worse_and_more_damage_is_worse_still() -> None:
    found = run({"little": samples(4.0), "much": samples(40.0)})
    by_metric = {d.metric: d for d in found.differences}
    for name in (*BASIC, "ms_ssim", "feature_distance"):
        assert by_metric[name].verdict == "better", name  # a: little
        assert (by_metric[name].a, by_metric[name].b) == ("little", "much")
    assert found.curves["little"].mean > found.curves["much"].mean


def test_wrong_concepts_lower_the_alignment() -> None:
    swapped = samples(change=lambda i, w: WORDS[(WORDS.index(w) + 1) % 3] if i % 2 else w)
    score = run({"swapped": swapped}).scores["swapped"]["concept_score"]
    assert score.verdict == "worse"
    assert score.network == "colours"
    assert score.reference is not None
    assert score.mean < score.reference.mean - 0.2


def test_lost_variety_shows_in_the_distribution() -> None:
    found = run({"red": samples(change=lambda i, w: "red")})
    assert found.scores["red"]["kid"].verdict == "worse"
    assert found.scores["red"]["recall"].verdict == "worse"


def test_fidelity_alone_needs_no_network_and_no_real_pictures() -> None:
    found = measure(samples(), {"q": samples(5.0)}, network="colours")
    assert tuple(found.scores["q"]) == BASIC
    assert not found.skipped
    assert all(len(found.values["q"][name]) == N for name in BASIC)


def test_what_cannot_be_measured_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Colours:
        raise MissingWeights("no weights in the cellar")

    monkeypatch.setattr(Colours, "load", missing)
    networks.load.cache_clear()
    try:
        found = run({"q": samples(5.0)})
        assert "no weights in the cellar" in found.skipped["kid"]
        assert "no weights in the cellar" in found.skipped["concept_score"]
        assert set(BASIC) <= set(found.scores["q"])
        with pytest.raises(MissingWeights, match="cellar"):
            run({"q": samples(5.0)}, metrics=["psnr_db", "kid"])
    finally:
        networks.load.cache_clear()


def test_every_picture_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    look = Colours.features

    def counting(self: Colours, images: Tensor) -> Features:
        seen.append(len(images))
        return look(self, images)

    monkeypatch.setattr(Colours, "features", counting)
    run({"a": samples(5.0), "b": samples(9.0)}, metrics=["concept_score", "concept_accuracy", "kid", "precision"])
    assert sum(seen) == 3 * N + len(real())


def test_a_network_without_named_classes_tells_no_concepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colours, "labels", ())
    assert "'colours' has no named classes" in run({"q": samples(5.0)}).skipped["concept_score"]


def test_no_real_pictures_skip_the_distribution_only() -> None:
    found = run({"q": samples(5.0)}, real=None)
    assert "--real" in found.skipped["kid"]
    assert "concept_score" in found.scores["q"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"metrics": ["psnr"]}, "Unknown metric 'psnr'. Did you mean 'psnr_db'"),
        ({"network": "incepton"}, "Unknown feature network"),
        ({"metrics": ["warping_error"]}, "It applies to videos only"),
    ],
)
def test_wrong_names_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        run({"q": samples(5.0)}, **options)


def test_other_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="same prompts and seeds"):
        run({"q": samples(n=N - 3)})


def test_descriptions_are_unique_and_speak() -> None:
    names = [m.description.name for m in MEASURES]
    assert len(set(names)) == len(names)
    assert all(m.description.about.endswith(".") for m in MEASURES)


# -------------------------------------------------------------------------------------------- videos


def video(word: str, order: Sequence[int], seed: int) -> list[Image.Image]:
    """A square of one colour that walks to the right, frames in this order."""
    out = []
    for t in order:
        values = np.full((32, 32, 3), 60.0) + np.random.default_rng(seed).normal(0, 12, (32, 32, 1))
        values[8:20, 2 + 2 * t : 14 + 2 * t] = 60 + np.random.default_rng(seed + 1).normal(60, 30, (12, 12, 1))
        values[8:20, 2 + 2 * t : 14 + 2 * t, WORDS.index(word)] += 80
        out.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return out


def videos(order: Sequence[int] = range(8)) -> Samples:
    words = [WORDS[i % 3] for i in range(6)]
    drawn = [video(w, order, i) for i, w in enumerate(words)]
    return Samples(
        [f"a {w} square" for w in words], list(range(6)), drawn, torch.randn(6, 2, 4, 2, 2), [9.0, 1.0], [1.0] * 6
    )  # fmt: skip


def test_shuffled_frames_show_in_the_temporal_metrics() -> None:
    found = measure(videos(), {"shuffled": videos((3, 0, 6, 1, 7, 4, 2, 5))}, metrics="all", network="colours")
    scores = found.scores["shuffled"]
    assert scores["warping_error"].verdict == "worse"
    assert scores["motion_smoothness"].verdict == "worse"
    assert scores["psnr_db"].mean < 40
    same = measure(videos(), {"same": videos()}, metrics=["warping_error", "motion_smoothness"], network="colours")
    assert {s.verdict for s in same.scores["same"].values()} == {"same"}


def walk(word: str, seed: int, jump: float) -> list[Image.Image]:
    """Eight frames whose colour drifts, or jumps."""
    start = np.asarray(picture(word, 0, seed)).astype(float)
    steps = jump * np.random.default_rng(seed).standard_normal((8, 3)).cumsum(0)
    return [Image.fromarray((start + step).clip(0, 255).astype(np.uint8)) for step in steps]


def videos_of(jump: float, n: int = 40, seed: int = 0) -> list[list[Image.Image]]:
    return [walk(WORDS[i % 3], seed + i, jump) for i in range(n)]


def test_videos_are_compared_with_real_ones_and_motion_counts() -> None:
    def drawn(jump: float) -> Samples:
        base = samples(n=40)
        return Samples(
            base.conditions, base.seeds, videos_of(jump, seed=500), base.trajectory, base.timesteps, [0.1] * 40
        )

    options: dict[str, Any] = {"metrics": ["kvd"], "network": "colours"}
    found = measure(drawn(2), {"calm": drawn(2), "jumping": drawn(60)}, real=Real("r", videos=videos_of(2)), **options)
    assert found.scores["calm"]["kvd"].verdict == "same"
    assert found.scores["jumping"]["kvd"].verdict == "worse"
    assert found.scores["jumping"]["kvd"].network == "colours"
    with pytest.raises(UsageError, match="no real videos"):
        measure(drawn(2), {"calm": drawn(2)}, **options)
    with pytest.raises(UsageError, match="real images, not videos"):
        measure(drawn(2), {"calm": drawn(2)}, real=real(), **options)


def test_media_and_numbers_of_frames_must_agree() -> None:
    base = samples(n=3)
    clips = Samples(base.conditions, base.seeds, videos_of(2, n=3), base.trajectory, base.timesteps, [0.1] * 3)
    shorter = Samples(**{**vars(clips), "images": [frames[:5] for frames in clips.images]})
    with pytest.raises(
        UsageError, match="q generates videos of 5 frames of 24 x 24 pixels, the reference videos of 8"
    ):
        measure(clips, {"q": shorter})
    with pytest.raises(UsageError, match="the reference images of 24 x 24 pixels"):
        measure(base, {"q": clips})
