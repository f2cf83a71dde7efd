"""What the metrics must say of real images: artwork that the bundled models learned (see ``tests/data``)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from ditq.metrics import networks
from ditq.metrics.alignment import concept, concept_score
from ditq.metrics.distribution import estimates, kid
from ditq.metrics.fidelity import feature_distance, ms_ssim, psnr_db, ssim
from ditq.metrics.networks import Features
from ditq.metrics.temporal import clip_temp, flow_score, motion, motion_smoothness, warping_error

DATA = Path(__file__).parents[1] / "data"
Change = Callable[[Image.Image], Image.Image]


@cache
def artwork() -> list[Image.Image]:
    sheet = Image.open(DATA / "artwork.png").convert("RGB")
    return [sheet.crop((x, y, x + 64, y + 64)) for y in range(0, 1024, 64) for x in range(0, 1024, 64)]


def named() -> list[str]:
    return [concept for _, concept in json.loads((DATA / "artwork.json").read_text())]


@cache
def seen(network: str, change: Change | None = None) -> Features:
    return networks.load(network)([change(x) if change else x for x in artwork()])


def noise(level: float) -> Change:
    def change(image: Image.Image) -> Image.Image:
        x = np.asarray(image, dtype=np.float64)
        rng = np.random.default_rng(int(x.sum()) % 2**32)  # another one for every image
        return Image.fromarray((x + 255 * level * rng.standard_normal(x.shape)).clip(0, 255).astype(np.uint8))

    return change


def blur(radius: float) -> Change:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def posterize(bits: int) -> Change:
    return lambda image: ImageOps.posterize(image, bits)


LADDERS: dict[str, tuple[Change, Change]] = {
    "noise": (noise(0.05), noise(0.2)),
    "blur": (blur(0.7), blur(2.0)),
    "posterize": (posterize(4), posterize(2)),
}
NETWORKS = ("emoji-classifier", "efficientnet-lite0")


@pytest.mark.parametrize("damage", LADDERS)
def test_damage_orders_every_fidelity_metric(damage: str) -> None:
    little, much = LADDERS[damage]
    pictures = artwork()[:24]
    for metric in (psnr_db, ssim, ms_ssim):
        a, b = (np.mean([metric(x, change(x)) for x in pictures]) for change in (little, much))
        best = metric(pictures[0], pictures[0])
        assert b < a < best, metric.__name__
    for name in NETWORKS:
        network = networks.load(name)
        a, b = (np.mean([feature_distance(x, change(x), network) for x in pictures[:8]]) for change in (little, much))
        assert 0 < a < b, name
        assert feature_distance(pictures[0], pictures[0], network) == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_kid_of_two_halves_of_the_real_set_is_zero_within_its_interval(network: str) -> None:
    order = random.Random(0).sample(range(256), 256)
    features = seen(network)
    found = kid(features[order[:128]], features[order[128:]]).interval()
    assert found.ci95[0] < 0 < found.ci95[1]
    assert abs(found.mean) < 0.05


@pytest.mark.parametrize("damage", LADDERS)
def test_damage_orders_kid(damage: str) -> None:
    """Against the other half of the real set, as a model's images are: paired differences grow, and measurably."""
    little, much = LADDERS[damage]
    network = "efficientnet-lite0"  # the emoji classifier was trained not to mind noise and posterizing
    real, clean = seen(network)[slice(0, 128)], seen(network)[slice(128, 256)]
    a, b = (
        kid(real, seen(network, change)[slice(128, 256)]) - kid(real, clean) for change in (little, much)
    )  # fmt: skip
    assert b.interval().ci95[0] > 0
    assert b.value > a.value


def test_identity_and_another_set() -> None:
    features = seen("emoji-classifier")
    same, _ = estimates(features, features)
    assert same["precision"].value == same["recall"].value == 1
    damaged, refused = estimates(features, seen("emoji-classifier", blur(2.0)))
    assert damaged["kid"].value > same["kid"].value
    assert damaged["inception_score"].value < same["inception_score"].value
    assert "512 images" in refused["fid"]


def test_shuffled_captions_lower_the_alignment() -> None:
    network = networks.load("emoji-classifier")
    probabilities = seen("emoji-classifier").probabilities
    assert probabilities is not None

    def scores(captions: Sequence[str]) -> list[float]:
        named = [concept(caption, network.labels) for caption in captions]
        return [concept_score(probabilities[i : i + 1], c) for i, c in enumerate(named)]

    captions = [f"an emoji of a {name}" for name in named()]
    shuffled = captions[7:] + captions[:7]
    assert np.mean(scores(captions)) > 0.4
    assert np.mean(scores(shuffled)) < 0.05
    blurred = seen("emoji-classifier", blur(2.0)).probabilities
    assert blurred is not None


def clip(picture: Image.Image, step: float, order: Sequence[int] = range(8)) -> list[Image.Image]:
    """The image, cut out, walks ``step`` pixels a frame to the right before a ground that stands still."""
    ground = Image.fromarray(
        np.broadcast_to(np.linspace(60, 200, 96), (64, 96)).astype(np.uint8)
        + np.arange(64, dtype=np.uint8)[:, None] // 2
    ).convert("RGB")
    mask = picture.convert("L").point(lambda value: 255 * (value < 245))
    frames = []
    for t in order:
        frame = ground.copy()
        frame.paste(picture, (round(step * t), 0), mask)
        frames.append(frame)
    return frames


def test_shuffled_frames_raise_the_warping_error_and_lower_the_smoothness() -> None:
    order = (3, 0, 6, 1, 7, 4, 2, 5)
    errors, smooth = [], []
    for picture in artwork()[:12]:
        for frames in (clip(picture, 2.0), clip(picture, 2.0, order)):
            errors.append(warping_error(frames, motion(frames)))
            smooth.append(motion_smoothness(frames))
    in_order, shuffled = np.array(errors).reshape(-1, 2).T
    assert (shuffled > in_order).all()
    in_order, shuffled = np.array(smooth).reshape(-1, 2).T
    assert (shuffled < in_order).all()


def test_still_and_flickering_videos() -> None:
    network = networks.load("emoji-classifier")
    picture, other = artwork()[0], artwork()[1]
    still = [picture] * 6
    moves = motion(still)
    assert (flow_score(moves), warping_error(still, moves), motion_smoothness(still)) == pytest.approx(
        (0, 0, 1), abs=1e-5
    )
    flicker = [picture, other] * 3
    assert clip_temp(network(still).pooled) == pytest.approx(1)
    assert clip_temp(network(flicker).pooled) < 0.9
    slow, fast = (np.mean([flow_score(motion(clip(x, s))) for x in artwork()[:6]]) for s in (1.0, 3.0))
    assert slow < fast
