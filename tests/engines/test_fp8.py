"""The engine of 8-bit floats: what it rounds, what it refuses, and that only those get it who ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import full_weights, layer_plan, normal_weights, token_format, weight_format
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ditq import engines
from ditq.engines.fp8 import ENGINE
from ditq.engines.fp8 import engine as fp8
from ditq.errors import DitqError
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget_choices() -> Any:
    yield
    engines.registry.forget()


def layer(
    bits: int = 8, *, k: int = 96, n: int = 40, symmetric: bool = False, static: bool = False
) -> QuantizedLinear:
    activation = Grid(bits=8, granularity="tensor") if static else token_format()
    plan = layer_plan(k=k, n=n, weight=weight_format(bits, symmetric=symmetric), activation=activation)
    return QuantizedLinear.from_linear(nn.Linear(k, n), plan, input_scale=torch.tensor(0.03) if static else None)


def rounded(x: Tensor) -> Tensor:
    """With the four significant bits of e4m3, row by row of scales, in float64."""
    scale = x.double().abs().amax(1, keepdim=True) / 448
    return (x.double() / scale).to(torch.float8_e4m3fn).double() * scale


def test_nobody_gets_it_without_asking() -> None:
    assert engines.choose(weight_format(8), token_format(), CPU).name == "torch"
    with engines.use_engine("fp8"):
        assert engines.choose(weight_format(8), token_format(), CPU) is ENGINE
    assert engines.choose(weight_format(8), token_format(), CPU, "fp8") is ENGINE
    with engines.use_engine("torch"):
        assert engines.choose(weight_format(8), token_format(), CPU, "fp8").name == "torch"


def test_one_layer_of_many_may_have_it() -> None:
    model = nn.Sequential(layer(n=96), layer())
    x = torch.randn(5, 96)
    with torch.no_grad():
        integers = model(x)
        model[1].engine = "fp8"
        mixed = model(x)
        with engines.use_engine("fp8"):
            floats = model(x)
    assert not torch.equal(mixed, integers)
    assert not torch.equal(mixed, floats)
    assert torch.equal(mixed, model[1](model[0](x)))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_of_few_bits_are_exact(bits: int, symmetric: bool) -> None:
    quantized = layer(bits, symmetric=symmetric)
    x = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    with engines.use_engine("fp8"):
        y = quantized(x).detach()
    expected = rounded(x) @ quantized.weight.double().T + quantized.bias.double()  # type: ignore[union-attr]
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_weights_of_eight_bits_are_rounded_once_more(static: bool) -> None:
    quantized, x = layer(8, static=static), torch.randn(64, 96)
    with engines.use_engine("fp8"), torch.no_grad():
        y = quantized(x)
    expected = torch.nn.functional.linear(x, quantized.weight, quantized.bias)
    error = float((y - expected).norm() / expected.norm())
    assert 0.005 < error < 0.06  # integers have less than 0.01
    with torch.no_grad():
        assert (quantized(x) - expected).norm() / expected.norm() < error


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    quantized, x = layer(8), torch.randn(5, 96)
    x[1], x[2, 3], x[3, 4] = 0, float("nan"), -float("inf")
    with engines.use_engine("fp8"), torch.no_grad():
        y, good = quantized(x), quantized(x[[0, 4]])
    assert torch.equal(y[1], quantized.bias)
    assert bool(y[2:4].isnan().all())
    assert torch.equal(y[[0, 4]], good)


@pytest.mark.parametrize(
    ("formats", "reason"),
    [
        ((weight_format(4, granularity="group", group=32), token_format()), "no groups"),
        ((weight_format(4), token_format(granularity="group", group=32)), "no groups"),
        ((weight_format(4), token_format(4)), "8 bits, not 4"),
        ((full_weights(), token_format()), "those of full grids may be negative"),
        ((normal_weights(), token_format()), "normal levels are integers of 8 bits"),
        ((weight_format(4), token_format(4, levels="normal")), "normal levels are integers of 8 bits"),
    ],
)
def test_what_it_cannot_do_is_said(formats: tuple[Grid, Grid], reason: str) -> None:
    with engines.use_engine("fp8"), pytest.raises(DitqError, match=reason):
        engines.choose(*formats, CPU)


def test_cards_without_the_instruction_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(fp8.Fp8Engine, "prove", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with (
        engines.use_engine("fp8"),
        pytest.raises(DitqError, match="capability 8.0; products of 8-bit floats need 8.9"),
    ):
        engines.choose(weight_format(8), token_format(), CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    engines.registry.forget()
    assert engines.choose(weight_format(8), token_format(), CUDA, "fp8") is ENGINE


@pytest.mark.parametrize(("m", "k", "n"), [(32, 64, 48), (5, 64, 48), (0, 64, 48)])
def test_what_the_card_is_given_has_the_layout_that_it_wants(m: int, k: int, n: int) -> None:
    """Shapes, strides and types of the product are checked by torch without a card, too."""
    with FakeTensorMode():
        x, w = (torch.empty(r, k, device=CUDA, dtype=fp8.KIND) for r in (m, n))
        x_scale, w_scale = (torch.empty(r, 1, device=CUDA) for r in (m, n))
        y = fp8.scaled_product(x, w, x_scale, w_scale)
    assert (y.shape, y.dtype, y.device.type) == ((m, n), torch.bfloat16, "cuda")


def test_torch_compile_traces_a_layer_once_without_a_break() -> None:
    quantized, x = layer(8), torch.randn(9, 96)
    with engines.use_engine("fp8"), torch.no_grad():
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_wrong_products_are_seen_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.difference(CPU) is None
    plain, calls = fp8.scaled_product, []

    def broken(*operands: Tensor) -> Tensor:
        """As if the card took the scales of one row for all, in the second size."""
        calls.append(operands)
        if len(calls) == 4:
            operands = (*operands[:2], operands[2][:1].expand_as(operands[2]), operands[3])
        return plain(*operands)

    monkeypatch.setattr(fp8, "scaled_product", broken)
    assert str(fp8.difference(CPU)).startswith("torch._scaled_mm of 5 x 75 x 43: outputs are off by ")


@pytest.mark.gpu
def test_products_on_a_card_are_proved() -> None:
    assert ENGINE.prove(CUDA) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "k"), [(8, 96), (4, 96), (8, 72)])
def test_a_card_agrees_with_the_cpu(bits: int, k: int, dtype: torch.dtype) -> None:
    quantized, x = layer(bits, k=k).to(dtype), torch.randn(300, k, dtype=dtype)
    with engines.use_engine("fp8"), torch.no_grad():
        expected, y = quantized(x).float(), quantized.to(CUDA)(x.to(CUDA)).float().cpu()
    assert (y - expected).norm() / expected.norm() < 5e-3
