"""Distribution metrics against closed forms and plain numpy, their intervals against repeated draws."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from ditq.errors import UsageError
from ditq.metrics import distribution, networks
from ditq.metrics.distribution import (
    DISTRIBUTION,
    Estimate,
    estimates,
    fid,
    frechet,
    inception_score,
    kid,
    matched,
    precision_recall,
    sfid,
)
from ditq.metrics.networks import Features

Array = NDArray[np.float64]


def made(pooled: torch.Tensor) -> Features:
    """Features of which the first 4 are spatial and all are logits of classes."""
    return Features(pooled, pooled[:, :4], pooled.softmax(1))


def drawn(n: int, d: int = 8, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> Features:
    return made(shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


# ------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize(("n", "m"), [(30, 30), (50, 23), (23, 50)])
def test_kid_against_numpy(n: int, m: int) -> None:
    real, fake = drawn(n, seed=1), drawn(m, shift=0.3, seed=2)
    x, y = real.pooled.double().numpy(), fake.pooled.double().numpy()
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    xx = [kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j]
    xy = [kernel(a, b) for a in x for b in y]
    assert kid(real, fake).value == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), rel=1e-10)


def test_kid_against_torchmetrics() -> None:
    from torchmetrics.image.kid import poly_mmd

    real, fake = drawn(40, seed=1), drawn(40, shift=0.3, seed=2)
    expected = poly_mmd(real.pooled.double(), fake.pooled.double())
    assert kid(real, fake).value == pytest.approx(float(expected), rel=1e-10)


def test_kid_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = drawn(40, seed=1), drawn(30, shift=0.3, seed=2)
    whole = kid(real, fake)
    monkeypatch.setattr(distribution, "BLOCK", 7)
    np.testing.assert_allclose(kid(real, fake).replicates, whole.replicates, rtol=1e-9)


def test_a_replicate_of_kid_is_kid_of_what_was_drawn_without_pairs_of_one_picture() -> None:
    real, fake = drawn(20, seed=1), drawn(25, shift=0.5, seed=2)
    x, y = real.pooled.double().numpy(), fake.pooled.double().numpy()
    counts = [distribution._counts(len(z), (0, i))[:, 3].long().numpy() for i, z in enumerate((x, y))]
    rows, columns = (np.repeat(np.arange(len(c)), c) for c in counts)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731

    def within(z: Array, picks: Array) -> float:
        return float(kernel(z[picks], z[picks])[picks[:, None] != picks].mean())

    expected = within(x, rows) + within(y, columns) - 2 * kernel(x[rows], y[columns]).mean()
    assert kid(real, fake).replicates[2] == pytest.approx(expected, rel=1e-10)


def test_fid_of_two_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 4))
    mean = np.array([0.5, 0, -1, 0.2])
    s, t = a @ a.T, b @ b.T
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values) @ vectors.T
    expected = mean @ mean + np.trace(s + t) - 2 * np.sqrt(np.linalg.eigvalsh(root @ t @ root)).sum()
    x, y = rng.normal(size=(2, 100_000, 4))
    found = frechet(torch.from_numpy(x @ a.T), torch.from_numpy(y @ b.T + mean))
    assert found.value == pytest.approx(expected, rel=0.02)
    low, high = found.interval().ci95
    assert low < expected < high


def test_fid_is_that_of_numpy_moments() -> None:
    real, fake = drawn(60, seed=1), drawn(60, shift=0.3, scale=1.4, seed=2)
    for function, part in ((fid, "pooled"), (sfid, "spatial")):
        x, y = (getattr(features, part).double().numpy() for features in (real, fake))
        s, t = np.cov(x.T), np.cov(y.T)
        values, vectors = np.linalg.eigh(s)
        root = vectors * np.sqrt(values) @ vectors.T
        trace = np.sqrt(np.linalg.eigvalsh(root @ t @ root)).sum()
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s + t) - 2 * trace
        assert function(real, fake).value == pytest.approx(expected, rel=1e-9)


def test_fid_needs_twice_as_many_pictures_as_features() -> None:
    """Below, sets of one Gaussian are more than half of its variance apart."""
    from torchmetrics.image.fid import _compute_fid

    d = 16

    def apart(n: int) -> float:
        sets = [(drawn(n, d, seed=i).pooled.double(), drawn(n, d, seed=100 + i).pooled.double()) for i in range(20)]
        return float(np.mean([_compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()) / d for x, y in sets]))

    assert apart(2 * d) < 0.5 < apart(d)
    few, enough = (drawn(n, d).pooled for n in (2 * d - 1, 2 * d))
    assert frechet(enough, enough).value == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="16 features needs at least 32 images in each set, got 31"):
        frechet(few, few)


def test_inception_score_against_numpy() -> None:
    fake = drawn(50, scale=2)
    p = fake.probabilities.double().numpy()
    p /= p.sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), 1)))
    assert inception_score(fake).value == pytest.approx(expected, rel=1e-7)


def test_inception_score_of_sure_and_of_undecided_classifiers() -> None:
    sure = torch.eye(5).repeat(8, 1)
    undecided = torch.full((40, 5), 0.2)
    assert inception_score(Features(sure, sure, sure)).value == pytest.approx(5, rel=1e-6)
    assert inception_score(Features(sure, sure, undecided)).value == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_numpy(k: int) -> None:
    real, fake = drawn(60, d=3, seed=1), drawn(60, d=3, shift=0.5, scale=0.6, seed=2)
    x, y = real.pooled.double().numpy(), fake.pooled.double().numpy()
    distance = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)  # noqa: E731
    wide, narrow = (np.sort(distance(z, z), 1)[:, k] for z in (x, y))  # column 0 is the image itself
    precision, recall = precision_recall(real, fake, k)
    assert precision.value == np.mean([(d <= wide).any() for d in distance(y, x)])
    assert recall.value == np.mean([(d <= narrow).any() for d in distance(x, y)])
    assert recall.value < precision.value  # narrower than the real set


# ------------------------------------------------------------------------------------ the intervals

DRAWS = 40


@pytest.fixture(scope="module")
def repeated() -> list[tuple[dict[str, Estimate], dict[str, Estimate]]]:
    """All metrics of two models that draw nearly the same images, again and again."""
    found = []
    for draw in range(DRAWS):
        real, fake = drawn(64, seed=3 * draw), drawn(64, shift=0.4, scale=0.9, seed=3 * draw + 1)
        other = made(0.8 * fake.pooled + 0.1 * drawn(64, seed=3 * draw + 2).pooled)
        found.append((estimates(real, fake)[0], estimates(real, other)[0]))
    return found


@pytest.mark.parametrize("name", [metric.name for metric in DISTRIBUTION])
@pytest.mark.parametrize("paired", [False, True], ids=["own", "difference"])
def test_intervals_cover_repeated_draws(
    repeated: list[tuple[dict[str, Estimate], dict[str, Estimate]]], name: str, paired: bool
) -> None:
    """The mean over draws of the same size lies in 95 % of the intervals, and they are not wide for nothing."""
    found = [b[name] - a[name] if paired else a[name] for a, b in repeated]
    values = np.array([estimate.value for estimate in found])
    low, high = np.array([estimate.interval().ci95 for estimate in found]).T
    covered = ((low <= values.mean()) & (values.mean() <= high)).mean()
    assert covered >= 0.85  # 3 standard errors of 40 draws below 0.95
    assert np.mean(high - low) / 2 < 3.2 * values.std()


def test_kid_of_two_halves_of_one_set_is_zero_within_its_interval() -> None:
    inside = []
    for seed in range(40):
        both = drawn(120, seed=seed)
        low, high = kid(both[:60], both[60:]).interval().ci95
        inside.append(low <= 0 <= high)
    assert np.mean(inside) >= 0.9


def test_two_halves_of_the_bundled_artwork_are_alike_and_a_few_of_its_pictures_are_not() -> None:
    import ditq_bundled
    from safetensors.torch import load_file

    tensors = load_file(ditq_bundled.network("emoji-classifier") / "reference.safetensors")
    artwork = Features(*(tensors[part].float() for part in ("pooled", "spatial", "probabilities")))
    artwork = artwork[torch.from_numpy(np.random.default_rng(0).permutation(len(artwork)))]
    real, fake = artwork[:440], artwork[440:]
    halves = estimates(real, fake)[0]
    few = estimates(real, Features.cat([fake[:20]] * 22))[0]  # a model that draws the same 20 again and again
    low, high = halves["kid"].interval().ci95
    assert low < 0 < high
    assert few["kid"].interval().ci95[0] > 0
    assert few["precision"].value > 0.8
    assert few["recall"].value < 0.2 < 0.8 < halves["recall"].value


def test_expectation_of_kid_does_not_depend_on_the_size_of_the_sets_but_that_of_fid_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distribution, "RESAMPLES", 1)  # only values are looked at

    def mean(function: Callable[[Features, Features], Estimate], n: int) -> tuple[float, float]:
        values = [function(drawn(n, seed=i), drawn(n, seed=1000 + i)).value for i in range(60)]
        return float(np.mean(values)), float(np.std(values) / np.sqrt(len(values)))

    for n in (20, 80):
        value, error = mean(kid, n)
        assert abs(value) < 4 * error
    (small, _), (large, _) = mean(fid, 20), mean(fid, 80)
    assert small > 2 * large > 0


def test_a_difference_of_paired_models_is_narrower_than_they_are() -> None:
    real, fake = drawn(100, seed=1), drawn(100, shift=0.4, seed=2)
    other = made(fake.pooled + 0.05 * drawn(100, seed=3).pooled)
    first, second = estimates(real, fake)[0], estimates(real, other)[0]
    for name, estimate in first.items():
        low, high = estimate.interval().ci95
        gap = (second[name] - estimate).interval()
        assert gap.ci95[1] - gap.ci95[0] < 0.7 * (high - low), name
        assert gap.mean == second[name].value - estimate.value
        none = (estimate - estimate).interval()
        assert (none.mean, *none.ci95) == (0, 0, 0)


def test_the_same_seed_gives_the_same_interval() -> None:
    real, fake = drawn(60, seed=1), drawn(40, shift=0.3, seed=2)
    same, other = (estimates(real, fake, seed)[0] for seed in (0, 1))
    for name, estimate in estimates(real, fake)[0].items():
        assert estimate.interval() == same[name].interval()
        assert estimate.interval() != other[name].interval()


def test_differences_need_equally_many_pictures() -> None:
    real = drawn(40)
    with pytest.raises(UsageError, match="equally many images, got 30 and 31"):
        kid(real, drawn(30)) - kid(real, drawn(31))


# ------------------------------------------------------------------------------------ sets


def test_identical_sets_are_at_no_distance() -> None:
    real = drawn(60)
    found, refused = estimates(real, real)
    assert not refused
    for name in ("fid", "sfid"):
        interval = found[name].interval()
        assert [interval.mean, *interval.ci95] == pytest.approx([0, 0, 0], abs=1e-9)
    assert found["precision"].value == found["recall"].value == 1

    x = real.pooled.double()
    kernel = (x @ x.T / 8 + 1) ** 3
    itself = kernel.diagonal().mean()
    others = (kernel.sum() - kernel.diagonal().sum()) / (60 * 59)
    assert found["kid"].value == pytest.approx(float(2 * (others - itself) / 60))  # unbiased only for disjoint sets


def test_matched_sets_have_one_size_and_lose_nothing_else() -> None:
    real, fake = drawn(50, seed=1), drawn(30, seed=2)
    a, b = matched(real, fake)
    assert len(a) == len(b) == 30
    assert torch.equal(b.pooled, fake.pooled)
    kept = (a.pooled[:, None] == real.pooled).all(2).nonzero()[:, 1]
    assert len(set(kept.tolist())) == 30
    assert torch.equal(a.spatial, real.spatial[kept])
    assert torch.equal(matched(fake, real)[1].pooled, a.pooled)  # the same subset on either side
    assert fid(real, fake).value == frechet(a.pooled, b.pooled).value


def test_what_a_set_does_not_allow_is_left_out_with_its_reason() -> None:
    small = drawn(20, d=12)
    found, refused = estimates(small, small)
    assert list(found) == ["kid", "sfid", "inception_score", "precision", "recall"]
    assert list(refused) == ["fid"]
    assert "12 features needs at least 24 images in each set, got 20" in refused["fid"]
    without = Features(small.pooled, small.spatial, None)
    assert "a network with classes" in estimates(without, without)[1]["inception_score"]


def test_too_few_pictures_and_two_networks_are_refused() -> None:
    for function in (kid, fid, sfid, precision_recall, estimates):
        with pytest.raises(UsageError, match="at least 20 images in each set, got 50 real and 19|got 19"):
            function(drawn(50), drawn(19))
    with pytest.raises(UsageError, match="k must be from 1 to 9 for 20 images, got 10"):
        precision_recall(drawn(20), drawn(20), k=10)
    assert precision_recall(drawn(20), drawn(20), k=9)[0].value == 1
    with pytest.raises(UsageError, match="from one network"):
        kid(drawn(50, d=8), drawn(50, d=9))


# ------------------------------------------------------------------------------------ images


def shapes(n: int, seed: int) -> list[Image.Image]:
    """Images of a disc and a bar in random colours on plain ground, 64 px."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    pictures = []
    for _ in range(n):
        ground, disc, bar = rng.integers(0, 256, (3, 3))
        cx, cy, r, left = rng.integers(16, 48, 4)
        inside = ((x - cx) ** 2 + (y - cy) ** 2 < (r / 2) ** 2)[..., None]
        values = np.where(inside, disc, np.where((abs(x - left) < 5)[..., None], bar, ground))
        pictures.append(Image.fromarray(values.astype(np.uint8)))
    return pictures


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    values = np.asarray(image) + np.random.default_rng(0).normal(0, sigma, (64, 64, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def test_kid_grows_with_noise_blur_and_posterizing() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    network = networks.load("efficientnet-lite0")
    real, fake = network(shapes(48, 1)), shapes(32, 2)
    clean = kid(real, network(fake))
    low, high = clean.interval().ci95
    assert low < 0 < high
    damages: list[tuple[Callable[[Image.Image], Image.Image], Callable[[Image.Image], Image.Image]]] = [
        (lambda x: noisy(x, 1), lambda x: noisy(x, 10)),  # more looks like texture to the network, and less far
        (lambda x: x.filter(ImageFilter.GaussianBlur(0.5)), lambda x: x.filter(ImageFilter.GaussianBlur(3))),
        (lambda x: ImageOps.posterize(x, 6), lambda x: ImageOps.posterize(x, 1)),
    ]
    for weak, strong in damages:
        little, much = (kid(real, network([damage(x) for x in fake])) for damage in (weak, strong))
        assert (much - clean).interval().ci95[0] > 0
        assert (much - little).interval().ci95[0] > 0


def test_intervals_of_shares_stay_within_their_bounds() -> None:
    wide = Estimate(0.97, np.full(50, 0.1), 40, deviations=True, bounds=(0, 1))
    assert wide.interval().ci95[1] == 1
    assert (wide - wide).bounds == (-1, 1)
    assert (wide - Estimate(0.1, np.full(50, 0.9), 40, True, (0, 1))).interval().ci95[1] <= 1
