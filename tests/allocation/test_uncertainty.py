"""Shrinkage against numbers by hand and known noise; the agreement of halves on noise and on signal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made import bit_space, falling, made_scores
from scipy import stats

from ditq.allocation.choices import segments_of
from ditq.allocation.scores import MetricKind
from ditq.allocation.uncertainty import (
    ALL,
    Agreement,
    _centred_ranks,
    _t_quantile,
    agreement,
    errors_of,
    isotonic,
    losses,
    shrunk,
)
from ditq.errors import UsageError


def test_shrinkage_by_hand() -> None:
    # Means 2 and 6. Deviations from the mean over genes, -1, -3 and 1, 3, have the variance 2 of two prompts; over
    # n = 2, times G / (G - 1) = 2: se^2 = 2. tau^2 = 8 - 2 = 6, so each gene keeps 6 / 8 of its distance 2 from 4.
    harms = np.array([[[1.0, 3.0]], [[3.0, 9.0]]])
    assert harms.mean(2)[:, 0].tolist() == [2, 6]
    np.testing.assert_allclose(shrunk(harms, log=False)[:, 0], [2.5, 5.5])


def test_what_a_prompt_adds_to_all_genes_is_no_noise() -> None:
    rng = np.random.default_rng(0)
    harms = np.array([1.0, 2.0, 4.0])[:, None, None] + 100 * rng.standard_normal((1, 1, 8))
    np.testing.assert_allclose(shrunk(harms, log=False), harms.mean(2))
    factors = np.array([1e-4, 1e-2, 1.0])[:, None, None] * np.exp(rng.standard_normal((1, 1, 8)))
    np.testing.assert_allclose(shrunk(factors), factors.mean(2))


def test_a_noisier_gene_moves_further() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 1, 64)) * np.array([0.1, 0.1, 6.0, 0.1])[:, None, None]
    harms = np.array([0.0, 1.0, 4.0, 2.0])[:, None, None] + noise - noise.mean(2, keepdims=True)
    kept = (shrunk(harms, log=False) - harms.mean()) / (harms.mean(2) - harms.mean())
    assert 0 < kept[2, 0] < 0.95
    assert kept[[0, 1, 3], 0].min() > 0.97


@pytest.mark.parametrize("seed", range(5))
def test_true_differences_are_estimated_better_than_by_the_means(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = np.exp(0.5 * rng.standard_normal((60, 1)))
    harms = true[..., None] * np.exp(1.5 * rng.standard_normal((60, 1, 8)) - 1.5**2 / 2)

    def error(found: np.ndarray) -> float:
        return float((np.log(found) - np.log(found).mean() - np.log(true)).std())

    assert error(shrunk(harms)) < 0.9 * error(harms.mean(2))


def test_sensitive_genes_keep_their_rank_in_logarithms() -> None:
    """Relative errors over orders of magnitude: noise that grows with the value does not level the largest."""
    harms = falling([1e-4, 1e-3, 1e-2, 1e-1, 1.0], prompts=8, noise=0.5)
    means = harms.mean(2)
    assert np.abs(np.log(shrunk(harms) / means)).max() < 0.1
    assert (shrunk(harms, log=False) / means)[-1].max() < 0.97


def test_pure_noise_treats_genes_alike() -> None:
    kept = []
    for seed in range(40):
        harms = 1 + 0.3 * np.random.default_rng(seed).standard_normal((30, 1, 6))
        kept.append(np.ptp(shrunk(harms)) / np.ptp(harms.mean(2)))
    # The measured variance is below that of the noise in half of the runs, and slightly above in the others.
    assert np.median(kept) < 1e-9
    assert np.quantile(kept, 0.9) < 0.5


def test_nan_one_prompt_and_one_gene() -> None:
    harms = np.array([[[1.0, np.nan, 3.0]], [[3.0, np.nan, 9.0]]])
    np.testing.assert_allclose(shrunk(harms, log=False)[:, 0], [2.5, 5.5])
    assert shrunk(harms[:, :, :1]).tolist() == [[1.0], [3.0]]
    assert shrunk(harms[:1]).tolist() == [[2.0]]
    with pytest.raises(UsageError, match="No prompt"):
        shrunk(harms[:, :, 1:2])


@given(hnp.arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(-9, 9, width=16)))
def test_isotonic_is_the_closest_rising_row(values: np.ndarray) -> None:
    found = isotonic(values)
    assert (np.diff(found, axis=1) >= -1e-9).all()
    from scipy.optimize import isotonic_regression

    for row, expected in zip(found, values, strict=True):
        np.testing.assert_allclose(row, isotonic_regression(expected).x, atol=1e-9)


@given(st.integers(0, 10_000))
def test_shrunk_harms_never_fall_with_fewer_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    harms = rng.standard_normal((rng.integers(1, 6), 3, rng.integers(1, 6)))
    assert (np.diff(shrunk(harms), axis=1) >= -1e-12).all()
    assert (np.diff(shrunk(np.exp(harms)), axis=1) >= -1e-12).all()


# ---------------------------------------------------------------------------------------- errors of a space


def test_errors_of_a_space_follow_its_genes_and_choices() -> None:
    scores = made_scores(falling([3.0, 1.0, 2.0]))
    space = bit_space(2, "weights:10", bits=(16, 4))
    errors = errors_of(space, scores)
    assert [list(e) for e in errors] == [["w16", "w4"]] * 2
    np.testing.assert_allclose([e["w4"] for e in errors], [3.0, 1.0], rtol=0.05)
    assert [e["w16"] for e in errors] == [0.0, 0.0]


def test_errors_of_an_improvement_are_zero() -> None:
    harms = np.array([-1.0, 1.0])[:, None, None] * np.ones((2, 3, 5))
    scores = made_scores(falling([1.0, 1.0], 5), {"score": harms})
    errors = errors_of(bit_space(2), scores, "score")
    assert errors[0] == {"w8": 0, "w6": 0, "w4": 0}
    assert errors[1] == pytest.approx({"w8": 1, "w6": 1, "w4": 1})


def test_paired_metrics_count_from_their_best() -> None:
    similarity = np.array([0.9, 0.5])[:, None, None] * np.ones((2, 3, 4))
    kinds = {"prediction": made_scores(falling([1.0])).metrics["prediction"],
             "ssim": MetricKind(kind="paired", higher_is_better=True, title="SSIM")}  # fmt: skip
    values = {"prediction": falling([1.0, 1.0], 4).tolist(), "ssim": similarity.tolist()}
    scores = made_scores(falling([1.0, 1.0], 4), metrics=kinds, values=values)
    np.testing.assert_allclose(losses(scores, "ssim"), 0.9 - similarity)


def test_segments_add_up_to_the_whole() -> None:
    times = (900.0, 700.0, 300.0, 100.0)
    early_late = np.array([[4.0, 4.0, 1.0, 1.0], [1.0, 1.0, 8.0, 8.0]])[:, None, :, None]
    prediction = early_late * np.array([0.1, 1.0])[None, :, None, None] * np.ones((1, 1, 1, 3))
    scores = made_scores(prediction, choices=("a8", "a4"), times=times)
    space = bit_space(2, "activations:6", bits=(8, 4), activations=True, segments=segments_of(times, 2))
    errors = errors_of(space, scores)
    assert [gene.name for gene in space.genes[:2]] == ["g0, t > 500", "g0, t < 500"]
    np.testing.assert_allclose([e["a4"] for e in errors], [2.0, 0.5, 0.5, 4.0])
    whole = errors_of(bit_space(2, "activations:6", bits=(8, 4), activations=True), scores)
    np.testing.assert_allclose([e["a4"] for e in whole], [2.5, 4.5])
    with pytest.raises(UsageError, match="known by timestep"):
        errors_of(space, made_scores(prediction, {"score": prediction[:, :, 0]}, choices=("a8", "a4"), times=times),
                  "score")  # fmt: skip


def test_errors_of_a_space_that_was_not_measured() -> None:
    scores = made_scores(falling([1.0, 2.0]))
    with pytest.raises(UsageError, match="no 'g2'.*by layer"):
        errors_of(bit_space(3), scores)
    with pytest.raises(UsageError, match="no values at w3.*w8, w6, w4"):
        errors_of(bit_space(2, "weights:6", bits=(8, 3)), scores)
    times = (900.0, 800.0)
    few = made_scores(np.ones((1, 2, 2, 1)), choices=("a8", "a4"), times=times)
    segmented = bit_space(
        1, "activations:6", bits=(8, 4), activations=True, segments=segments_of((900.0, 800.0, 300.0, 100.0), 2)
    )
    with pytest.raises(UsageError, match="No measured timestep is in t < 550"):
        errors_of(segmented, few)


# ------------------------------------------------------------------------------------------- agreement


def test_signal_is_ranked() -> None:
    scores = made_scores(falling(np.geomspace(1, 10, 12), prompts=32, noise=0.3))
    found = agreement(scores)
    assert [a.choice for a in found] == ["w8", "w6", "w4", ALL]
    for a in found:
        assert not a.is_noise
        assert 0.8 < a.low < a.correlation <= a.high <= 1
        assert (a.p, a.genes, a.prompts) == (pytest.approx(1 / 501), 12, 32)
    assert str(found[2]).startswith("w4: rank correlation 1.00 (95 % 0.99 to 1.00) between")
    assert str(found[2]).endswith("between halves of 32 prompts, 12 genes")
    assert agreement(scores) == found


def test_noise_is_noise_in_most_runs() -> None:
    """At a level of 5 %, with prompts that differ and genes whose noise does."""
    ranked = 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scale = np.exp(0.3 * rng.standard_normal((8, 1, 1)))
        harms = 5 * rng.standard_normal((1, 1, 10)) + scale * rng.standard_normal((8, 1, 10))
        scores = made_scores(harms, choices=("w4",))
        ranked += not agreement(scores)[-1].is_noise
    assert ranked <= 4


def test_intervals_contain_the_correlation_of_many_prompts() -> None:
    levels = np.random.default_rng(0).standard_normal((20, 1, 1))

    def measured(seed: int) -> np.ndarray:
        return levels + 3 * np.random.default_rng(seed).standard_normal((20, 1, 12))

    halves = [stats.spearmanr(h[:, 0, :6].mean(1), h[:, 0, 6:].mean(1))[0] for h in map(measured, range(300))]
    found = [agreement(made_scores(measured(1000 + i), choices=("w4",)))[0] for i in range(25)]
    inside = sum(a.low <= np.mean(halves) <= a.high for a in found)
    assert inside >= 21
    assert np.mean([a.high - a.low for a in found]) < 1.2


def test_noise_says_so() -> None:
    rng = np.random.default_rng(3)
    found = agreement(made_scores(np.exp(rng.standard_normal((12, 3, 16)))))[-1]
    assert found.is_noise
    assert str(found).endswith("the scores are noise, not ranked by them")


def test_agreement_of_some_genes() -> None:
    """Two kinds of genes that differ, and do not within themselves: the whole is ranked, a kind is not."""
    rng = np.random.default_rng(1)
    levels = np.array([1.0] * 6 + [10.0] * 6)[:, None, None]
    scores = made_scores(levels * np.exp(0.3 * rng.standard_normal((12, 3, 24))))
    assert not agreement(scores)[-1].is_noise
    part = agreement(scores, genes=[f"g{i}" for i in range(6)])[-1]
    assert part.genes == 6
    assert part.is_noise
    with pytest.raises(UsageError, match="Unknown gene of these scores 'h0'"):
        agreement(scores, genes=["h0"])


def test_too_few_to_tell_is_noise() -> None:
    few = agreement(made_scores(falling([1.0, 5.0, 9.0], prompts=3)))[-1]
    assert few.is_noise
    assert "3 prompts and 3 genes are too few" in str(few)
    assert agreement(made_scores(falling([1.0])))[0].is_noise


def test_an_interval_that_contains_zero_is_noise() -> None:
    assert Agreement("w4", 0.3, -0.1, 0.7, 0.01, 9, 9).is_noise
    assert Agreement("w4", 0.3, 0.1, 0.7, 0.06, 9, 9).is_noise
    assert not Agreement("w4", 0.3, 0.1, 0.7, 0.05, 9, 9).is_noise


@given(hnp.arrays(float, (3, 6), elements=st.integers(0, 4).map(float)))
def test_ranks_are_those_of_scipy(x: np.ndarray) -> None:
    np.testing.assert_allclose(_centred_ranks(x), stats.rankdata(x, axis=1) - 3.5)


def test_quantiles_are_those_of_scipy() -> None:
    for degrees in (3, 4, 7, 15, 63):
        assert _t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01)
