"""Incoherence by its definition, its bounds, and what a rotation does to it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditq.numerics import Rotation, channel_imbalance, incoherence, rotate


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 2**31))
def test_matches_definition_and_bounds(rows: int, columns: int, exponent: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    mu = incoherence(x)
    assert mu.shape == (rows,) and mu.dtype == torch.float32
    exact = x.double()
    expected = exact.abs().amax(-1) * columns**0.5 / exact.norm(dim=-1)
    torch.testing.assert_close(mu.double(), expected, rtol=1e-5, atol=0)
    assert ((mu >= 1 - 1e-5) & (mu <= columns**0.5 * (1 + 1e-5))).all()


def test_extremes() -> None:
    x = torch.zeros(3, 64)
    x[0, ::2], x[0, 1::2] = 0.3, -0.3
    x[1, 5] = -4
    assert incoherence(x).tolist() == pytest.approx([1, 8, 1])
    assert incoherence(torch.empty(0, 8)).shape == (0,)


def test_rotation_lowers_it() -> None:
    x = torch.randn(8, 1152)
    x[:, 100] = 60
    before, after = incoherence(x), incoherence(rotate(x, Rotation(1152, 1152, 0)))
    assert (before > 15).all() and (after < math.sqrt(2 * math.log(1152)) + 1).all()  # about the mu of Gaussian values


def test_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"must be a matrix \[R, K\], got shape \(8,\)"):
        incoherence(torch.ones(8))


def test_channel_imbalance() -> None:
    assert channel_imbalance(torch.tensor([1.0, 1.0, 1.0, 5.0])) == 2.5
    assert channel_imbalance(torch.full((9,), 3.0)) == 1
    assert channel_imbalance(torch.zeros(4)) == 1
    with pytest.raises(ValueError, match=r"vector \[K\] with K >= 1, got shape \(0,\)"):
        channel_imbalance(torch.empty(0))
