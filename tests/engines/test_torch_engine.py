"""The torch engine against a float64 reference of the dequantized operands, format by format."""

from __future__ import annotations

import pytest
import torch
from helpers import full_weights, normal_weights, token_format, weight_format
from torch import Tensor

from ditq.engines import QuantizedWeight
from ditq.engines.torch import engine
from ditq.engines.torch.engine import MAX_COLUMNS, TorchEngine, exact_float_product, integer_product
from ditq.numerics import Grid, Quantized, pack, quantize

ENGINE = TorchEngine()
STATIC = Grid(bits=8, granularity="tensor")


def packed(weight: Tensor, fmt: Grid) -> tuple[QuantizedWeight, Quantized]:
    q = quantize(weight, fmt)
    zero_point = None if q.zero_point is None else q.zero_point.to(torch.int8)
    return QuantizedWeight(pack(q.codes, fmt), q.scale, zero_point, weight.shape[1], fmt), q


def values(q: Quantized) -> Tensor:
    """What the codes stand for, scale * (codes - zero_point), in float64; scales are [R, G] or [1, 1]."""
    rows, columns = q.codes.shape
    groups = q.scale.shape[1]
    zero = torch.zeros_like(q.scale) if q.zero_point is None else q.zero_point
    grid = q.codes.double().reshape(rows, groups, columns // groups)
    return (q.scale.double()[..., None] * (grid - zero.double()[..., None])).reshape(rows, columns)


def check(x: Tensor, weight: Tensor, w_fmt: Grid, x_fmt: Grid, bias: Tensor | None = None) -> Tensor:
    scale = None if x_fmt.dynamic else x.abs().max().reshape(1, 1) / 100 if x.numel() else torch.ones(1, 1)
    engine_weight, w = packed(weight, w_fmt)
    codes = ENGINE.quantize_activations(x, x_fmt, scale)
    y = ENGINE.linear(codes, engine_weight, bias, torch.float32)
    expected = values(codes) @ values(w).T + (0 if bias is None else bias.double())
    assert y.dtype == torch.float32
    assert y.shape == expected.shape
    # Float32 rounding of the sums of rescaled groups, and nothing else.
    size = (values(codes).abs() @ values(w).abs().T).clamp_min(1e-20) + (0 if bias is None else bias.abs().double())
    assert bool(((y.double() - expected).abs() <= 2e-6 * size).all())
    return y


X_FORMATS = {
    "token-sym": token_format(),
    "token-asym": token_format(symmetric=False),
    "tensor-static": STATIC,
    "tensor-sym": token_format(granularity="tensor"),
    "tensor-asym": token_format(granularity="tensor", symmetric=False),
    "group16-sym": token_format(granularity="group", group=16),
    "group48-asym": token_format(granularity="group", symmetric=False, group=48),
    "token-normal": token_format(4, levels="normal"),
    "tensor-normal": token_format(6, granularity="tensor", levels="normal"),
    "group16-normal": token_format(3, granularity="group", group=16, levels="normal"),
}
W_FORMATS = {
    "channel-sym": weight_format(symmetric=True),
    "channel-asym": weight_format(),
    "tensor-sym": weight_format(granularity="tensor", symmetric=True),
    "tensor-asym": weight_format(granularity="tensor"),
    "group16-sym": weight_format(granularity="group", symmetric=True, group=16),
    "group32-asym": weight_format(granularity="group", group=32),
    "channel-full": full_weights(),
    "group16-full": full_weights(3, granularity="group", group=16),
    "channel-normal": normal_weights(),
    "tensor-normal": normal_weights(5, granularity="tensor"),
    "group32-normal": normal_weights(3, granularity="group", group=32),
}


@pytest.mark.parametrize("x_format", X_FORMATS)
@pytest.mark.parametrize("w_format", W_FORMATS)
def test_formats(w_format: str, x_format: str) -> None:
    x, w = torch.randn(9, 96) + 0.3, torch.randn(11, 96) - 0.2
    check(x, w, W_FORMATS[w_format], X_FORMATS[x_format], bias=torch.randn(11))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("a", [4, 6, 8])
@pytest.mark.parametrize("w", range(2, 9))
def test_bits(w: int, a: int, symmetric: bool) -> None:
    x, weight = torch.randn(7, 40), torch.randn(5, 40)
    check(x, weight, weight_format(w, symmetric=symmetric), token_format(a, symmetric=not symmetric))
    check(x, weight, weight_format(w, symmetric=symmetric), token_format(a, symmetric=symmetric))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 16, 8), (1, 16, 8), (1, 1, 1), (3, 7, 5), (17, 33, 65), (16, 129, 1), (2, 1153, 31)]
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_shapes(m: int, k: int, n: int, bias: bool, symmetric: bool) -> None:
    y = check(
        torch.randn(m, k),
        torch.randn(n, k),
        weight_format(4, symmetric=symmetric),
        token_format(8, symmetric=symmetric),
        torch.randn(n) if bias else None,
    )
    assert y.shape == (m, n)


@pytest.mark.parametrize("x_format", X_FORMATS)
def test_no_rows(x_format: str) -> None:
    y = check(torch.empty(0, 96), torch.randn(4, 96), W_FORMATS["group32-asym"], X_FORMATS[x_format])
    assert y.shape == (0, 4)


@pytest.mark.parametrize("x_format", X_FORMATS)
@pytest.mark.parametrize("w_format", ["channel-asym", "group32-asym", "channel-sym"])
def test_constant_and_zero_rows(w_format: str, x_format: str) -> None:
    x, w = torch.randn(6, 96), torch.randn(6, 96)
    x[0], x[1], x[2] = 0.0, 3.5, -3.5
    w[0], w[1], w[2] = 0.0, -0.25, 0.25
    y = check(x, w, W_FORMATS[w_format], X_FORMATS[x_format])
    fmt = X_FORMATS[x_format]
    if fmt.levels == "uniform":
        assert torch.equal(y[0], torch.zeros(6))
    elif fmt.granularity != "tensor":  # no normal level is 0, but the scale of zeros is tiny
        assert float(y[0].abs().max()) < 1e-30
    assert torch.equal(y[:, 0], torch.zeros(6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("x_format", X_FORMATS)
@pytest.mark.parametrize("w_format", ["channel-asym", "group32-asym", "channel-sym"])
def test_output_of_a_token_that_is_not_finite_is_not_and_leaves_the_others_alone(
    w_format: str, x_format: str, bad: float
) -> None:
    x, (weight, _) = torch.randn(6, 96), packed(torch.randn(11, 96), W_FORMATS[w_format])
    fmt, scale = X_FORMATS[x_format], None if X_FORMATS[x_format].dynamic else torch.tensor([[0.02]])

    def output(x: Tensor) -> Tensor:
        return ENGINE.linear(ENGINE.quantize_activations(x, fmt, scale), weight, torch.randn(11), torch.float32)

    torch.manual_seed(1)
    clean = output(x)
    x[2, 70] = bad
    torch.manual_seed(1)
    y = output(x)
    assert not y[2].isfinite().any()
    others = torch.arange(6) != 2
    if fmt.dynamic and fmt.granularity == "tensor":  # one scale for all of them
        assert not y.isfinite().any()
    else:
        assert torch.equal(y[others], clean[others])


def test_non_contiguous_inputs() -> None:
    wide = torch.randn(10, 64)
    x, w = wide[:, ::2], torch.randn(32, 12).t()
    assert not x.is_contiguous()
    assert not w.is_contiguous()
    for x_fmt in (token_format(), token_format(symmetric=False)):
        y = check(x, w, weight_format(), x_fmt)
        assert torch.equal(y, check(x.contiguous(), w.contiguous(), weight_format(), x_fmt))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_dtype_is_the_one_asked_for(dtype: torch.dtype) -> None:
    weight, _ = packed(torch.randn(4, 32), weight_format())
    codes = ENGINE.quantize_activations(torch.randn(3, 32).to(dtype), token_format(), None)
    assert ENGINE.linear(codes, weight, torch.zeros(4, dtype=dtype), dtype).dtype == dtype


def test_static_scale_is_used() -> None:
    codes = ENGINE.quantize_activations(torch.tensor([[1.0, -2.0, 100.0]]), STATIC, torch.tensor([[0.5]]))
    assert codes.codes.tolist() == [[2, -4, 127]]
    assert codes.scale.item() == 0.5


@pytest.mark.parametrize("w_format", W_FORMATS)
def test_dequantized_weight_is_that_of_numerics(w_format: str) -> None:
    weight, q = packed(torch.randn(11, 96), W_FORMATS[w_format])
    assert torch.allclose(ENGINE.dequantize_weight(weight).double(), values(q), rtol=1e-6, atol=0)


# -------------------------------------------------------------------------------- integer products


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 8, 8), (5, 31, 9), (33, 257, 65), (16, 1152, 24)])
def test_integer_product_equals_int64(m: int, k: int, n: int) -> None:
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    y = integer_product(x, w)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), x.long() @ w.long().T)


def test_integer_product_of_extreme_codes_does_not_saturate() -> None:
    k = 4096
    x, w = torch.full((3, k), -128, dtype=torch.int8), torch.full((8, k), -128, dtype=torch.int8)
    assert bool((integer_product(x, w) == k * 128 * 128).all())
    assert bool((integer_product(x, (-w - 1).to(torch.int8)) == -k * 128 * 127).all())


@pytest.mark.parametrize("k", [0, 1, 31, 1023, 1024, 1025, 3000, 33_000])
def test_exact_float_product_equals_int64(k: int) -> None:
    x, w = torch.randint(-128, 128, (9, k), dtype=torch.int8), torch.randint(-128, 128, (65, k), dtype=torch.int8)
    x[:2], w[:2] = -128, -128  # the largest sum
    x[2], w[2] = 127, 127
    y = exact_float_product(x, w)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), x.long() @ w.long().T)


@pytest.mark.parametrize("how", ["autocast", "medium precision", "VNNI"])
def test_floats_are_used_only_where_they_are_exact(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_lacks_vnni", lambda: how != "VNNI")
    monkeypatch.setattr(engine, "exact_float_product", lambda x, w: calls.append(1))
    calls: list[int] = []
    x = torch.randint(-128, 128, (4, 1024), dtype=torch.int8)
    if how != "VNNI":
        assert integer_product(x, x) is None
        assert calls == [1]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium" if "medium" in how else "highest")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert torch.equal(integer_product(x, x).long(), x.long() @ x.long().T)


def test_integer_product_refuses_what_could_overflow() -> None:
    x = torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"at most {MAX_COLUMNS}.*got {MAX_COLUMNS + 1}"):
        integer_product(x, x)


def test_asymmetric_sums_at_the_widest_layer_stay_exact() -> None:
    k = MAX_COLUMNS
    fmt = weight_format(8)
    codes = torch.full((1, k), 127, dtype=torch.int8)
    x = Quantized(codes, torch.ones(1, 1), torch.full((1, 1), -128).short(), token_format(symmetric=False))
    weight = QuantizedWeight(pack(codes, 8), torch.ones(1, 1), torch.full((1, 1), -128, dtype=torch.int8), k, fmt)
    y = ENGINE.linear(x, weight, None, torch.float32)
    assert y.item() == pytest.approx(k * 255 * 255, rel=1e-6)
