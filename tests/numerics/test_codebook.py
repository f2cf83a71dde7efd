"""Normal levels against Lloyd's and Max's conditions, a search over all levels, and the errors of uniform levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor

from ditq.numerics import (
    Grid,
    Quantized,
    dequantize,
    fake_quantize,
    nearest_level,
    normal_levels,
    pack,
    quantize,
    scale_and_zero_point,
    search_clip_ratio,
    sqnr_db,
    unpack,
)
from ditq.numerics.codebook import CREST, UNIT_SCALE, WIDTHS

Array = NDArray[np.float64]


def normal(bits: int, granularity: Any = "channel", group_size: int | None = None) -> Grid:
    return Grid(bits=bits, granularity=granularity, group_size=group_size, levels="normal")


def cells(levels: Array) -> tuple[Array, Array]:
    """The probability of each level's cell, and the integral of x over it, for a normal distribution."""
    ends = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    return np.diff(norm.cdf(ends)), -np.diff(norm.pdf(ends))


def squared_error(levels: Array) -> float:
    probability, first = cells(levels)
    return float(1 - 2 * (levels * first).sum() + (levels**2 * probability).sum())


def lloyd_max(bits: int) -> Array:
    """Each level is the mean of its cell: Lloyd's iteration until nothing moves."""
    levels: Array = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    while True:
        probability, first = cells(levels)
        if np.abs(first / probability - levels).max() < 1e-10:
            return levels
        levels = first / probability


def best_scale(codes: Array) -> tuple[float, float]:
    """The scale with the smallest squared error for variance 1, and this error."""
    found = minimize_scalar(
        lambda scale: squared_error(codes * scale), bounds=(1 / codes[-1], 6 / codes[-1]), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    return float(found.x), float(found.fun)


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_those_of_lloyd_and_max_as_integers(bits: int) -> None:
    exact, levels = lloyd_max(bits), np.array(normal_levels(bits), float)
    assert levels.tolist() == np.rint(exact / exact[-1] * levels[-1]).tolist()
    assert levels.tolist() == (-levels[::-1]).tolist() and len(set(levels.tolist())) == 2**bits
    assert levels[-1] <= 127
    scale, error = best_scale(levels)
    assert UNIT_SCALE[bits] == pytest.approx(scale, abs=6e-8)
    # No other outermost integer is better, by more than what does not count.
    for outermost in range(2 ** (bits - 1), 128):
        others = np.rint(exact / exact[-1] * outermost)
        if len(set(others.tolist())) == 2**bits:
            assert best_scale(others)[1] > error * (1 - 2e-5)
    assert error < 1.04 * squared_error(exact)


@pytest.mark.parametrize(
    ("bits", "published"), [(2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)]
)  # Max 1960, table I: 0.1175, 0.03454, 0.009497, 0.002499
def test_sqnr_of_normal_numbers(bits: int, published: float) -> None:
    x = torch.randn(256, 2048)
    found = sqnr_db(x, fake_quantize(x, normal(bits)))
    assert found == pytest.approx(published, abs=0.06)
    uniform = []
    for symmetric in (True, False):
        grid = Grid(bits=bits, symmetric=symmetric, granularity="channel")
        ratio = search_clip_ratio(x, grid, ratios=[0.01 * step for step in range(20, 101)])
        uniform.append(sqnr_db(x, fake_quantize(x, grid, clip_ratio=ratio)))
    assert found > max(uniform) + {2: 0.9, 3: 0.5, 4: 0.8, 5: 1.2}[bits]


def test_normal_levels_refuse_other_widths() -> None:
    with pytest.raises(ValueError, match="normal levels have 2 to 6 bits, got 7"):
        normal_levels(7)


# --------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", WIDTHS)
def test_nearest_level_is_that_of_a_search(bits: int) -> None:
    levels = torch.tensor(normal_levels(bits), dtype=torch.float64)
    halves = torch.arange(-300, 301) / 2  # all ties among them
    around = torch.stack([torch.nextafter(halves, torch.tensor(end)) for end in (-1e9, 1e9)])[:, halves != 0]
    values = torch.cat([halves, around.flatten(), torch.randn(5000) * 60, torch.tensor([1e9, -1e9, 1e-9, -1e-9])])
    distances = (values.double()[:, None] - levels).abs()
    expected = levels[distances.argmin(1)]  # the first, so the lower, of two equally near ones
    found = nearest_level(values, bits)
    assert found.dtype == torch.int8
    assert torch.equal(found.double(), expected)
    assert torch.equal(nearest_level(torch.empty(2, 0), bits), torch.empty(2, 0, dtype=torch.int8))
    infinite = nearest_level(torch.tensor([torch.inf, -torch.inf]), bits)
    assert infinite.tolist() == [normal_levels(bits)[-1], normal_levels(bits)[0]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_takes_the_nearest_values(bits: int, granularity: str) -> None:
    grid = normal(bits, granularity, 32 if granularity == "group" else None)
    x = torch.randn(6, 96) * torch.logspace(-3, 3, 6)[:, None]
    q = quantize(x, grid)
    assert q.codes.dtype == torch.int8 and q.zero_point is None and tuple(q.scale.shape) == grid.scales(6, 96)
    values = dequantize(q)
    scale = (values / q.codes).double()
    every = scale[..., None] * torch.tensor(normal_levels(bits), dtype=torch.float64)
    nearest = (every - x[..., None].double()).abs().amin(-1)
    torch.testing.assert_close((values - x).abs().double(), nearest, rtol=1e-5, atol=1e-6 * float(x.abs().max()))


# ----------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("bits", WIDTHS)
def test_scale_follows_the_root_mean_square_until_an_outlier_counts(bits: int) -> None:
    x = torch.randn(3, 512)
    x[1] *= 1e-18  # whose squares are no normal float32
    x[2, 7] = 100.0
    scale, zero = scale_and_zero_point(x, normal(bits))
    rms, largest = x.double().square().mean(1).sqrt(), x.double().abs().amax(1)
    expected = UNIT_SCALE[bits] * torch.maximum(rms, largest / CREST)
    assert zero is None
    torch.testing.assert_close(scale[:, 0].double(), expected, rtol=1e-6, atol=0)
    assert float(expected[2]) == pytest.approx(UNIT_SCALE[bits] * 100 / CREST)
    doubled, _ = scale_and_zero_point(x, normal(bits), clip_ratio=2.0)
    torch.testing.assert_close(doubled, 2 * scale)


def test_zeros_stay_tiny_and_numbers_that_are_not_finite_are_passed_on() -> None:
    """No level is 0, so the scale of zeros must be small."""
    x = torch.zeros(4, 32)
    x[1, 3], x[2, 3], x[3] = torch.nan, torch.inf, 1.0
    values = fake_quantize(x, normal(4))
    assert float(values[0].abs().max()) < 1e-35
    assert not bool(torch.isfinite(values[1:3]).any())
    assert bool(torch.isfinite(values[3]).all())
    assert scale_and_zero_point(torch.empty(2, 0), normal(4))[0].shape == (2, 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tails", [False, True])
def test_searched_scales_are_never_worse_and_gain_where_numbers_are_not_normal(bits: int, tails: bool) -> None:
    x = torch.randn(64, 256)
    if tails:  # Student's t with 3 degrees of freedom
        x = x / torch.randn(3, 64, 256).norm(dim=0)
    grid = normal(bits)
    ratio = search_clip_ratio(x, grid)

    def errors(values: Tensor) -> Tensor:
        return (values - x).double().square().sum(1)

    plain, searched = errors(fake_quantize(x, grid)), errors(fake_quantize(x, grid, clip_ratio=ratio))
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert float(searched.sum()) < float(plain.sum()) * (0.97 if tails and bits > 2 else 1.0)
    assert bool((ratio > 1).any())
    assert tails or bool((ratio < 1).any())


def test_ratios_must_be_positive() -> None:
    with pytest.raises(ValueError, match="ratios must be positive, got 0"):
        search_clip_ratio(torch.randn(2, 8), normal(4), ratios=[2.0, 0.0])


# ---------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 31, 64, 1155])
@pytest.mark.parametrize("bits", WIDTHS)
def test_round_trip_of_every_level(bits: int, columns: int) -> None:
    levels = torch.tensor(normal_levels(bits), dtype=torch.int8)
    position = torch.arange(6 * columns).reshape(6, columns) % 2**bits
    packed = pack(levels[position], normal(bits))
    # What is packed is the position, like uniform codes minus their smallest.
    assert torch.equal(packed, pack((position - 2 ** (bits - 1)).to(torch.int8), bits))
    back = unpack(packed, normal(bits), columns)
    assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, levels[position])
    assert torch.equal(unpack(packed[::2], normal(bits), columns), back[::2])
    assert unpack(packed[:0], normal(bits), columns).shape == (0, columns)


@pytest.mark.parametrize("bits", WIDTHS)
def test_numbers_between_levels_are_not_packed(bits: int) -> None:
    for wrong in (0, -128):
        with pytest.raises(ValueError, match=f"among the {2**bits} normal levels of {bits} bits, got {wrong}"):
            pack(torch.tensor([[normal_levels(bits)[0], wrong]], dtype=torch.int8), normal(bits))


def test_uniform_codes_are_packed_as_before() -> None:
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    grid = Grid(bits=4, symmetric=False, granularity="channel")
    assert torch.equal(pack(codes, grid), pack(codes, 4))
    assert torch.equal(unpack(pack(codes, 4), grid, 12), codes)


def test_dequantized_codes_do_not_depend_on_the_levels() -> None:
    codes = torch.tensor([[5, -104, 15]], dtype=torch.int8)
    scale = torch.tensor([[0.5]])
    assert dequantize(Quantized(codes, scale, None, normal(4))).tolist() == [[2.5, -52.0, 7.5]]
