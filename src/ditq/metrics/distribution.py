"""Distances of a set of images to a set of real ones: KID, FID, sFID, Inception Score, precision and recall.

Every function takes the `Features` of images in a network and returns an `Estimate`: the value, and its values on
resamples of the images, from which the 95 % interval is computed. Resamples depend only on the sizes of the sets and
the seed. Two models with the same prompts and seeds are therefore compared pair by pair by subtraction::

    kid(real, quantized) - kid(real, reference)

The interval of the difference is far narrower than those of its terms, which share the real images and the prompts.
Values of different networks, or of sets of different sizes, are not comparable. Use KID on small sets: its expectation
does not depend on their size, while FID, sFID and the Inception Score are biased by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditq.errors import UsageError
from ditq.metrics.interval import Interval
from ditq.metrics.metric import Description
from ditq.metrics.networks.base import Features

RESAMPLES = 1000  # of KID's bootstrap
GROUPS = 10  # of the jackknife
HALVINGS = 50  # of precision and recall
SMALLEST = 20  # images in a set: two in every group of the jackknife, and halves with more than k neighbours
# Half a 95 % interval in standard errors: Student's t with GROUPS - 1 degrees of freedom. Halvings have more degrees,
# but their intervals are up to a tenth too narrow on 64 images.
T_975 = 2.262
BLOCK = 1024  # rows of a kernel or distance matrix computed at once

DISTRIBUTION = (
    Description(
        "kid", "KID", "", False, "distribution",
        "Kernel distance to real images (Bińkowski et al. 2018). It is unbiased: for two sets of one distribution it "
        "is near zero, and negative as often as positive. The main distribution metric on small sets.",
    ),
    Description(
        "fid", "FID", "", False, "distribution",
        "Fréchet distance to real images (Heusel et al. 2017) of Gaussians fitted to features. Smaller sets give "
        "larger values: compare only sets of one size.",
    ),
    Description(
        "sfid", "sFID", "", False, "distribution",
        "FID of an earlier layer with spatial positions (Nash et al. 2021): sensitive to layout and texture.",
    ),
    Description(
        "inception_score", "IS", "", True, "distribution",
        "Inception Score (Salimans et al. 2016): high if each image clearly shows one class and all classes are "
        "equally frequent. It does not use real images.",
    ),
    Description(
        "precision", "Precision", "", True, "distribution",
        "Share of images that lie among the real ones (Kynkäänniemi et al. 2019): quality.",
    ),
    Description(
        "recall", "Recall", "", True, "distribution",
        "Share of real images that lie among the generated ones (Kynkäänniemi et al. 2019): variety.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A value, with its values on resamples of the images it was measured on.

    Attributes:
        value: on all images.
        replicates: float64 [resamples]. The value on each resample of a bootstrap. If ``deviations`` is True,
            deviations instead, whose root mean square is the standard error.
        n: the number of generated images.
        deviations: the kind of ``replicates``.
        bounds: the smallest and largest possible value; intervals are clipped to them.
    """

    value: float
    replicates: NDArray[np.float64]
    n: int
    deviations: bool
    bounds: tuple[float, float] = (-np.inf, np.inf)

    def interval(self) -> Interval:
        """The 95 % interval: how much the value varies between sets of images of the same models.

        It does not include the bias of FID, sFID and the Inception Score on small sets. That bias is about the same
        for two models on sets of one size, and cancels in their difference.
        """
        if self.deviations:
            half = T_975 * float(np.sqrt(np.square(self.replicates).mean()))
            low, high = self.value - half, self.value + half
        else:
            low, high = np.percentile(self.replicates, [2.5, 97.5])
        low, high = np.clip([low, high], *self.bounds)
        return Interval(mean=self.value, ci95=(float(low), float(high)), n=self.n)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference of one metric between two models with the same prompts and seeds in the same order.

        Raises:
            UsageError: the numbers of images differ.
        """
        if (self.n, self.deviations) != (other.n, other.deviations):
            raise UsageError(
                f"a paired difference needs one metric on equally many images, got {self.n} and {other.n} images"
            )
        bounds = (self.bounds[0] - other.bounds[1], self.bounds[1] - other.bounds[0])
        return Estimate(self.value - other.value, self.replicates - other.replicates, self.n, self.deviations, bounds)


def kid(real: Features, fake: Features, seed: int = 0) -> Estimate:
    """Kernel Inception Distance: unbiased squared MMD with the kernel (x.y / d + 1)^3 (Bińkowski et al. 2018).

    It is computed over all pairs at once, not averaged over random subsets, so the value is deterministic. The sets
    may differ in size (torchmetrics' helpers assume one size; only its kernel is used here). The bootstrap resamples
    both sets. Pairs of two draws of the same image are left out of a replicate, as pairs of an image with itself are
    left out of the value; otherwise they would raise every replicate. If both sets come from one distribution, the
    interval is wider than necessary. The KID of a set to itself is negative: it is unbiased only for sets without
    common images.

    Raises:
        UsageError: a set has fewer than 20 images, or the features come from different networks.
    """
    _check(real.pooled, fake.pooled)
    x, y = real.pooled.double(), fake.pooled.double()
    c, d = _counts(len(x), (seed, 0)), _counts(len(y), (seed, 1))
    cross = _kernel_sums(x, y, c, d) / (len(x) * len(y))
    values = (_within(x, c) + _within(y, d) - 2 * cross).numpy()
    return Estimate(float(values[0]), values[1:], len(y), deviations=False)


def fid(real: Features, fake: Features, seed: int = 0) -> Estimate:
    """Fréchet distance of Gaussians fitted to pooled features (Heusel et al. 2017), on sets of one size.

    Raises:
        UsageError: there are too few images for the network's feature size (see `frechet`).
    """
    real, fake = matched(real, fake, seed)
    return frechet(real.pooled, fake.pooled, seed)


def sfid(real: Features, fake: Features, seed: int = 0) -> Estimate:
    """FID of spatial features (Nash et al. 2021), on sets of one size.

    Raises:
        UsageError: there are too few images for the network's feature size (see `frechet`).
    """
    real, fake = matched(real, fake, seed)
    return frechet(real.spatial, fake.spatial, seed)


def frechet(x: Tensor, y: Tensor, seed: int = 0) -> Estimate:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) of the means and covariances of x [n, d] and y [n, d].

    The distance of two samples of one Gaussian is not zero: more than half of its variance at n = d, less than half at
    n = 2 d. With fewer images covariances are singular: small changes of the images drown, or get the wrong sign.

    Raises:
        UsageError: n < 2 d.
    """
    from torchmetrics.image.fid import _compute_fid

    _check(x, y)
    n, d = y.shape
    if n < 2 * d:
        raise UsageError(
            f"a Fréchet distance of {d} features needs at least {2 * d} images in each set, got {n}: with fewer, it "
            "depends more on the number of images than on the images. KID needs far fewer."
        )

    def value(x: Tensor, y: Tensor) -> float:
        return float(_compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()))

    return _jackknife(value, x.double(), y.double(), seed)


def inception_score(fake: Features, seed: int = 0) -> Estimate:
    """The exponential of the mean KL divergence between p(class | image) and p(class) (Salimans et al. 2016).

    It is computed over all images at once. Published values are means over ten parts of 5000 images; smaller sets have
    smaller values.

    Raises:
        UsageError: the network has no classes, or there are fewer than 20 images.
    """
    from torchmetrics.functional import kl_divergence

    if fake.probabilities is None:
        raise UsageError("the Inception Score needs a network with classes; this network has none")
    p = fake.probabilities.double()
    _check(p, p)
    return _jackknife(lambda _, p: float(kl_divergence(p, p.mean(0).expand_as(p)).exp()), p, p, seed)


def precision_recall(real: Features, fake: Features, k: int = 3, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), on sets of one size.

    A set's region is the union of balls around its images; the radius of a ball is the distance to the k-th nearest
    other image. Precision is the share of generated images in the real region, recall the share of real images in the
    generated region.

    Standard errors come from halvings: half the difference of the values on two random halves. Neighbours change too
    abruptly for the jackknife, whose intervals of differences were twice as wide as necessary. If all images lie
    inside (or none), the interval has no width.

    Raises:
        UsageError: a set has fewer than 20 images, k is too large for half a set, or the features come from different
            networks.
    """
    _check(real.pooled, fake.pooled)
    real, fake = matched(real, fake, seed)
    if not 1 <= k < len(fake) // 2:
        raise UsageError(f"k must be from 1 to {len(fake) // 2 - 1} for {len(fake)} images, got {k}")
    x, y = real.pooled.double(), fake.pooled.double()
    subsets = _halves(len(x), seed)
    return _share_inside(y, x, subsets, k), _share_inside(x, y, subsets, k)


def matched(real: Features, fake: Features, seed: int = 0) -> tuple[Features, Features]:
    """Reduces the larger set to the size of the smaller one: a seeded subset, the same for all models."""
    n = min(len(real), len(fake))

    def subset(features: Features) -> Features:
        if len(features) == n:
            return features
        return features[torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(features))[:n]))]

    return subset(real), subset(fake)


def estimates(real: Features, fake: Features, seed: int = 0) -> tuple[dict[str, Estimate], dict[str, str]]:
    """All metrics of `DISTRIBUTION` by name, and the reasons for those that cannot be computed on these sets.

    Raises:
        UsageError: a set has fewer than 20 images, or the features come from different networks.
    """
    by_name = {"kid": kid(real, fake, seed)}
    by_name["precision"], by_name["recall"] = precision_recall(real, fake, seed=seed)
    refused = {}
    optional: dict[str, Callable[[], Estimate]] = {
        "fid": lambda: fid(real, fake, seed),
        "sfid": lambda: sfid(real, fake, seed),
        "inception_score": lambda: inception_score(fake, seed),
    }
    for name, function in optional.items():
        try:
            by_name[name] = function()
        except UsageError as e:
            refused[name] = str(e)
    return {metric.name: by_name[metric.name] for metric in DISTRIBUTION if metric.name in by_name}, refused


def _check(x: Tensor, y: Tensor) -> None:
    if min(len(x), len(y)) < SMALLEST:
        raise UsageError(
            f"distribution metrics need at least {SMALLEST} images in each set, got {len(x)} real and {len(y)} "
            "generated"
        )
    if x.shape[1] != y.shape[1]:
        raise UsageError(
            "the features of both sets must come from one network at one image size, got "
            f"{x.shape[1]} and {y.shape[1]} features"
        )


def _counts(n: int, seed: tuple[int, int]) -> Tensor:
    """How often each of n images occurs, [n, 1 + resamples]: once in column 0, then as drawn for each resample."""
    resamples = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).T
    return torch.from_numpy(np.concatenate([np.ones((n, 1)), resamples], 1))


def _kernel_sums(x: Tensor, y: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sum over i, j of c[i, r] K(x[i], y[j]) d[j, r], for every resample r."""
    from torchmetrics.image.kid import poly_kernel

    sums = torch.zeros(c.shape[1], dtype=torch.float64)
    for xs, cs in zip(x.split(BLOCK), c.split(BLOCK), strict=True):
        sums += (cs * (poly_kernel(xs, y) @ d)).sum(0)
    return sums


def _within(x: Tensor, c: Tensor) -> Tensor:
    """Mean kernel over the pairs of different images of one set, for every resample."""
    diagonal = (x.square().mean(1) + 1) ** 3  # K(x[i], x[i])
    n = len(x)
    return (_kernel_sums(x, x, c, c) - diagonal @ c.square()) / (n * n - c.square().sum(0))


def _jackknife(value: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, seed: int) -> Estimate:
    """The value on x and y (of one size), and its deviations with one of ten random groups left out at a time.

    A bootstrap would put duplicates into the sets, which bias all of these metrics; a jackknife does not. The groups
    contain the same rows of both sets; for independent sets this is as good as any other choice.
    """
    group = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % GROUPS)
    left_out = np.array([value(x[group != i], y[group != i]) for i in range(GROUPS)])
    deviations = np.sqrt(GROUPS - 1) * (left_out - left_out.mean())
    return Estimate(value(x, y), deviations, len(y), deviations=True)


def _halves(n: int, seed: int) -> list[Tensor]:
    """All n rows, followed by the two halves of each random halving (an odd row is left out)."""
    rng = np.random.default_rng(seed)
    order = [torch.from_numpy(rng.permutation(n)) for _ in range(HALVINGS)]
    return [torch.arange(n)] + [half for rows in order for half in rows[: n // 2 * 2].chunk(2)]


def _share_inside(x: Tensor, y: Tensor, subsets: Sequence[Tensor], k: int) -> Estimate:
    """The share of x inside the region of y; ``subsets`` are rows of both: first all, then pairs of halves."""
    to_y, in_y = torch.cdist(x, y), torch.cdist(y, y)
    shares = np.empty(len(subsets))
    for i, rows in enumerate(subsets):
        grid = rows[:, None], rows
        radii = in_y[grid].topk(k + 1, largest=False).values[:, -1]  # the nearest is the image itself
        shares[i] = (to_y[grid] <= radii).any(1).double().mean()
    return Estimate(float(shares[0]), (shares[1::2] - shares[2::2]) / 2, len(x), deviations=True, bounds=(0, 1))
