"""Bootstrap intervals: they cover, they shrink with more data, pairing narrows them."""

import numpy as np
import pytest

from ditq.metrics import aggregate, paired_difference
from ditq.metrics.score import verdict


def test_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        low, high = aggregate(rng.normal(3.0, 2.0, 40).tolist(), seed=i).ci95
        covered += low <= 3.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_width_is_that_of_the_normal_approximation() -> None:
    x = np.random.default_rng(1).normal(0, 1, 400)
    low, high = aggregate(x.tolist()).ci95
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.1)


def test_mean_and_number_are_those_of_the_values() -> None:
    a = aggregate([1.0, 2.0, 6.0])
    assert (a.mean, a.n) == (3.0, 3)
    assert a.ci95[0] < 3.0 < a.ci95[1]
    assert a.model_dump() == {"mean": 3.0, "ci95": a.ci95, "n": 3}


def test_same_seed_same_interval() -> None:
    assert aggregate([1.0, 2.0, 4.0], seed=3) == aggregate([1.0, 2.0, 4.0], seed=3)


@pytest.mark.parametrize("values", [[2.5], [1.0, 4.0]])
def test_fewer_than_three_values_have_no_interval_and_their_difference_no_verdict(values: list[float]) -> None:
    alone = aggregate(values)
    assert (alone.mean, alone.ci95, alone.n) == (2.5, None, len(values))
    assert str(alone) == "2.50 [no interval]"
    gap = paired_difference(values, [0.0] * len(values))
    assert gap.ci95 is None
    assert verdict(gap, higher_is_better=True) is None
    assert verdict(paired_difference([2.0, 2.5, 3.0], [0.0] * 3), higher_is_better=True) == "better"


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]], ids=["none", "nan", "inf"])
def test_values_that_have_no_mean_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        aggregate(values)


def test_pairs_tell_more_than_two_intervals() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.normal(20, 5, 60)  # some prompts are hard for every model
    a, b = prompt + rng.normal(0.5, 0.2, 60), prompt + rng.normal(0.0, 0.2, 60)
    difference, alone = paired_difference(a, b), aggregate(a)
    assert difference.ci95[0] > 0
    assert difference.mean == pytest.approx(aggregate(a).mean - aggregate(b).mean)
    assert difference.ci95[1] - difference.ci95[0] < 0.2 * (alone.ci95[1] - alone.ci95[0])
