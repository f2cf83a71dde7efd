"""The quantizer of the Triton engine against ``ditq.numerics``: equal codes, scales, zero points and sums."""

from __future__ import annotations

import pytest
import torch
from helpers import grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_helpers import DEVICES, assert_codes, home, moved, why_not

from ditq.numerics import Rotation, quantize, rotate, scaled_signs

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

import ditq.engines.triton.quantize as operation
from ditq.engines.triton.rows import Target

CPU = torch.device("cpu")


def rows(m: int, k: int) -> Tensor:
    """Rows of all sizes from tiny to huge, one of zeros and one of equal numbers."""
    x = torch.randn(m, k) * torch.logspace(-30, 30, m)[:, None]
    x[m // 2] = 0
    x[m // 3] = 2.5
    return x


def target(
    bits: int = 8, *, symmetric: bool = True, groups: int = 1, smooth: Tensor | None = None,
    rotation: Rotation | None = None, given: Tensor | None = None,
) -> Target:  # fmt: skip
    signs = None if rotation is None else scaled_signs(rotation, CPU)
    block, regular = (0, False) if rotation is None else (rotation.block, rotation.kind == "regular")
    return Target(smooth, signs, block, bits, symmetric, groups, given, regular)


def check(device: str, x: Tensor, to: Target, *, exact: bool = True) -> None:
    expected = operation.reference(x, *to)
    found = operation.launch(*moved((x, *to), device))
    assert_codes(found, expected, exact=exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_bits(bits: int, symmetric: bool, device: str) -> None:
    check(device, rows(13, 100), target(bits, symmetric=symmetric))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("m", "k", "groups"),
    [(0, 16, 1), (0, 16, 2), (1, 1, 1), (3, 8, 1), (65, 72, 1), (5, 1152, 9), (7, 96, 6), (2, 99, 11)],
)
def test_shapes(m: int, k: int, groups: int, symmetric: bool, device: str) -> None:
    x = rows(m, k) if m > 2 else torch.randn(m, k)
    check(device, x, target(symmetric=symmetric, groups=groups))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype, device: str) -> None:
    wide = (torch.randn(9, 300) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    for x in (wide[:, 100:196], wide[::2, :96], wide[:, ::3]):
        assert not x.is_contiguous()
        check(device, x, target(symmetric=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 4])
def test_static_scales(groups: int, device: str) -> None:
    x = torch.randn(6, 64) * 3
    for scale in (torch.tensor([[0.013]]), torch.full((1, groups), 0.02).cumsum(1)):
        check(device, x, target(groups=groups, given=scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [None, 16, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_smoothing_and_rotation(symmetric: bool, block: int | None, device: str) -> None:
    k = 384
    rotation = None if block is None else Rotation(k, block, seed=3)
    to = target(symmetric=symmetric, smooth=torch.rand(k) + 0.5, rotation=rotation)
    check(device, torch.randn(11, k) * torch.logspace(-3, 3, 11)[:, None], to, exact=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [16, 64])
def test_regular_rotation(block: int, device: str) -> None:
    rotation, x = Rotation(384, block, kind="regular"), torch.randn(11, 384)
    to = target(rotation=rotation)
    check(device, x, to, exact=False)
    expected = quantize(rotate(x, rotation), grid(8))
    scale = home(operation.launch(*moved((x, *to), device)))[1]
    torch.testing.assert_close(scale, expected.scale, rtol=1e-5, atol=0)
    other = target(rotation=Rotation(384, block, seed=1))
    assert not torch.allclose(operation.reference(x, *other)[1], expected.scale, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_rotation_within_groups(device: str) -> None:
    to = target(groups=3, rotation=Rotation(384, 64, seed=1), symmetric=False)
    check(device, torch.randn(5, 384), to, exact=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_a_row_that_is_not_finite_is_marked_and_leaves_the_others_alone(
    bad: float, symmetric: bool, device: str
) -> None:
    x = torch.randn(7, 48)
    x[3, 5] = bad
    to = target(symmetric=symmetric)
    codes, scale, _, _ = home(operation.launch(*moved((x, *to), device)))
    expected = operation.reference(x, *to)
    others = torch.arange(7) != 3
    assert bool(scale[3].isnan())
    assert torch.equal(codes[others], expected[0][others])
    assert torch.equal(scale[others], expected[1][others])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_the_batch(device: str) -> None:
    x = torch.randn(9, 200)
    to = target(symmetric=False)
    whole = home(operation.launch(*moved((x, *to), device)))
    for i in (0, 5, 8):
        alone = home(operation.launch(*moved((x[i : i + 1], *to), device)))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), top=st.sampled_from([1, 7, 127]))
def test_ties_fall_as_ieee_division_says(seed: int, top: int, device: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = 4096
    scale = torch.rand(4, 1, generator=generator) * 10.0 ** torch.randint(-20, 20, (4, 1), generator=generator)
    steps = torch.randint(0, top, (4, k), generator=generator) + 0.5
    x = (steps.double() * scale.double()).float()
    x = torch.where(torch.rand(4, k, generator=generator) < 0.5, x, torch.nextafter(x, 2 * x))
    x[:, 0] = top * scale[:, 0]
    to = target({1: 2, 7: 4, 127: 8}[top])
    codes, found, *_ = home(operation.launch(*moved((x, *to), device)))
    assert torch.equal(codes.float(), (x / found).round())
    assert torch.equal(codes, quantize(x, grid(to.bits)).codes)
