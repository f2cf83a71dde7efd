"""Spearman's rho against scipy, and the weights of timesteps by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ditq.numerics import rank_correlation, salience_weights

# Few different values, so that most rows have ties.
TIED = st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e30])] * 4), min_size=3, max_size=40)


@settings(deadline=None, max_examples=60)
@given(TIED)
def test_rho_is_scipys_with_ties(columns: list[tuple[float, ...]]) -> None:
    *x, y = torch.tensor(columns).T
    rho = rank_correlation(torch.stack(x), y)
    assert rho.dtype == torch.float64
    for row, value in zip(x, rho.tolist(), strict=True):
        if row.min() == row.max() or y.min() == y.max():
            assert value == 0  # scipy: NaN, and a warning
        else:
            assert value == pytest.approx(stats.spearmanr(row.numpy(), y.numpy()).statistic, abs=1e-12)


def test_rho_sees_order_alone() -> None:
    y = torch.rand(200) + 0.1
    x = torch.stack([y, y**5, -y.log(), torch.rand(200)])
    rho = rank_correlation(x, y)
    assert rho[:3].tolist() == pytest.approx([1, 1, -1])
    assert rho[3].item() == pytest.approx(stats.spearmanr(x[3].numpy(), y.numpy()).statistic)


def test_rows_of_a_transposed_tensor() -> None:
    x, y = torch.rand(30, 3), torch.rand(30)
    torch.testing.assert_close(rank_correlation(x.T, y), rank_correlation(x.T.contiguous(), y))


def test_weights_by_hand() -> None:
    w = torch.tensor([1.0, 2.0, 3.0])
    x = torch.tensor([[10.0, 20.0, 30.0], [30.0, 20.0, 10.0], [20.0, 10.0, 30.0]])
    # rho = 1, -1, and 1 - 6 (1 + 1 + 0) / (3 (9 - 1)) = 0.5
    raw = [math.exp(-1), math.exp(1), math.exp(-0.5)]
    weights = salience_weights(x, w)
    assert weights.tolist() == pytest.approx([r / sum(raw) for r in raw])
    assert weights.argmax() == 1  # where large inputs meet small weights


@pytest.mark.parametrize(("x", "y", "message"), [
    (torch.ones(3), torch.ones(3), r"x must be \[T, K\] and y \[K\], got shapes \(3,\) and \(3,\)"),
    (torch.ones(2, 3), torch.ones(2), r"got shapes \(2, 3\) and \(2,\)"),
    (torch.tensor([[1.0, math.nan]]), torch.ones(2), "x contains NaN or Inf"),
    (torch.ones(1, 2), torch.tensor([1.0, math.inf]), "y contains NaN or Inf"),
])  # fmt: skip
def test_wrong_arguments_are_named(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_correlation(x, y)
