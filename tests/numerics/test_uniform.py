"""The uniform quantizer against float64 loops."""

from fractions import Fraction

import pytest
import torch
from helpers import grid
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditq.numerics import (
    Grid,
    Quantized,
    check_finite,
    code_range,
    dequantize,
    fake_quantize,
    group_view,
    not_finite,
    quantize,
    scale_and_zero_point,
    search_clip_ratio,
    sqnr_db,
)

TINY = torch.finfo(torch.float32).tiny
BITS = st.integers(2, 8)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """[R, 64] of very different magnitudes and signs, some of it zero."""
    rows = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(rows, 64, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** draw(st.integers(-36, 36)) + draw(st.sampled_from([0.0, 0.0, 3.0, -5.0]))
    if draw(st.booleans()):
        x[:, draw(st.integers(0, 63))] *= 50
    x[torch.rand(x.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0
    return x.float()


def pieces(x: Tensor, granularity: str, group_size: int | None) -> list[list[tuple[int, slice]]]:
    """The (row, columns) pairs behind each scale, in the order of the flattened scale."""
    rows, columns = x.shape
    if granularity == "tensor":
        return [[(i, slice(0, columns)) for i in range(rows)]]
    step = group_size or columns
    return [[(i, slice(j, j + step))] for i in range(rows) for j in range(0, columns, step)]


def values(x: Tensor, piece: list[tuple[int, slice]]) -> list[float]:
    return [v for i, columns in piece for v in x[i, columns].tolist()]


LAYOUTS = st.sampled_from([("tensor", None), ("row", None), ("group", 16), ("group", 64)])


@pytest.mark.parametrize(("bits", "symmetric", "expected"), [
    (8, True, (-127, 127)), (8, False, (-128, 127)), (4, True, (-7, 7)), (4, False, (-8, 7)),
    (2, True, (-1, 1)), (2, False, (-2, 1)),
])  # fmt: skip
def test_code_range(bits: int, symmetric: bool, expected: tuple[int, int]) -> None:
    assert code_range(bits, symmetric) == expected


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_code_range_refuses_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        code_range(bits, True)


@settings(deadline=None, max_examples=40)
@given(matrices(), BITS, LAYOUTS)
def test_symmetric_matches_float64_reference(x: Tensor, bits: int, layout: tuple[str, int | None]) -> None:
    granularity, group_size = layout
    q = quantize(x, grid(bits, granularity=granularity, group_size=group_size))
    back = dequantize(q)
    top = 2 ** (bits - 1) - 1
    assert (q.codes.dtype, q.scale.dtype, q.zero_point) == (torch.int8, torch.float32, None)
    groups = pieces(x, granularity, group_size)
    assert q.scale.numel() == len(groups)
    for scale, piece in zip(q.scale.flatten().tolist(), groups, strict=True):
        numbers = values(x, piece)
        largest = max(map(abs, numbers))
        expected = max(largest / top, TINY) if largest else 1 / top
        assert scale == pytest.approx(expected, rel=1e-6)
        for number, code, decoded in zip(numbers, values(q.codes, piece), values(back, piece), strict=True):
            assert abs(code) <= top
            assert abs(code - number / scale) <= 0.5 + 1e-4
            assert abs(number - decoded) <= scale * (0.5 + 1e-4)
            assert decoded == pytest.approx(scale * code, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(matrices(), BITS, LAYOUTS)
def test_asymmetric_matches_float64_reference(x: Tensor, bits: int, layout: tuple[str, int | None]) -> None:
    granularity, group_size = layout
    q = quantize(x, grid(bits, symmetric=False, granularity=granularity, group_size=group_size))
    back = dequantize(q)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert q.zero_point is not None and q.zero_point.dtype == torch.int16
    zero_points = q.zero_point.flatten().tolist()
    groups = pieces(x, granularity, group_size)
    for scale, zero, piece in zip(q.scale.flatten().tolist(), zero_points, groups, strict=True):
        numbers = values(x, piece)
        low, high = min(0.0, *numbers), max(0.0, *numbers)
        expected = max((high - low) / (2**bits - 1), TINY) if high > low else 1 / (2**bits - 1)
        assert scale == pytest.approx(expected, rel=1e-6)
        assert bottom <= zero <= top
        assert abs(zero - bottom + low / expected) <= 0.5 + 1e-4
        for number, code, decoded in zip(numbers, values(q.codes, piece), values(back, piece), strict=True):
            assert bottom <= code <= top
            assert abs(number - decoded) <= scale * (0.5 + 1e-3)
            assert decoded == pytest.approx(scale * (code - zero), rel=1e-6)
            assert number != 0 or decoded == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("constant", [0.0, 3.7, -3.7, 1e-40, -1e-44, 3e38, -3e38])
def test_constant_rows(constant: float, bits: int, symmetric: bool) -> None:
    x = torch.full((2, 5), constant)
    q = quantize(x, grid(bits, symmetric=symmetric))
    assert torch.isfinite(q.scale).all() and (q.scale >= TINY).all()
    back = dequantize(q)
    if abs(constant) >= TINY:  # both 0 and the constant are ends of the range, so both are codes
        torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    else:
        assert back.abs().max() <= TINY


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_zero_rows_have_a_scale(bits: int) -> None:
    x = torch.zeros(3, 8)
    symmetric, asymmetric = quantize(x, grid(bits)), quantize(x, grid(bits, symmetric=False))
    assert not symmetric.codes.any()
    torch.testing.assert_close(symmetric.scale, torch.full((3, 1), 1 / (2 ** (bits - 1) - 1)))
    torch.testing.assert_close(asymmetric.scale, torch.full((3, 1), 1 / (2**bits - 1)))
    assert not dequantize(asymmetric).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_positive_rows_use_every_code(bits: int) -> None:
    q = quantize(torch.linspace(0, 1, 2**bits)[None], grid(bits, symmetric=False))
    assert q.codes[0].tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert q.zero_point is not None and q.zero_point.item() == -(2 ** (bits - 1))


def test_all_positive_rows_away_from_zero_keep_zero_in_range() -> None:
    q = quantize(torch.tensor([[10.0, 11.0, 12.75]]), grid(8, symmetric=False))
    assert q.scale.item() == pytest.approx(0.05)
    assert q.zero_point is not None and q.zero_point.item() == -128


def test_ends_of_opposite_sign_do_not_overflow() -> None:
    x = torch.tensor([[2e38, -2e38, 0.0]])  # their difference is Inf in float32
    for bits in range(2, 9):
        back = fake_quantize(x, grid(bits, symmetric=False))
        assert torch.isfinite(back).all() and back[0, 2] == 0


def test_ties_round_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]])
    assert quantize(x, grid(8)).codes[0].tolist() == [0, 2, 2, 0, -2, -2, 127]
    asymmetric = quantize(torch.cat((x, torch.tensor([[-128.0]])), 1), grid(8, symmetric=False))
    assert asymmetric.zero_point is not None and asymmetric.zero_point.item() == 0
    assert asymmetric.codes[0, :6].tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_equal_their_float32_values(dtype: torch.dtype, symmetric: bool) -> None:
    x = (torch.randn(7, 48) * 100).to(dtype)
    low = quantize(x, grid(8, symmetric=symmetric, granularity="group", group_size=16))
    high = quantize(x.float(), grid(8, symmetric=symmetric, granularity="group", group_size=16))
    for a, b in ((low.codes, high.codes), (low.scale, high.scale), (low.zero_point, high.zero_point)):
        assert a is b is None or torch.equal(a, b)


@settings(deadline=None, max_examples=30)
@given(matrices(), BITS, st.booleans())
def test_groups_are_rows_of_the_reshaped_matrix(x: Tensor, bits: int, symmetric: bool) -> None:
    groups = quantize(x, grid(bits, symmetric=symmetric, granularity="group", group_size=16))
    rows = quantize(x.reshape(-1, 16), grid(bits, symmetric=symmetric))
    assert torch.equal(groups.codes.reshape(-1, 16), rows.codes)
    assert torch.equal(groups.scale.reshape(-1, 1), rows.scale)


@settings(deadline=None, max_examples=20)
@given(matrices(), BITS)
def test_symmetric_codes_are_odd(x: Tensor, bits: int) -> None:
    assert torch.equal(quantize(-x, grid(bits)).codes, -quantize(x, grid(bits)).codes)


@settings(deadline=None, max_examples=20)
@given(matrices(), BITS, st.booleans())
def test_fake_quantize_twice_is_once(x: Tensor, bits: int, symmetric: bool) -> None:
    q = quantize(x, grid(bits, symmetric=symmetric))
    again = quantize(dequantize(q), grid(bits, symmetric=symmetric), scale=q.scale, zero_point=q.zero_point)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(fake_quantize(x, grid(bits, symmetric=symmetric)), dequantize(q))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_with_dynamic_scale_is_dynamic(granularity: str, symmetric: bool) -> None:
    x = torch.randn(4, 64)
    kwargs = {"symmetric": symmetric, "granularity": granularity, "group_size": 32 if granularity == "group" else None}
    scale, zero_point = scale_and_zero_point(x, grid(5, **kwargs))
    static = quantize(x, grid(5, **kwargs), scale=scale, zero_point=zero_point)
    assert torch.equal(static.codes, quantize(x, grid(5, **kwargs)).codes)


def test_static_scale_saturates_and_broadcasts() -> None:
    x = torch.tensor([[-1e30, -1.0, 0.26, 1e30], [0.0, 100.0, -100.0, 0.5]])
    q = quantize(x, grid(4), scale=torch.tensor([[0.5]]))
    assert q.codes.tolist() == [[-7, -2, 1, 7], [0, 7, -7, 1]]
    assert q.scale.shape == (2, 1)
    tensor = quantize(x, grid(4, granularity="tensor"), scale=torch.tensor(0.5))
    assert tensor.scale.shape == (1, 1) and torch.equal(tensor.codes, q.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_ratio_scales_the_range(symmetric: bool) -> None:
    x = torch.randn(3, 64)
    full, zero = scale_and_zero_point(x, grid(4, symmetric=symmetric))
    half, zero_of_half = scale_and_zero_point(x, grid(4, symmetric=symmetric), clip_ratio=0.5)
    assert torch.equal(half, full * 0.5)
    assert zero is zero_of_half is None or torch.equal(zero, zero_of_half)
    per_row = torch.tensor([[1.0], [0.5], [0.25]])
    mixed, _ = scale_and_zero_point(x, grid(4, symmetric=symmetric), clip_ratio=per_row)
    assert torch.equal(mixed, full * per_row)


def test_dequantize_holds_differences_beyond_int8() -> None:
    q = Quantized(
        torch.tensor([[127, -128]], dtype=torch.int8), torch.ones(1, 1), torch.tensor([[-128]]).short(), grid(8, False)
    )
    assert dequantize(q).tolist() == [[255.0, 0.0]]
    as_stored = q._replace(zero_point=torch.tensor([[-128]], dtype=torch.int8))
    assert dequantize(as_stored).tolist() == [[255.0, 0.0]]


def test_scale_is_the_nearest_float32_of_the_exact_quotient() -> None:
    x = torch.randn(50, 3)
    scale, _ = scale_and_zero_point(x, grid(8))
    for row, s in zip(x, scale.flatten().tolist(), strict=True):
        exact = Fraction(float(row.abs().max())) / 127
        assert Fraction(s) == Fraction(torch.tensor(float(exact), dtype=torch.float32).item())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "scales"), [("tensor", (1, 1)), ("row", (0, 1)), ("group", (0, 4))])
def test_empty_batch(granularity: str, scales: tuple[int, int], symmetric: bool) -> None:
    size = 8 if granularity == "group" else None
    q = quantize(torch.empty(0, 32), grid(8, symmetric=symmetric, granularity=granularity, group_size=size))
    assert q.codes.shape == (0, 32) and q.scale.shape == scales
    assert torch.isfinite(q.scale).all() and (q.scale > 0).all()
    assert dequantize(q).shape == (0, 32)


def test_transposed_input_equals_contiguous() -> None:
    x = torch.randn(64, 6).T
    for size in (None, 16):
        kind = "group" if size else "row"
        a = quantize(x, grid(4, granularity=kind, group_size=size))
        b = quantize(x.contiguous(), grid(4, granularity=kind, group_size=size))
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_input_is_left_alone() -> None:
    x = torch.randn(3, 64)
    before = x.clone()
    fake_quantize(x, grid(4, symmetric=False))
    assert torch.equal(x, before)


def test_group_view_shapes() -> None:
    x = torch.arange(24.0).reshape(2, 12)
    assert group_view(x, grid(4, granularity="tensor")).shape == (1, 1, 24)
    assert group_view(x, grid(4)).shape == (2, 1, 12)
    assert group_view(x, grid(4, granularity="group", group_size=4))[1, 2].tolist() == [20.0, 21.0, 22.0, 23.0]


@pytest.mark.parametrize(("columns", "size", "possible"), [
    (1152, 100, "16, 32, 48, 64, 96, 128, 192, 288, 384"), (15, 4, "1, 3, 5, 15"),
])  # fmt: skip
def test_group_size_error_names_divisors(columns: int, size: int, possible: str) -> None:
    with pytest.raises(ValueError, match=f"divide the {columns} columns, got {size}; possible: {possible}$"):
        quantize(torch.zeros(1, columns), grid(4, granularity="group", group_size=size))


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"granularity": "rows"}, "'tensor', 'channel', 'token' or 'group'"),
    ({"group_size": 4}, "group_size is for granularity 'group' only, got 'channel' with 4"),
    ({"granularity": "group"}, "group_size is for granularity 'group' only, got 'group' with None"),
    ({"clip_ratio": 0.0}, "clip_ratio must be positive, got 0.0"),
    ({"clip_ratio": torch.ones(5)}, r"clip_ratio must broadcast to \(2, 1\), one per group, got \(5,\)"),
    ({"scale": torch.ones(3, 1)}, r"scale must broadcast to \(2, 1\)"),
    ({"scale": torch.ones(2, 1), "clip_ratio": 0.9}, "clip_ratio must be 1.0 when a scale is given, got 0.9"),
    ({"scale": torch.ones(2, 1), "symmetric": False}, "zero_point=None"),
    ({"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1)}, "zero_point=a tensor"),
    ({"zero_point": torch.zeros(2, 1)}, "zero_point needs a scale"),
])  # fmt: skip
def test_wrong_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_grid = {k: kwargs.pop(k) for k in ("symmetric", "granularity", "group_size") if k in kwargs}
        quantize(torch.zeros(2, 8), grid(4, **of_grid), **kwargs)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"matrix \[R, K\], got shape \(2, 3, 4\)"):
        quantize(torch.zeros(2, 3, 4), grid(8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_what_is_not_finite_is_not_hidden(granularity: str, symmetric: bool, bad: float) -> None:
    x = torch.randn(5, 32)
    x[3, 9] = bad
    options = {"symmetric": symmetric, "granularity": granularity, "group_size": 8 if granularity == "group" else None}
    back = fake_quantize(x, grid(8, **options))
    marked = ~back.isfinite()
    assert marked.reshape(-1, 8).all(1).eq(marked.reshape(-1, 8).any(1)).all()
    wanted = {"tensor": slice(None), "row": slice(96, 128), "group": slice(104, 112)}[granularity]
    expected = torch.zeros(160, dtype=torch.bool)
    expected[wanted] = True
    assert torch.equal(marked.flatten(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(bad: float) -> None:
    x = torch.tensor([[1e38, 1e38], [-3e38, bad], [0.0, -0.0]])
    assert not_finite(x).isnan().flatten().tolist() == [False, True, False]
    assert not_finite(x[::2]).tolist() == [[0.0], [0.0]]
    assert not_finite(torch.zeros(2, 0)).shape == (2, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite(bad: float) -> None:
    x = torch.zeros(2, 3)
    check_finite(x, "weight")
    x[1, 1] = bad
    with pytest.raises(ValueError, match=r"weight contains NaN or Inf \(1 of 6 values\)"):
        check_finite(x, "weight")


# ------------------------------------------------------------------------------------------ full grids


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", range(2, 9))
def test_full_grids_round_nothing_by_more_than_half_a_step(bits: int, group: int | None) -> None:
    fmt = Grid(bits=bits, granularity="group" if group else "channel", group_size=group, full=True)
    x = torch.randn(40, 64) + torch.linspace(-2, 2, 40)[:, None]
    x[3], x[4], x[5] = 0.0, 1.5, -1.5
    x[6, ::2], x[6, 1::2] = 1.0, -1.0
    q = quantize(x, fmt)
    bottom, top = fmt.code_range
    assert (bottom, top) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) and q.zero_point is None
    assert bottom <= int(q.codes.min()) and int(q.codes.max()) <= top
    assert int(q.codes.min()) == bottom
    error = group_view((dequantize(q) - x).abs(), fmt).amax(-1)
    assert bool((error <= q.scale.abs() * (0.5 + 1e-5)).all())
    # The extra code is on the side of the largest magnitude.
    low, high = group_view(x, fmt).aminmax(dim=-1)
    assert bool(((q.scale < 0) == (high > -low)).all())
    assert bool((dequantize(q)[3] == 0).all())
    mirrored = quantize(-x, fmt)
    kept = (high != -low)[:, :1].expand_as(q.scale) if group is None else high != -low
    assert torch.equal(mirrored.scale[kept], -q.scale[kept])


@pytest.mark.parametrize(("group", "gain"), [(None, 0.4), (32, 0.7)])
def test_full_grids_are_nearly_as_accurate_as_zero_points(group: int | None, gain: float) -> None:
    x, kind = torch.randn(64, 256), {"granularity": "group" if group else "channel", "group_size": group}
    found = []
    for fields in ({}, {"full": True}, {"symmetric": False}):
        fmt = Grid(bits=4, **kind, **fields)  # type: ignore[arg-type]
        found.append(sqnr_db(x, fake_quantize(x, fmt, clip_ratio=search_clip_ratio(x, fmt))))
    symmetric, full, asymmetric = found
    assert symmetric + gain < full and asymmetric - 0.4 < full


def test_full_grids_pass_on_numbers_that_are_not_finite() -> None:
    x = torch.randn(3, 8)
    x[0, 1], x[1, 1] = torch.nan, torch.inf
    scale, zero = scale_and_zero_point(x, Grid(bits=4, granularity="channel", full=True))
    assert zero is None and scale.isfinite()[:, 0].tolist() == [False, False, True]
