"""The chunked, in-place halves of the torch engine against plain arithmetic."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from helpers import grid, layer_plan, token_format, weight_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ditq.engines import QuantizedWeight
from ditq.engines.torch import fused
from ditq.engines.torch.fused import quantize_rows, rescale, rescale_, weight_codes
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, Quantized, pack, quantize
from ditq.numerics.grid import Granularity

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[None, 1, 2000], ids=["one-chunk", "row-by-row", "few-rows"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of real size hold all of a small matrix; others divide it, the last one smaller."""
    if request.param is not None:
        monkeypatch.setattr(fused, "_CHUNK_BYTES", request.param)


def same(fast: Quantized, slow: Quantized) -> bool:
    zero = (fast.zero_point is None) == (slow.zero_point is None)
    if fast.zero_point is not None and slow.zero_point is not None:
        zero = torch.equal(fast.zero_point, slow.zero_point)
    return torch.equal(fast.codes, slow.codes) and torch.equal(fast.scale, slow.scale) and zero


def tokens(bits: int, symmetric: bool = True) -> Grid:
    return Grid(bits=bits, symmetric=symmetric, granularity="token", dynamic=True)


def groups(bits: int, symmetric: bool, size: int) -> Grid:
    return Grid(bits=bits, symmetric=symmetric, granularity="group", group_size=size, dynamic=True)


# ------------------------------------------------------------------------------------ quantize_rows


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_normal_levels_equal_those_of_numerics(bits: int, size: int | None, chunks: None) -> None:
    granularity: Granularity = "group" if size else "token"
    fmt = Grid(bits=bits, granularity=granularity, group_size=size, dynamic=True, levels="normal")
    x, smooth = torch.randn(37, 48).to(torch.bfloat16), torch.rand(48) + 0.5
    x[3], x[5, 2] = 0, torch.nan
    assert same(quantize_rows(x[6:], fmt), quantize(x[6:], fmt))
    assert same(quantize_rows(x[6:], fmt, smooth), quantize(x[6:] / smooth, fmt))
    full = fmt.model_copy(update={"levels": "uniform", "full": True})
    assert same(quantize_rows(x[6:], full), quantize(x[6:], full))
    scale = quantize_rows(x, fmt).scale
    assert bool(scale[5].isnan().any()) and bool((scale[3] < 1e-37).all())


FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_subnormal=True)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FINITE),
    st.integers(2, 8),
    st.booleans(),
)
def test_codes_equal_those_of_numerics(array: np.ndarray, bits: int, symmetric: bool) -> None:
    x = torch.from_numpy(array)
    assert same(quantize_rows(x, tokens(bits, symmetric)), quantize(x, grid(bits, symmetric=symmetric)))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("size", "columns"), [(8, 8), (16, 64), (24, 72)])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_codes_of_groups_equal_those_of_numerics(
    rows: int, size: int, columns: int, bits: int, symmetric: bool
) -> None:
    x = torch.randn(rows, columns) * torch.logspace(-7, 4, columns)
    x[3:5, :size] = 0
    x[5:6, :size] = x[5:6, :size].abs()
    slow = quantize(x, grid(bits, symmetric=symmetric, granularity="group", group_size=size))
    assert same(quantize_rows(x, groups(bits, symmetric, size)), slow)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (50, 64), (37, 129)])
def test_codes_of_chunks_equal_those_of_numerics(shape: tuple[int, int], bits: int, dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.logspace(-7, 4, shape[0])[:, None]).to(dtype)
    x[3:5] = 0
    before = x.clone()
    assert same(quantize_rows(x, tokens(bits)), quantize(x, grid(bits)))
    assert torch.equal(x, before)


def test_codes_of_a_matrix_of_many_chunks() -> None:
    x = torch.randn(1100, 1536)
    assert x.nbytes > 2 * fused._CHUNK_BYTES * torch.get_num_threads()
    assert same(quantize_rows(x, tokens(8)), quantize(x, grid(8)))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fmt", [tokens(8), tokens(8, False), groups(4, True, 16), groups(4, False, 16)], ids=str)
def test_a_row_that_is_not_finite_is_marked_and_leaves_the_others_alone(fmt: Grid, bad: float) -> None:
    x = torch.randn(20, 48)
    x[7, 5] = bad
    fast = quantize_rows(x, fmt)
    slow = quantize(x, fmt)
    others = torch.arange(20) != 7
    assert torch.equal(fast.codes[others], slow.codes[others])
    assert fast.scale[7].isfinite().tolist() == [False] + [True] * (fast.scale.shape[1] - 1)
    assert torch.equal(fast.scale.nan_to_num(-1), slow.scale.nan_to_num(-1))


# ------------------------------------------------------------------------------------------ rescale_


def close(y: Tensor, acc: Tensor, x_scale: Tensor, w_scale: Tensor, outer: list, plus: Tensor | None) -> bool:
    """Equal bit by bit but for the last sum, which may be a fused multiply-add: an ulp of what is added."""
    expected, product = rescale(acc, x_scale, w_scale, outer, plus), rescale(acc, x_scale, w_scale, outer, None)
    if plus is None:
        return torch.equal(y, product)
    return bool(((y - expected).abs() <= torch.finfo(torch.float32).eps * (product.abs() + plus.abs())).all())


def factors(m: int, n: int, corrections: int, plus: str, shared: bool) -> tuple:
    def integers(*shape: int) -> Tensor:
        return torch.randint(-(2**20), 2**20, shape, dtype=torch.int32)

    outer = [(integers(1 if shared else m, 1), torch.randint(-128, 128, (n,), dtype=torch.int32))] * corrections
    added = {"none": None, "bias": torch.randn(n), "matrix": torch.randn(m, n)}[plus]
    x_scale, w_scale = torch.rand(1 if shared else m, 1) + 0.1, torch.rand(1 if shared else n) + 0.1
    return torch.randint(-(2**30), 2**30, (m, n), dtype=torch.int32), x_scale, w_scale, outer, added


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("shared", [False, True], ids=["scale-per-row", "one-scale"])
@pytest.mark.parametrize("plus", ["none", "bias", "matrix"])
@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (33, 70)])
def test_rescaling_in_place_is_plain_arithmetic(
    shape: tuple[int, int], corrections: int, plus: str, shared: bool
) -> None:
    acc, *rest = factors(*shape, corrections, plus, shared)
    kept = [t.clone() for t in rest if isinstance(t, Tensor)]
    before = acc.clone()
    y = rescale_(acc, *rest)
    assert y.dtype == torch.float32
    assert close(y, before, *rest)
    assert y.data_ptr() == acc.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for t in rest if isinstance(t, Tensor)), strict=True))


def test_rescaling_a_matrix_of_many_chunks() -> None:
    acc, *rest = factors(500, 3001, 1, "bias", False)
    assert acc.nbytes > 2 * fused._CHUNK_BYTES * torch.get_num_threads()
    before = acc.clone()
    assert close(rescale_(acc, *rest), before, *rest)


# -------------------------------------------------------------------------------------- weight_codes


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_are_those_of_the_weight_less_their_zero_points(
    bits: int, symmetric: bool, group: int | None
) -> None:
    fmt = weight_format(bits, symmetric=symmetric, granularity="group" if group else "channel", group=group)
    w = torch.randn(9, 48) + 0.7
    w[0], w[1], w[2] = w[0].abs(), -w[1].abs(), 0  # zero points at both ends of the grid, and in the middle
    q = quantize(w, fmt)
    zero = None if q.zero_point is None else q.zero_point.to(torch.int8)
    stored = pack(q.codes, bits)
    codes, left = weight_codes(QuantizedWeight(stored, q.scale, zero, 48, fmt))
    assert (left is None) == (symmetric or bits < 8)
    assert torch.equal(stored, pack(q.codes, bits))

    def centred(codes: Tensor, zero: Tensor | None) -> Tensor:
        return codes.int() if zero is None else codes.int() - zero.int().repeat_interleave(48 // zero.shape[1], 1)

    assert codes.dtype == torch.int8
    assert torch.equal(centred(codes, left), centred(q.codes, q.zero_point))


# --------------------------------------------------------------------------------- whole-model compile


@pytest.mark.parametrize(
    ("fmt", "bias"),
    [(weight_format(8), True), (weight_format(4), False), (weight_format(4, granularity="group", group=16), True)],
    ids=str,
)
def test_torch_compile_traces_a_layer_once_without_a_break(fmt: Grid, bias: bool) -> None:
    torch._dynamo.reset()
    plan = layer_plan(weight=fmt, activation=token_format(8), bias=bias)
    layer = QuantizedLinear.from_linear(nn.Linear(plan.in_features, plan.out_features, bias), plan)
    backend = CompileCounterWithBackend("aot_eager")  # functionalizes what is in place, and needs no C++ compiler
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 9, 700):
        x = torch.randn(rows, plan.in_features)
        assert torch.equal(compiled(x), layer(x))
    assert backend.frame_count == 1
