"""Error measures by hand and by what a uniform grid must reach."""

import math

import pytest
import torch
from helpers import grid

from ditq.numerics import fake_quantize, relative_error, sqnr_db


@pytest.mark.parametrize(("factor", "decibels"), [(0.9, 20.0), (1.1, 20.0), (0.99, 40.0), (0.0, 0.0), (2.0, 0.0)])
def test_a_scaled_copy(factor: float, decibels: float) -> None:
    x = torch.randn(40, 50, dtype=torch.float64)
    assert sqnr_db(x, x * factor) == pytest.approx(decibels, abs=1e-9)
    assert relative_error(x, x * factor) == pytest.approx(10 ** (-decibels / 20))


def test_extremes() -> None:
    x, zero = torch.randn(3, 4), torch.zeros(3, 4)
    assert (sqnr_db(x, x), relative_error(x, x)) == (math.inf, 0.0)
    assert (sqnr_db(zero, zero), relative_error(zero, zero)) == (math.inf, 0.0)
    assert (sqnr_db(zero, x), relative_error(zero, x)) == (-math.inf, math.inf)
    assert math.isnan(sqnr_db(x, x * math.nan))


def test_small_errors_survive_large_sums() -> None:
    x = torch.full((1, 2_000_000), 3.0)
    assert sqnr_db(x, x * (1 + 2.0**-20)) == pytest.approx(20 * math.log10(2.0**20), rel=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_values_reach_six_decibels_per_bit(bits: int) -> None:
    x = torch.rand(8, 4096) * 2 - 1
    # Signal 1/3, noise scale^2 / 12 with scale = 1 / (2^(b-1) - 1).
    expected = 10 * math.log10(4) + 20 * math.log10(2 ** (bits - 1) - 1)
    assert sqnr_db(x, fake_quantize(x, grid(bits))) == pytest.approx(expected, abs=0.2)


def test_mixed_dtypes_are_compared_in_float64() -> None:
    x = torch.randn(64, 64)
    assert 45 < sqnr_db(x, x.to(torch.bfloat16)) < 60
    assert sqnr_db(x.to(torch.bfloat16), x.to(torch.bfloat16).float()) == math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3,\)"):
        sqnr_db(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.ones(2, 3), torch.ones(3))
