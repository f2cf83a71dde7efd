"""The clip search against an exhaustive loop, and against not clipping."""

import pytest
import torch
from helpers import grid
from hypothesis import given, settings
from hypothesis import strategies as st

from ditq.numerics import fake_quantize, group_view, search_clip_ratio

LAYOUTS = [("tensor", None), ("row", None), ("group", 32)]


def heavy_tails(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Student's t with 3 degrees of freedom: a Gaussian over the root of a chi-square."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) / torch.randn(3, rows, columns, generator=g).norm(dim=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from(LAYOUTS), st.sampled_from([2.0, 2.4]))
def test_never_worse_than_minmax(
    seed: int, bits: int, symmetric: bool, layout: tuple[str, int | None], norm: float
) -> None:
    x = heavy_tails(3, 64, seed)
    kwargs = {"symmetric": symmetric, "granularity": layout[0], "group_size": layout[1]}
    ratio = search_clip_ratio(x, grid(bits, **kwargs), norm=norm)

    def error(clip_ratio: float | torch.Tensor) -> torch.Tensor:
        difference = fake_quantize(x, grid(bits, **kwargs), clip_ratio=clip_ratio).double() - x.double()
        return group_view(difference.abs() ** norm, grid(bits, **kwargs)).sum(-1)

    assert ratio.dtype == torch.float32 and ratio.shape == error(1.0).shape
    assert (error(ratio) <= error(1.0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tails_gain(bits: int) -> None:
    x = heavy_tails(16, 1024, 0)
    clipped = fake_quantize(x, grid(bits), clip_ratio=search_clip_ratio(x, grid(bits)))
    assert (clipped - x).square().sum() < 0.9 * (fake_quantize(x, grid(bits)) - x).square().sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_exhaustive_loop(symmetric: bool) -> None:
    x = heavy_tails(4, 96, 1)
    importance = torch.rand(96) + 0.1
    ratios = (1.0, 0.8, 0.65, 0.4)
    groups = grid(3, symmetric=symmetric, granularity="group", group_size=32)
    found = search_clip_ratio(x, groups, ratios=ratios, norm=2.4, importance=importance)
    for row in range(4):
        for group in range(3):
            columns = slice(32 * group, 32 * group + 32)
            part = x[row : row + 1, columns]
            errors = []
            for ratio in ratios:
                difference = (
                    (fake_quantize(part, grid(3, symmetric=symmetric), clip_ratio=ratio) - part).double().abs()
                )
                errors.append(float((importance[columns].double() * difference**2.4).sum()))
            assert found[row, group].item() == pytest.approx(ratios[errors.index(min(errors))])


def test_importance_protects_the_outlier() -> None:
    x = torch.randn(1, 256)
    x[0, 0] = 8.0
    importance = torch.ones(256)
    assert search_clip_ratio(x, grid(3), importance=importance).item() < 1
    importance[0] = 1e4
    assert search_clip_ratio(x, grid(3), importance=importance).item() == 1


@pytest.mark.parametrize("exponent", [-30, 30])
def test_magnitude_does_not_matter(exponent: int) -> None:
    x = heavy_tails(4, 128, 2)
    assert torch.equal(search_clip_ratio(x * 2.0**exponent, grid(4)), search_clip_ratio(x, grid(4)))


def test_ties_keep_the_full_range() -> None:
    x = torch.zeros(2, 16)
    x[1, :2] = torch.tensor([1.0, -1.0])
    assert search_clip_ratio(x, grid(4)).tolist() == [[1.0], [1.0]]
    assert search_clip_ratio(torch.empty(0, 16), grid(4)).shape == (0, 1)


def test_one_is_tried_even_when_not_listed() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert search_clip_ratio(x, grid(8), ratios=[0.5]).item() == 1


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"ratios": [0.9, 1.1]}, r"ratios must be in \(0, 1\], got 1.1"),
    ({"norm": 0.0}, "norm must be positive, got 0.0"),
    ({"importance": torch.ones(7)}, r"importance must have shape \(8,\), got \(7,\)"),
])  # fmt: skip
def test_wrong_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_clip_ratio(torch.ones(2, 8), grid(4), **kwargs)
