"""Smoothing scales against SmoothQuant's equation in plain Python."""

import math

import pytest
import torch
from helpers import grid
from hypothesis import given, settings
from hypothesis import strategies as st

from ditq.numerics import fake_quantize, smoothing_scale, sqnr_db

MAXIMA = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=20)


@settings(deadline=None, max_examples=40)
@given(MAXIMA, st.floats(0, 1))
def test_equation_up_to_a_common_factor(maxima: list[tuple[float, float]], alpha: float) -> None:
    s = smoothing_scale(torch.tensor([x for x, _ in maxima]), torch.tensor([w for _, w in maxima]), alpha)
    raw = [x**alpha / w ** (1 - alpha) for x, w in maxima]
    mean = math.exp(sum(map(math.log, raw)) / len(raw))
    assert s.dtype == torch.float32
    if max(raw) < 1e4 * mean and min(raw) > 1e-4 * mean:
        assert s.tolist() == pytest.approx([r / mean for r in raw], rel=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 2.0**120, width=32), st.floats(0, 2.0**120, width=32)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_any_maxima_give_usable_scales(maxima: list[tuple[float, float]], alpha: float) -> None:
    s = smoothing_scale(torch.tensor([x for x, _ in maxima]), torch.tensor([w for _, w in maxima]), alpha)
    assert torch.isfinite(s).all() and (s > 0).all()
    assert s.double().log().mean().item() == pytest.approx(0, abs=1e-5)
    assert s.max() / s.min() <= 1e8 * 1.001
    for (x, w), value in zip(maxima, s.tolist(), strict=True):
        assert (x > 0 and w > 0) or value == 1


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_a_common_factor_changes_nothing(factor: float) -> None:
    x, w = torch.rand(64) + 0.01, torch.rand(64) + 0.01
    torch.testing.assert_close(smoothing_scale(x * factor, w, 0.7), smoothing_scale(x, w, 0.7))
    torch.testing.assert_close(smoothing_scale(x, w * factor, 0.7), smoothing_scale(x, w, 0.7))


def test_a_dead_channel_does_not_move_the_others() -> None:
    x, w = torch.rand(8) + 0.1, torch.rand(8) + 0.1
    alive = smoothing_scale(x, w, 0.5)
    dead = smoothing_scale(torch.cat((x, torch.zeros(1))), torch.cat((w, torch.ones(1))), 0.5)
    torch.testing.assert_close(dead, torch.cat((alive, torch.ones(1))))


def test_extreme_alphas() -> None:
    x, w = torch.tensor([1.0, 4.0]), torch.tensor([9.0, 1.0])
    torch.testing.assert_close(smoothing_scale(x, w, 1.0), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(smoothing_scale(x, w, 0.0), torch.tensor([1 / 3, 3.0]))
    assert smoothing_scale(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1, 1, 1]


def test_power_of_two_is_exact_in_half_precision() -> None:
    x, w = torch.rand(200) * 10 + 0.01, torch.rand(200) + 0.01
    s = smoothing_scale(x, w, 0.5)
    rounded = smoothing_scale(x, w, 0.5, power_of_two=True)
    assert (torch.frexp(rounded).mantissa == 0.5).all()
    assert ((rounded / s).log2().abs() <= 0.5 + 1e-5).all()
    values = torch.randn(200).to(torch.bfloat16)
    assert torch.equal((values / rounded.to(torch.bfloat16)) * rounded.to(torch.bfloat16), values)


def test_it_helps_where_channels_differ() -> None:
    x, w = torch.randn(128, 64), torch.randn(32, 64)
    x[:, 3] *= 80
    s = smoothing_scale(x.abs().amax(0), w.abs().amax(0), 0.5)
    torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=0, atol=1e-2)
    plain = fake_quantize(x, grid(8)) @ fake_quantize(w, grid(8)).T
    smoothed = fake_quantize(x / s, grid(8)) @ fake_quantize(w * s, grid(8)).T
    assert sqnr_db(x @ w.T, smoothed) > sqnr_db(x @ w.T, plain) + 6


@pytest.mark.parametrize(("x", "w", "alpha", "message"), [
    (torch.ones(3), torch.ones(3), 1.5, r"alpha must be in \[0, 1\], got 1.5"),
    (torch.ones(3), torch.ones(4), 0.5, r"one length, got shapes \(3,\) and \(4,\)"),
    (torch.tensor([1.0, math.nan]), torch.ones(2), 0.5, "x_absmax contains NaN or Inf"),
    (torch.ones(2), torch.tensor([1.0, math.inf]), 0.5, "w_absmax contains NaN or Inf"),
    (torch.ones(2), torch.tensor([1.0, -2.0]), 0.5, "w_absmax must not be negative, got -2.0"),
])  # fmt: skip
def test_wrong_arguments_are_named(x: torch.Tensor, w: torch.Tensor, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smoothing_scale(x, w, alpha)
