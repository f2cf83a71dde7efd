"""GPTQ against a float64 reference written column by column, and what must hold for any weight and any inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditq.numerics import (
    Grid,
    Quantized,
    add_inputs,
    code_range,
    dequantize,
    gptq,
    inverse_factor,
    normal_levels,
    output_errors,
    quantize,
    search_clip_ratio,
)
from ditq.numerics.grid import Granularity
from ditq.numerics.uniform import scale_and_zero_point

FORMATS = {
    "channel": {"granularity": "row", "group_size": None},
    "groups of 8": {"granularity": "group", "group_size": 8},
    "groups of 16": {"granularity": "group", "group_size": 16},
    "tensor": {"granularity": "tensor", "group_size": None},
}


def inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows with correlated channels of very different size, as behind a modulated norm."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(rows, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    return x * torch.rand(columns, generator=generator).mul(4).exp2()


def hessian_of(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    hessian = torch.zeros(x.shape[1], x.shape[1], dtype=dtype)
    add_inputs(hessian, x)
    return hessian


def squared_errors(x: Tensor, weight: Tensor, q: Quantized, granularity: Any, group_size: int | None) -> Tensor:
    """||X (w - q)||^2 of each row by its definition, float64 [N]."""
    difference = weight.double() - dequantize(q).double()
    return (x.double() @ difference.T).square().sum(0)


def reference(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    symmetric: bool,
    granularity: Any,
    group_size: int | None,
    damping: float,
    order: str,
) -> Tensor:
    """The dequantized weight, by the equations of optimal brain quantization in float64 (GPTQ paper, eq. 2 and 3).

    One column at a time, every following column updated at once, and the inverse Hessian of those left by
    eliminating the column that was rounded.
    """
    w, h = weight.double().clone(), hessian.double()
    columns = w.shape[1]
    inverse = torch.linalg.inv(h + damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    left = list(range(columns))
    if order == "activation":
        left = h.diagonal().argsort(descending=True).tolist()
        inverse = inverse[left][:, left]
    bottom, top = code_range(bits, symmetric)
    static = scale_and_zero_point(
        weight, grid(bits, symmetric=symmetric, granularity=granularity, group_size=group_size)
    )
    scale = static[0].double().expand(len(w), -1).clone()
    zero = torch.zeros_like(scale) if static[1] is None else static[1].double().expand(len(w), -1).clone()
    size = group_size or columns
    out = torch.empty_like(w)
    while left:
        column, group = left[0], left[0] // size
        if granularity == "group" and order == "natural" and column % size == 0:
            found = scale_and_zero_point(w[:, column : column + size].float(), grid(bits, symmetric=symmetric))
            scale[:, group] = found[0][:, 0]
            zero[:, group] = 0 if found[1] is None else found[1][:, 0]
        code = torch.clamp((w[:, column] / scale[:, group]).round() + zero[:, group], bottom, top)
        out[:, column] = (code - zero[:, group]) * scale[:, group]
        error = (w[:, column] - out[:, column]) / inverse[0, 0]
        w[:, left[1:]] -= error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
        left = left[1:]
    return out


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("kind", FORMATS)
def test_gptq_is_the_reference_but_for_rows_it_did_not_improve(kind: str, symmetric: bool, order: Any) -> None:
    x, weight = inputs(400, 48), torch.randn(40, 48)
    hessian, fmt = hessian_of(x), FORMATS[kind]
    expected = reference(weight, hessian, 3, symmetric, **fmt, damping=0.01, order=order)
    q = gptq(weight, hessian, grid(3, symmetric=symmetric, **fmt), order=order, block=16).quantized
    simple = dequantize(quantize(weight, grid(3, symmetric=symmetric, **fmt)))
    better = (x.double() @ (weight - expected).T).square().sum(0) < (x @ (weight - simple).T).square().sum(0)
    assert better.float().mean() > 0.8  # otherwise this compares little
    torch.testing.assert_close(
        dequantize(q).double()[better], expected[better], rtol=1e-4, atol=1e-4, msg="not the reference"
    )
    torch.testing.assert_close(dequantize(q)[~better], simple[~better])


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    kind=st.sampled_from(list(FORMATS)),
    clip=st.booleans(),
    order=st.sampled_from(["natural", "activation"]),
    damping=st.sampled_from([1e-6, 0.01, 0.3]),
    rows=st.integers(0, 64),
)
def test_output_error_is_never_above_that_of_rounding_to_nearest(
    seed: int, bits: int, symmetric: bool, kind: str, clip: bool, order: Any, damping: float, rows: int
) -> None:
    """Whatever the weight and the inputs, and however few of them; in every row, by the definition in float64."""
    fmt = FORMATS[kind]
    x = inputs(rows, 32, seed)
    weight = torch.randn(12, 32, generator=torch.Generator().manual_seed(seed)) ** 3
    ratio = search_clip_ratio(weight, grid(bits, symmetric=symmetric, **fmt)) if clip else 1.0
    simple = quantize(weight, grid(bits, symmetric=symmetric, **fmt), clip_ratio=ratio)
    hessian = hessian_of(x, torch.float32)
    found = gptq(
        weight, hessian, grid(bits, symmetric=symmetric, **fmt), clip=clip, order=order, damping=damping, block=16
    )
    q = found.quantized
    bottom, top = code_range(bits, symmetric)
    assert q.codes.dtype == torch.int8
    assert bottom <= int(q.codes.min()) <= int(q.codes.max()) <= top
    assert (q.scale.shape, q.scale.dtype) == (simple.scale.shape, torch.float32)
    assert (q.zero_point is None) == symmetric
    error, of_nearest = (squared_errors(x, weight, z, **fmt) for z in (q, simple))
    assert bool((error <= of_nearest).all())
    scale = hessian.diagonal().max().clamp_min(1) * weight.square().sum()
    torch.testing.assert_close(found.error, error, rtol=1e-3, atol=1e-6 * float(scale))
    torch.testing.assert_close(found.nearest, of_nearest, rtol=1e-3, atol=1e-6 * float(scale))


@pytest.mark.parametrize("kind", FORMATS)
def test_error_falls_far_where_channels_are_correlated(kind: str) -> None:
    x, weight, fmt = inputs(2000, 64), torch.randn(32, 64), FORMATS[kind]
    q, simple = gptq(weight, hessian_of(x), grid(4, **fmt)).quantized, quantize(weight, grid(4, **fmt))
    assert squared_errors(x, weight, q, **fmt).sum() < 0.6 * squared_errors(x, weight, simple, **fmt).sum()


@pytest.mark.parametrize("kind", FORMATS)
def test_block_size_is_a_matter_of_speed(kind: str) -> None:
    x, weight, fmt = inputs(500, 48), torch.randn(24, 48), FORMATS[kind]
    results = [gptq(weight, hessian_of(x), grid(4, **fmt), block=block).quantized for block in (1, 5, 20, 1000)]
    for q in results[1:]:
        torch.testing.assert_close(dequantize(q), dequantize(results[0]), rtol=1e-4, atol=1e-4)


def test_uncorrelated_inputs_of_one_size_leave_nothing_to_make_up_for() -> None:
    weight = torch.randn(16, 24)
    q, simple = gptq(weight, torch.eye(24), grid(4)).quantized, quantize(weight, grid(4))
    assert torch.equal(q.codes, simple.codes)
    assert torch.equal(q.scale, simple.scale)


def test_channels_never_seen_are_rounded_to_nearest() -> None:
    x, weight = inputs(300, 32), torch.randn(16, 32)
    x[:, ::4] = 0
    q, simple = gptq(weight, hessian_of(x), grid(4)).quantized, quantize(weight, grid(4))
    assert torch.equal(q.codes[:, ::4], simple.codes[:, ::4])
    assert not torch.equal(q.codes, simple.codes)
    unseen = gptq(weight, torch.zeros(32, 32), grid(4)).quantized
    assert torch.equal(unseen.codes, simple.codes)


def test_less_than_rank_needs_more_damping_but_works() -> None:
    x, weight = inputs(3, 64), torch.randn(8, 64)
    q, simple = gptq(weight, hessian_of(x), grid(4), damping=1e-30).quantized, quantize(weight, grid(4))
    assert squared_errors(x, weight, q, "row", None).sum() < squared_errors(x, weight, simple, "row", None).sum()


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("columns", [1, 48, 257, 700])
def test_factor_is_that_of_the_inverse(columns: int, order: Any) -> None:
    """U^T U (H + d) = 1, for odd sizes and those inverted by halves; and it may be given for later weights."""
    hessian = hessian_of(inputs(2 * columns, columns), torch.float32)
    upper = inverse_factor(hessian, 0.01, order).double()
    taken = hessian.diagonal().argsort(descending=True) if order == "activation" else torch.arange(columns)
    h = hessian.double()[taken][:, taken]
    h = h + 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ h @ upper.T, torch.eye(columns, dtype=torch.float64), rtol=0, atol=1e-4)
    weight = torch.randn(6, columns)
    a = gptq(weight, hessian, grid(3), order=order, factor=inverse_factor(hessian, 0.01, order))
    b = gptq(weight, hessian, grid(3), order=order)
    assert torch.equal(a.quantized.codes, b.quantized.codes)


def test_hessian_is_that_of_all_inputs_in_one_pass(device: torch.device) -> None:
    x = inputs(20_000, 16)
    hessian = torch.zeros(16, 16, device=device)
    for part in x.split(7000):
        add_inputs(hessian, part.to(device))
    torch.testing.assert_close(hessian.cpu(), 2 * x.T @ x, rtol=1e-4, atol=1e-2)
    difference = torch.randn(5, 16)
    expected = (x @ difference.T).square().sum(0).double()
    torch.testing.assert_close(output_errors(difference.to(device), hessian).cpu(), expected, rtol=1e-4, atol=1e-2)


def test_devices_agree(device: torch.device) -> None:
    x, weight = inputs(500, 48), torch.randn(24, 48)
    a = gptq(weight, hessian_of(x), grid(4, granularity="group", group_size=16)).quantized
    b = gptq(weight.to(device), hessian_of(x).to(device), grid(4, granularity="group", group_size=16)).quantized
    assert b.codes.device.type == device.type
    torch.testing.assert_close(b.scale.cpu(), a.scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hessian": torch.eye(8)}, r"hessian must be \[16, 16\], got \[8, 8\]"),
        ({"hessian": torch.full((16, 16), float("nan"))}, "hessian contains NaN"),
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"block": 0}, "block must be positive, got 0"),
        ({"grid": grid(4, granularity="group", group_size=5)}, "group_size must divide the 16 columns"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        gptq(**{"weight": torch.randn(4, 16), "hessian": torch.eye(16), "grid": grid(4), **changes})


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [2, 4])
def test_other_grids_are_better_than_with_rounding_to_nearest(
    bits: int, group: int | None, order: Any, clip: bool
) -> None:
    x, weight = inputs(400, 48), torch.randn(40, 48)
    hessian = hessian_of(x)
    kind: Granularity = "group" if group else "channel"
    full = gptq(
        weight, hessian, Grid(bits=bits, granularity=kind, group_size=group, full=True), clip=clip, order=order
    )
    assert float(full.error.sum()) < 0.9 * float(full.nearest.sum())
    assert int(full.quantized.codes.min()) == -(2 ** (bits - 1))
    fmt = Grid(bits=bits, granularity=kind, group_size=group, levels="normal")
    rounded = gptq(weight, hessian, fmt, clip=clip, order=order, block=16)
    assert set(rounded.quantized.codes.unique().tolist()) <= set(normal_levels(bits))
    error = squared_errors(x, weight, rounded.quantized, fmt.granularity, group)
    ratio = search_clip_ratio(weight, fmt) if clip else 1.0
    nearest = squared_errors(x, weight, quantize(weight, fmt, clip_ratio=ratio), fmt.granularity, group)
    torch.testing.assert_close(rounded.error, error, rtol=1e-4, atol=0)
    assert bool((error <= nearest * (1 + 1e-5)).all())
    assert float(error.sum()) < 0.9 * float(nearest.sum())
