"""How much of a sensitivity score is noise: scores shrunk by their errors, and their agreement between prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ditq.allocation.choices import Segment
from ditq.allocation.scores import LATENT_ERROR, PREDICTION, Array, Scores, listed
from ditq.allocation.space import Space
from ditq.errors import UsageError, unknown

ALL = "all widths"
"""The choice of an agreement over all choices together."""

SPLITS, PERMUTATIONS = 32, 500
BATCH = 20  # permutations at once

FEWEST = 4
"""Fewer prompts have no two halves of at least two prompts."""

LEVEL = 0.05

# ------------------------------------------------------------------------------------------- shrinkage


def shrunk(harms: Array, log: bool | None = None) -> Array:
    """The mean harm of every gene at every choice, shrunk by its noise, so that no gene is ranked within noise.

    Empirical Bayes for each choice: the mean m_g of a gene moves to the mean over genes, and keeps the share
    tau^2 / (tau^2 + se_g^2) of its distance, where se_g is its standard error and tau^2, the variance of the true
    means, is max(0, var_g m - mean_g se^2). If the means vary no more than their errors do, all genes become equal.
    Then a cheaper choice never has less harm than a more precise one (isotonic regression over choices).

    The standard errors are those of differences between genes: the prompts are paired, and what a prompt adds to all
    genes alike does not change their order. Relative errors are shrunk as logarithms: over the layers of a model they
    span orders of magnitude and their noise grows with them, so on a linear scale the most sensitive genes, which have
    the largest standard errors, would shrink most and lose their rank.

    Args:
        harms: [genes, choices, prompts], choices from most bits to fewest. A prompt with NaN is left out.
        log: shrink logarithms. By default, if all harms are positive.

    Returns:
        float64 [genes, choices]. With one gene, or with one prompt, whose noise is unknown: the (isotonic) means.

    Raises:
        UsageError: no prompt has values of all genes.

    Example:
        >>> import numpy as np
        >>> shrunk(np.array([[[1.0, 3.0]], [[3.0, 1.0]]]), log=False)  # noise only
        array([[2.],
               [2.]])
    """
    harms = _complete(harms)
    genes, _, prompts = harms.shape
    means = harms.mean(2)
    if genes > 1 and prompts > 1:
        log = bool((harms > 0).all()) if log is None else log and bool((harms > 0).all())
        # A logarithm of a mean has the standard error of the values relative to the mean.
        values = harms / means[..., None] if log else harms
        deviations = values - values.mean(0)
        # The mean over genes contains the gene itself, which takes 1/G of its variance.
        variance = deviations.var(2, ddof=1) / prompts * genes / (genes - 1)
        levels = np.log(means) if log else means
        tau = np.maximum(levels.var(0, ddof=1) - variance.mean(0), 0.0)
        weight = tau / np.maximum(tau + variance, 1e-300)
        levels = levels.mean(0) + weight * (levels - levels.mean(0))
        means = np.exp(levels) if log else levels
    return isotonic(means)


def isotonic(values: Array) -> Array:
    """The closest values [genes, choices] (least squares) that never fall from one choice to the next."""
    count = values.shape[1]
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    out = np.empty_like(values)
    for j in range(count):  # max over starts of min over ends of the mean between them
        out[:, j] = np.max(
            [np.min([(sums[:, b + 1] - sums[:, a]) / (b + 1 - a) for b in range(j, count)], 0) for a in range(j + 1)],
            0,
        )
    return out


def _complete(harms: Array) -> Array:
    """The prompts that have values of all genes and choices."""
    complete = ~np.isnan(harms).any((0, 1))
    if not complete.any():
        raise UsageError("No prompt has a value of every gene; measure more prompts, or more timesteps of each.")
    return np.asarray(harms[:, :, complete])


def losses(scores: Scores, metric: str = PREDICTION, between: tuple[float, float] | None = None) -> Array:
    """Harms [genes, choices, prompts] of which 0 is that of the 16-bit model, as far as a metric knows it.

    Metrics of kind "paired" compare with the 16-bit image and have no value for the 16-bit model itself (its PSNR is
    infinite). Their harms count from the mean of the least harmful gene and choice.
    """
    harms = scores.harms(metric, between)
    if scores.metrics[metric].kind == "paired":
        harms = harms - np.nanmean(harms, axis=2).min()
    return harms


def is_error(scores: Scores, metric: str) -> bool:
    """Whether the harms of a metric are relative squared errors, which are shrunk as logarithms."""
    return scores.metrics[metric].kind in ("error", "decibel")


def errors_of(space: Space, scores: Scores, metric: str | None = None) -> list[dict[int | str, float]]:
    """The shrunk harm of every gene of a space at each of its choices, for :func:`ditq.allocation.integer_program`.

    Harms are shrunk over the genes of the space, and are at least 0, that of 16 bit: a choice that improves a metric
    by chance is not worth more than none. Genes of timestep segments get their part of the error, so that the sum over
    segments is the error of the whole run: the prediction error between these timesteps times the segment's share of
    the steps. The error of the final latents is divided among segments in proportion to that.

    Args:
        space: of the part and unit that was measured; choices in 16 bit need no scores.
        scores: with all genes and choices of the space.
        metric: by name; by default :attr:`Scores.error`.

    Raises:
        UsageError: a gene or a choice was not measured; an unknown metric; segments with a metric other than
            ``prediction``, or without a measured timestep.
    """
    metric = metric or scores.error
    if metric == LATENT_ERROR and any(gene.segment for gene in space.genes):
        return _divided(space, scores)
    numbers = {name: i for i, name in enumerate(scores.genes)}
    columns = {choice: i for i, choice in enumerate(scores.choices)}
    rows: dict[Segment | None, list[tuple[int, int]]] = {}
    for i, gene in enumerate(space.genes):
        name = gene.name if gene.segment is None else gene.name.removesuffix(f", {gene.segment}")
        if name not in numbers:
            raise UsageError(
                f"These scores have no {name!r}: they are of {len(numbers)} genes by {scores.unit} ({scores.part}). "
                f"Allocate by {scores.unit}, or measure again."
            )
        missing = [c for c in gene.plans if c not in columns and not _is_kept(c)]
        if missing:
            raise UsageError(
                f"These scores have no values at {missing[0]}: they are of {scores.part} at {listed(scores.choices)}."
                " Choose among these, or measure again."
            )
        rows.setdefault(gene.segment, []).append((i, numbers[name]))
    out: list[dict[int | str, float]] = [{} for _ in space.genes]
    for segment, pairs in rows.items():
        harms = losses(scores, metric, None if segment is None else (segment.begin, segment.end))
        if np.isnan(harms).all():
            raise UsageError(f"No measured timestep is in {segment}; measure more moments, or use fewer segments.")
        values = np.maximum(shrunk(harms[[row for _, row in pairs]], is_error(scores, metric)), 0.0)
        share = 1.0 if segment is None else segment.share
        for (i, _), of_gene in zip(pairs, values, strict=True):
            out[i] = {c: 0.0 if _is_kept(c) else share * float(of_gene[columns[str(c)]]) for c in space.genes[i].plans}
    return out


def _divided(space: Space, scores: Scores) -> list[dict[int | str, float]]:
    """The errors of the final latents, divided among the segments of each gene by their prediction errors."""
    parts = errors_of(space, scores, PREDICTION)
    first = space.genes[0].segment
    numbers = [i for i, gene in enumerate(space.genes) if gene.segment == first]
    whole_genes = tuple(
        replace(space.genes[i], name=space.genes[i].name.removesuffix(f", {first}"), segment=None) for i in numbers
    )
    whole = errors_of(replace(space, genes=whole_genes), scores, LATENT_ERROR)
    by_name = {gene.name: errors for gene, errors in zip(whole_genes, whole, strict=True)}
    names = [gene.name.removesuffix(f", {gene.segment}") for gene in space.genes]
    sums: dict[tuple[str, int | str], float] = {}
    for name, of_gene in zip(names, parts, strict=True):
        for choice, error in of_gene.items():
            sums[name, choice] = sums.get((name, choice), 0.0) + error
    return [
        {c: by_name[name][c] * error / max(sums[name, c], 1e-300) for c, error in of_gene.items()}
        for name, of_gene in zip(names, parts, strict=True)
    ]


def _is_kept(choice: int | str) -> bool:
    return choice in ("w16", "a16")


# ------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Agreement:
    """The rank correlation of the genes' scores between two halves of the prompts.

    Attributes:
        choice: a width, or :data:`ALL`: the mean over widths.
        correlation: Spearman's, the mean over random halves.
        low: of its 95 % interval over prompts.
        high: of the interval.
        p: probability of a correlation at least as large if no gene differed from another.
        genes: how many are ranked.
        prompts: in both halves together.
    """

    choice: str
    correlation: float
    low: float
    high: float
    p: float
    genes: int
    prompts: int

    @property
    def is_noise(self) -> bool:
        """Whether the correlation is not above zero with confidence."""
        return self.p > LEVEL or self.low <= 0

    def __str__(self) -> str:
        if self.genes < 2 or self.prompts < FEWEST:
            return (
                f"{self.choice}: {self.prompts} prompts and {self.genes} genes are too few to compare halves of the "
                "prompts; not ranked by these scores"
            )
        text = (
            f"{self.choice}: rank correlation {self.correlation:.2f} (95 % {self.low:.2f} to {self.high:.2f}) between "
            f"halves of {self.prompts} prompts, {self.genes} genes"
        )
        return f"{text}: the scores are noise, not ranked by them" if self.is_noise else text


def agreement(
    scores: Scores,
    metric: str | None = None,
    between: tuple[float, float] | None = None,
    genes: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Agreement]:
    """Whether other prompts would rank the genes alike, for every choice, and last for all together.

    The correlation is the mean over :data:`SPLITS` random splits into halves. Splits of the same prompts are not
    independent, so neither the test nor the interval counts them as repetitions:

    * p compares with scores whose genes are permuted within every prompt, :data:`PERMUTATIONS` times. The same
      splits are evaluated, so their dependence is part of the null distribution.
    * The interval is a jackknife over prompts (t, n - 1 degrees of freedom). A bootstrap would put copies of a prompt
      into both halves, or into one half only, which biases the correlation.

    Args:
        scores: of at least :data:`FEWEST` prompts and two genes; with fewer, the result is noise.
        metric: by name; by default :attr:`Scores.error`.
        between: timesteps, see :meth:`Scores.harms`.
        genes: only these, by name.
        seed: of splits and permutations.

    Raises:
        UsageError: an unknown metric or gene.
    """
    harms = _complete(scores.harms(metric or scores.error, between))
    if genes is not None:
        wrong = [name for name in genes if name not in scores.genes]
        if wrong:
            raise unknown("gene of these scores", wrong[0], scores.genes)
        harms = harms[[scores.genes.index(name) for name in genes]]
    count, choices, prompts = harms.shape
    names = [*scores.choices, ALL]
    if count < 2 or prompts < FEWEST:
        return [Agreement(name, 0.0, -1.0, 1.0, 1.0, count, prompts) for name in names]
    generator = np.random.default_rng(seed)
    values = harms.transpose(1, 2, 0)  # [choices, prompts, genes]
    halves = _halves(prompts, generator)

    observed = _correlations(values, halves)
    exceeded = np.ones(choices + 1)
    for _ in range(PERMUTATIONS // BATCH):
        # One order for all choices of a prompt keeps their dependence.
        order = generator.permuted(np.tile(np.arange(count), (BATCH, 1, prompts, 1)), axis=-1)
        permuted = np.take_along_axis(values[None], order, -1)
        exceeded += (_correlations(permuted, halves) >= observed - 1e-12).sum(0)
    without = np.stack([_correlations(values, _without(halves, i)) for i in range(prompts)])
    error = np.sqrt((prompts - 1) / prompts * np.square(without - without.mean(0)).sum(0))
    width = _t_quantile(prompts - 1) * error
    return [
        Agreement(
            name, float(observed[i]), float(max(-1, observed[i] - width[i])), float(min(1, observed[i] + width[i])),
            float(exceeded[i] / (PERMUTATIONS + 1)), count, prompts,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip


def _halves(prompts: int, generator: np.random.Generator) -> Array:
    """Membership [2, splits, prompts] of random disjoint halves; with an odd number, one half has a prompt more."""
    first = np.zeros((SPLITS, prompts))
    first[:, : prompts // 2] = 1
    first = generator.permuted(first, axis=1)
    return np.stack([first, 1 - first])


def _without(halves: Array, prompt: int) -> Array:
    out = halves.copy()
    out[:, :, prompt] = 0
    return out


def _correlations(values: Array, halves: Array) -> Array:
    """Spearman's correlation between the sums over halves of [..., choices, prompts, genes], the mean over splits.

    Returns:
        [..., choices + 1]: last the mean over choices.
    """
    a, b = (_centred_ranks(half @ values) for half in halves)  # sums rank as means do
    lengths = np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))
    each = ((a * b).sum(-1) / np.maximum(lengths, 0.25)).mean(-1)  # 0 where all are equal
    return np.concatenate([each, each.mean(-1, keepdims=True)], -1)


def _centred_ranks(x: Array) -> Array:
    """Ranks of the values in each row, with mean 0; equal values share the mean of their ranks."""
    count = x.shape[-1]
    order = np.argsort(x, axis=-1)
    new = np.diff(np.take_along_axis(x, order, -1), axis=-1) != 0
    yes, steps = np.ones((*x.shape[:-1], 1), bool), np.arange(count)
    first = np.maximum.accumulate(np.where(np.concatenate([yes, new], -1), steps, 0), axis=-1)
    ends = np.where(np.concatenate([new, yes], -1), steps, count)
    last = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(x.shape)
    np.put_along_axis(ranks, order, (first + last - count + 1) / 2, -1)
    return ranks


def _t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t for at least 3 degrees of freedom, by its expansion (scipy is optional)."""
    z = 1.959964
    terms = (z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z, 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z)
    return z + sum(
        term / (scale * degrees**n) for n, (term, scale) in enumerate(zip(terms, (4, 96, 384), strict=True), 1)
    )
