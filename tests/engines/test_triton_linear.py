"""The products of the Triton engine: equal integers, and outputs that are those of float64 up to float32 rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import grid
from torch import Tensor
from triton_helpers import DEVICES, moved, why_not

from ditq.numerics import Quantized, pack, quantize, unpack

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

import ditq.engines.triton.expand as expansion
import ditq.engines.triton.linear as operation
from ditq.engines.triton.tiles import Tile

SMALL, WIDE = Tile(32, 32, 32, 4, 2), Tile(32, 64, 128, 4, 2)
# The tile of the table: for real cards only.
TILES = [SMALL, WIDE] + [None] * torch.cuda.is_available()


def values(q: Quantized) -> Tensor:
    """What codes stand for, in float64."""
    grid = q.codes.double().unflatten(1, (q.scale.shape[1], -1))
    zero = 0 if q.zero_point is None else q.zero_point.double()[..., None]
    return ((grid - zero) * q.scale.double()[..., None]).flatten(1)


def integers(m: int, k: int, bits: int, group: int | None, symmetric: bool, *, unit: bool = False) -> Quantized:
    """Codes of random numbers; with ``unit`` scales are 1, so that outputs are sums of integers."""
    x = torch.randn(m, k) * 2 + 0.4
    q = quantize(x, grid(bits, symmetric=symmetric, granularity="row" if group is None else "group", group_size=group))
    return q._replace(scale=torch.ones_like(q.scale)) if unit else q


def arguments(
    x: Quantized, w: Quantized, bits: int, *, bias: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None,
    dtype: torch.dtype = torch.float32, sums: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    zero = None if w.zero_point is None else w.zero_point.to(torch.int8)
    packed = pack(w.codes, bits)
    return x.codes, x.scale, x.zero_point, sums, packed, bits, w.scale, zero, bias, gate, residual, low, up, dtype


def run(device: str, arguments: tuple[Any, ...], tile: Tile | None = SMALL) -> Tensor:
    return operation.launch(*moved(arguments, device), tile=tile).cpu()


def assert_close(y: Tensor, expected: Tensor, x: Quantized, w: Quantized) -> None:
    size = values(x).abs() @ values(w).abs().T + expected.abs()
    assert bool(((y.double() - expected).abs() <= 2e-6 * size).all())


# bits, group and symmetry of the weight, then of the input
FORMATS = {
    "w8-a8": (8, None, True, 8, None, True),
    "w8asym-a8": (8, None, False, 8, None, True),
    "w8asym-a8asym": (8, None, False, 8, None, False),
    "w8asym-g32-a8asym-g48": (8, 32, False, 8, 48, False),
    "w4-a8": (4, None, True, 8, None, True),
    "w4asym-a8asym": (4, None, False, 8, None, False),
    "w4asym-g32-a8": (4, 32, False, 8, None, True),
    "w4asym-g48-a8asym-g48": (4, 48, False, 8, 48, False),
    "w4-a8asym-g32": (4, None, True, 8, 32, False),
    "w2asym-g32-a4": (2, 32, False, 4, None, True),
    "w3asym-a6asym": (3, None, False, 6, None, False),
    "w6-a8": (6, None, True, 8, None, True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_integers_are_equal(name: str, tile: Tile | None, device: str) -> None:
    w_bits, w_group, w_symmetric, x_bits, x_group, x_symmetric = FORMATS[name]
    x = integers(33, 96, x_bits, x_group, x_symmetric, unit=True)
    w = integers(40, 96, w_bits, w_group, w_symmetric, unit=True)
    y = run(device, arguments(x, w, w_bits), tile)
    assert y.abs().max() < 2**24  # a float32 holds these integers exactly
    assert torch.equal(y.double(), values(x) @ values(w).T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, device: str) -> None:
    w_bits, w_group, w_symmetric, x_bits, x_group, x_symmetric = FORMATS[name]
    x, w = integers(17, 96, x_bits, x_group, x_symmetric), integers(11, 96, w_bits, w_group, w_symmetric)
    bias = torch.randn(11)
    y = run(device, arguments(x, w, w_bits, bias=bias), WIDE)
    assert_close(y, values(x) @ values(w).T + bias.double(), x, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(0, 16, 8), (1, 1, 1), (1, 72, 8), (3, 7, 5), (33, 129, 70), (15, 200, 1), (65, 33, 31)]
)
def test_shapes(m: int, k: int, n: int, bits: int, device: str) -> None:
    x, w = integers(m, k, 8, None, False) if m else Quantized(*empty(k), grid(8)), integers(n, k, bits, None, False)
    y = run(device, arguments(x, w, bits))
    assert y.shape == (m, n)
    assert_close(y, values(x) @ values(w).T, x, w)


def empty(k: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(0, k, dtype=torch.int8), torch.empty(0, 1), torch.empty(0, 1, dtype=torch.int16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "code"), [(8, -128), (8, 127), (4, -8), (4, 7)])
def test_extreme_codes_do_not_saturate(bits: int, code: int, device: str) -> None:
    k = 4608
    x = Quantized(torch.full((2, k), 127, dtype=torch.int8), torch.ones(2, 1), None, grid(8))
    w = Quantized(torch.full((3, k), code, dtype=torch.int8), torch.ones(3, 1), None, grid(bits))
    y = run(device, arguments(x, w, bits), Tile(32, 32, 256, 4, 2))
    assert torch.equal(y, torch.full((2, 3), 127.0 * code * k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_one_scale_for_all(bits: int, device: str) -> None:
    x, w = integers(5, 64, 8, None, True), integers(6, 64, bits, None, False)
    x = x._replace(scale=torch.tensor([[0.03]]))
    w = w._replace(scale=torch.tensor([[0.02]]), zero_point=torch.tensor([[3]], dtype=torch.int16))
    assert_close(run(device, arguments(x, w, bits)), values(x) @ values(w).T, x, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_sums_at_hand_are_used_and_change_nothing(symmetric: bool, device: str) -> None:
    x, w = integers(5, 64, 8, 32, symmetric), integers(6, 64, 4, 32, False)
    sums = x.codes.unflatten(1, (2, 32)).sum(-1, dtype=torch.int32)
    with_sums, without = run(device, arguments(x, w, 4, sums=sums)), run(device, arguments(x, w, 4))
    assert torch.equal(with_sums, without)
    assert not torch.equal(with_sums, run(device, arguments(x, w, 4, sums=sums + 1)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("branch", [False, True], ids=["", "low"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("tokens", [None, 3, 64, 128])
def test_gate_residual_and_low_rank(tokens: int | None, residual: bool, branch: bool, device: str) -> None:
    """Samples that end within a tile and with it, one for all, and gates that are a chunk of a wider tensor."""
    m, n = 128, 24
    m = 120 if tokens == 3 else m
    x, w, bias = integers(m, 64, 8, None, True), integers(n, 64, 4, None, False), torch.randn(n)
    gate = None if tokens is None else torch.randn(m // tokens, 6 * n)[:, 2 * n : 3 * n]
    plus = torch.randn(m, n) if residual else None
    low, up = (torch.randn(m, 20), torch.randn(n, 20)) if branch else (None, None)
    y = run(
        device, arguments(x, w, 4, bias=bias, gate=gate, residual=plus, low=low, up=up), Tile(64, 32, 64, 4, 2)
    )  # fmt: skip
    expected, size = values(x) @ values(w).T + bias.double(), values(x).abs() @ values(w).abs().T + bias.abs()
    if low is not None and up is not None:
        expected, size = expected + low.double() @ up.double().T, size + low.double().abs() @ up.double().abs().T
    if gate is not None:
        rows = gate.double().repeat_interleave(m // len(gate), 0)
        expected, size = expected * rows, size * rows.abs()
    if plus is not None:
        expected, size = expected + plus.double(), size + plus.abs()
    assert bool(((y.double() - expected).abs() <= 3e-6 * size).all())


@pytest.mark.parametrize("device", DEVICES)
def test_half_a_branch_is_refused(device: str) -> None:
    x, w = integers(4, 32, 8, None, True), integers(4, 32, 8, None, True)
    with pytest.raises(ValueError, match="pass both or neither"):
        run(device, arguments(x, w, 8, low=torch.ones(4, 2)))


@pytest.mark.parametrize("device", DEVICES)
def test_sums_that_could_overflow_are_refused(device: str) -> None:
    x, w = integers(1, 40_000, 8, None, True), integers(1, 40_000, 8, None, True)
    with pytest.raises(ValueError, match="at most 33025"):
        run(device, arguments(x, w, 8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtype(dtype: torch.dtype, device: str) -> None:
    x, w, bias = integers(9, 64, 8, None, True), integers(10, 64, 8, None, True), torch.randn(10).to(dtype)
    y = run(device, arguments(x, w, 8, bias=bias, dtype=dtype))
    assert y.dtype == dtype
    expected = values(x) @ values(w).T + bias.double()
    # The interpreter cuts off where hardware rounds to nearest, so twice half an ulp.
    assert bool(((y.double() - expected).abs() <= 1.01 * torch.finfo(dtype).eps * expected.abs() + 1e-5).all())


@pytest.mark.parametrize("device", DEVICES)
def test_tiny_and_huge_scales(device: str) -> None:
    x, w = integers(4, 32, 8, None, True), integers(4, 32, 8, None, True)
    x = x._replace(scale=torch.tensor([[1e-38], [1e-30], [1e20], [1e30]]))
    y = run(device, arguments(x, w, 8))
    assert_close(y, values(x) @ values(w).T, x, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_a_marked_row_becomes_nan_and_leaves_the_others_alone(group: int | None, device: str) -> None:
    x, w = integers(5, 64, 8, group, True), integers(7, 64, 4, group, False)
    good = run(device, arguments(x, w, 4))
    scale = x.scale.clone()
    scale[2, 0] = float("nan")
    y = run(device, arguments(x._replace(scale=scale), w, 4))
    others = torch.arange(5) != 2
    assert bool(y[2].isnan().all())
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_the_batch_and_runs_are_equal(device: str) -> None:
    x, w = integers(37, 96, 8, 48, False), integers(9, 96, 4, 48, False)
    whole = run(device, arguments(x, w, 4))
    assert torch.equal(whole, run(device, arguments(x, w, 4)))
    some = [36, 0, 20]
    few = Quantized(x.codes[some], x.scale[some], x.zero_point[some], x.grid)
    assert torch.equal(run(device, arguments(few, w, 4)), whole[some])


@pytest.mark.parametrize("device", DEVICES)
def test_int8_weights_are_taken_as_they_are(device: str) -> None:
    x, w = integers(5, 40, 8, None, True), integers(6, 40, 8, None, False, unit=True)
    packed = arguments(x, w, 8)
    plain = (*packed[:4], w.codes, *packed[5:])
    assert torch.equal(run(device, plain), run(device, packed))


# -------------------------------------------------------------------------------------------- expand


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero", [None, "tensor", "channel", "group"])
@pytest.mark.parametrize("bits", range(2, 8))
def test_expanded_weights(bits: int, zero: str | None, device: str) -> None:
    n, k = 19, 300
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8)
    shape = {"tensor": (1, 1), "channel": (n, 1), "group": (n, 6), None: (0, 0)}[zero]
    zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    given = None if zero is None else zeros
    packed = pack(codes, bits)
    found = expansion.launch(*moved((packed, bits, k, given), device)).cpu()
    assert torch.equal(found, expansion.reference(packed, bits, k, given))
    expected = codes.int() - (0 if given is None else given.int().repeat_interleave(k // given.shape[1], 1))
    assert torch.equal(found.int(), expected)
    assert torch.equal(unpack(packed, bits, k), codes)
