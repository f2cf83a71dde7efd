"""QuantizedLinear: exact balancing, independent tokens, casts, memory, and what it shows of itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import layer_plan, normal_weights, token_format, weight_format
from torch import nn
from torch.nn import functional as F

from ditq.engines.torch import ENGINE
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, codebook, fake_quantize, packed_bytes, sqnr_db
from ditq.plan import LayerPlan, Rotate, Smooth

K, N = 96, 40
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"smooth": Smooth(alpha=0.5)},
    "rotate": {"rotate": Rotate(block=96, seed=3)},
    "rotate-block32": {"rotate": Rotate(block=32)},
    "smooth-rotate": {"smooth": Smooth(alpha=0.5), "rotate": Rotate(block=96)},
    "folded": {"smooth": Smooth(alpha=0.5, folded="norm")},
    "static": {"activation": Grid(bits=8, granularity="tensor")},
    "groups": {
        "weight": weight_format(4, "group", group=48),
        "activation": token_format(8, "group", symmetric=False, group=32),
    },
    "weight-only": {"activation": None},
    "3bit": {"weight": weight_format(3, symmetric=True), "bias": False},
    "normal": {"weight": normal_weights(), "rotate": Rotate(block=32)},
    "normal-groups": {"weight": normal_weights(3, "group", group=48)},
}
NORMAL_INPUTS = {
    "normal": token_format(4, levels="normal"), "normal-groups": token_format(6, "group", group=32, levels="normal")
}  # fmt: skip


def plan_of(case: str, **fields: Any) -> LayerPlan:
    return layer_plan("layer", K, N, **{**PLANS[case], **fields})


def smooth_scale() -> torch.Tensor:
    return torch.logspace(-0.3, 0.3, K)[torch.randperm(K, generator=torch.Generator().manual_seed(2))]


def inputs(*shape: int) -> torch.Tensor:
    """Inputs with the imbalance that ``smooth_scale`` takes out."""
    return torch.randn(*shape, K) * smooth_scale()


def make(case: str, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[nn.Linear, QuantizedLinear]:
    plan = plan_of(case, **fields)
    linear = nn.Linear(K, N, bias=plan.bias).to(dtype)
    layer = QuantizedLinear.from_linear(
        linear,
        plan,
        smooth_scale=smooth_scale() if plan.smooth else None,
        input_scale=torch.tensor(8.0 / 127) if case == "static" else None,
    )
    return linear, layer


@pytest.fixture(params=PLANS)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------------------------------- exactness


def test_balance_cancels_between_input_and_weight(case: str) -> None:
    """With activations left alone, (x / s R)(Q R^T s)^T is x times the weight the layer shows."""
    _, layer = make(case)
    x = torch.randn(50, K)
    inner = layer.balance(x).double() @ ENGINE.dequantize_weight(layer.quantized_weight).double().T
    shown = x.double() @ layer.weight.double().T
    assert float((inner - shown).norm() / shown.norm()) < 1e-5


@pytest.mark.parametrize("case", ["normal", "normal-groups", "groups", "3bit"])
def test_forward_is_the_product_of_the_rounded_values(case: str) -> None:
    """The integer products equal those of the dequantized integers in float64."""
    _, layer = make(case, **({"activation": NORMAL_INPUTS[case]} if case in NORMAL_INPUTS else {}))
    x, fmt = inputs(50), layer.plan.activation
    assert fmt is not None
    rounded = fake_quantize(layer.balance(x), fmt).double()
    expected = rounded @ ENGINE.dequantize_weight(layer.quantized_weight).double().T
    expected = expected if layer.bias is None else expected + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["normal", "normal-groups"])
def test_normal_levels_compile_before_the_first_call(case: str) -> None:
    _, source = make(case, activation=NORMAL_INPUTS[case])
    layer = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    torch._dynamo.reset()
    layer.load_state_dict(source.state_dict())
    codebook._tensors.clear()
    layer.warm()
    x = inputs(7)
    with torch.no_grad():
        found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(found, source(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "smooth", "rotate", "smooth-rotate"])
def test_weight_is_the_linear_up_to_rounding(case: str) -> None:
    linear, layer = make(case, weight=weight_format(8))
    assert sqnr_db(linear.weight, layer.weight) > 36
    assert torch.equal(layer.bias, linear.bias)


def test_smoothed_weight_is_within_half_a_step() -> None:
    linear = nn.Linear(K, N)
    s = smooth_scale()
    layer = QuantizedLinear.from_linear(linear, plan_of("smooth"), smooth_scale=s)
    step = layer.weight_scale / s
    assert bool(((layer.weight - linear.weight).abs() <= 0.501 * step).all())


def test_folded_layer_shows_the_weight_of_the_divided_input() -> None:
    linear = nn.Linear(K, N)
    s = smooth_scale()
    layer = QuantizedLinear.from_linear(linear, plan_of("folded", weight=weight_format(8)), smooth_scale=s)
    assert sqnr_db(linear.weight * s, layer.weight) > 35
    assert "smooth_scale" not in dict(layer.named_buffers())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_sqnr_grows_six_db_a_bit(bits: int) -> None:
    linear, layer = make("plain", weight=weight_format(bits), activation=token_format(8))
    x = torch.randn(64, K)
    # Uniform weights: 6.02 dB a bit; 8-bit activations limit at about 43 dB.
    assert sqnr_db(linear(x), layer(x)) > min(6.02 * bits - 3, 37)


def test_forward_is_the_shown_weight_times_rounded_inputs(case: str) -> None:
    _, layer = make(case)
    x = inputs(2, 9)
    expected = F.linear(x, layer.weight, layer.bias)
    assert layer(x).shape == (2, 9, N)
    assert sqnr_db(expected, layer(x)) > 33


def test_planted_outlier_is_gone_after_rotation() -> None:
    x = torch.randn(64, K)
    x[:, 5] *= 60
    error = {}
    for case in ("plain", "rotate"):
        linear, layer = make(case, weight=weight_format(8), activation=token_format(4))
        error[case] = sqnr_db(linear(x), layer(x))
    assert error["rotate"] > error["plain"] + 3


def test_mse_clipping_lowers_the_weight_error() -> None:
    linear = nn.Linear(K, N)
    linear.requires_grad_(False)
    linear.weight[:, 0] *= 4
    errors = [
        float((QuantizedLinear.from_linear(linear, plan_of("plain", clip=clip)).weight - linear.weight).square().sum())
        for clip in ("minmax", "mse")
    ]
    assert errors[1] < errors[0]


# -------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("case", [case for case in PLANS if case != "weight-only"])  # whose products are floats
def test_a_token_does_not_depend_on_its_batch(case: str) -> None:
    _, layer = make(case)
    x = torch.randn(33, K)
    together = layer(x)
    for i in (0, 7, 32):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])
    assert torch.equal(layer(x[5:20]), together[5:20])


@pytest.mark.parametrize("k", [256, 384, 1152, 1536])
def test_a_rotated_token_does_not_depend_on_its_batch(k: int) -> None:
    block = k if k != 1152 else 128
    plan = layer_plan("layer", k, 16, rotate=Rotate(block=block), activation=token_format(4))
    layer = QuantizedLinear.from_linear(nn.Linear(k, 16), plan)
    x = torch.randn(77, k)
    together = layer(x)
    for i in (0, 31, 76):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])


def test_two_runs_are_bit_identical(case: str) -> None:
    torch.manual_seed(1)
    _, first = make(case)
    torch.manual_seed(1)
    _, second = make(case)
    x = torch.randn(17, K)
    assert torch.equal(first(x), first(x))
    assert torch.equal(first(x), second(x))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_rotation_seed_changes_the_integers_not_the_weight() -> None:
    linear = nn.Linear(K, N)
    a, b = (
        QuantizedLinear.from_linear(linear, plan_of("rotate", rotate=Rotate(block=96, seed=seed))) for seed in (0, 1)
    )
    assert not torch.equal(a.qweight, b.qweight)
    assert sqnr_db(a.weight, b.weight) > 15


# ----------------------------------------------------------------------------------- casts and copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_keeps_scales_in_float32(case: str, dtype: torch.dtype) -> None:
    _, layer = make(case)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer = layer.half() if dtype == torch.float16 else layer.to(dtype)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert layer.dtype == dtype
    assert layer.weight.dtype == dtype
    assert layer.bias is None or layer.bias.dtype == dtype
    x = torch.randn(3, K, dtype=dtype)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("case", [case for case in PLANS if case != "weight-only"])  # which rounds its weight
def test_casting_there_and_back_changes_no_integer(case: str) -> None:
    _, layer = make(case, torch.bfloat16)
    x = torch.randn(5, K)
    before = layer(x)
    assert torch.equal(layer.float()(x), before)


def test_tiny_fp16_weights_keep_their_precision() -> None:
    linear = nn.Linear(K, N, bias=False)
    with torch.no_grad():
        linear.weight.mul_(1e-4)
    layer = QuantizedLinear.from_linear(linear, plan_of("plain", bias=False, weight=weight_format(8))).half()
    x = 1e3 * torch.randn(8, K)
    assert sqnr_db(linear(x), layer(x)) > 35


def test_move_to_meta_moves_all(case: str) -> None:
    _, layer = make(case)
    layer.to("meta")
    assert {t.device.type for t in [*layer.buffers(), *layer.parameters()]} == {"meta"}
    assert layer.weight_scale.dtype == torch.float32


def test_deepcopy_is_independent(case: str) -> None:
    _, layer = make(case)
    x = torch.randn(4, K)
    twin = copy.deepcopy(layer)
    before = twin(x)
    assert torch.equal(layer(x), before)
    layer.weight_scale.mul_(2)
    assert torch.equal(twin(x), before)


def test_state_dict_round_trip_is_bit_identical(case: str) -> None:
    _, layer = make(case)
    empty = QuantizedLinear(layer.plan)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(4, K)
    assert torch.equal(empty(x), layer(x))


# --------------------------------------------------------------------------------- what it holds, shows


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_weight_takes_b_bits(bits: int) -> None:
    _, layer = make("plain", weight=weight_format(bits))
    assert layer.qweight.dtype == torch.uint8
    assert layer.qweight.shape == (N, packed_bytes(K, bits))
    assert layer.qweight.numel() == N * K * bits // 8


def test_buffers_are_those_the_plan_says(case: str) -> None:
    _, layer = make(case)
    held = {n: (tuple(b.shape), str(b.dtype).removeprefix("torch.")) for n, b in layer.named_buffers()}
    assert held == {name: (stored.shape, stored.dtype) for name, stored in layer.plan.tensors().items()}
    parameters = [] if case == "3bit" else ["bias"]
    assert [name for name, _ in layer.named_parameters()] == parameters


def test_bytes_are_those_the_plan_counts(case: str) -> None:
    _, layer = make(case, torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in [*layer.buffers(), *layer.parameters()])
    assert held == layer.plan.stored_bytes()


def test_repr_names_formats_and_balance() -> None:
    _, layer = make("smooth-rotate")
    text = repr(layer)
    for part in ("in_features=96", "out_features=40", "int4 asym/channel", "int8 sym/token, dynamic", "hadamard 96"):
        assert part in text
    assert "activation=16 bit" in repr(make("weight-only")[1])


def test_is_a_linear_without_a_weight_parameter(case: str) -> None:
    _, layer = make(case)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (N, K)
    assert "weight" not in dict(layer.named_parameters())


def test_weight_only_multiplies_in_the_input_dtype() -> None:
    _, layer = make("weight-only", torch.bfloat16)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    wide = layer(x.float())
    assert wide.dtype == torch.float32


def test_dequantize_gives_a_plain_linear(case: str) -> None:
    _, layer = make(case)
    linear = layer.dequantize()
    assert type(linear) is nn.Linear
    x = inputs(5)
    assert torch.equal(linear.weight, layer.weight)
    assert sqnr_db(linear(x), layer(x)) > 33


def test_empty_batch(case: str) -> None:
    _, layer = make(case)
    assert layer(torch.empty(0, 7, K)).shape == (0, 7, N)


def test_gradients_do_not_break_the_forward() -> None:
    _, layer = make("plain")
    assert layer(torch.randn(3, K, requires_grad=True)).shape == (3, N)


# --------------------------------------------------------------------------------------------- errors


def test_plan_of_16_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="'layer' stays in 16 bit"):
        QuantizedLinear(layer_plan(weight=None, activation=None))


def test_static_activations_without_a_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="'layer'.*input_scale"):
        QuantizedLinear.from_linear(nn.Linear(K, N), plan_of("static"))


def test_online_smoothing_without_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'layer'.*smooth_scale"):
        QuantizedLinear.from_linear(nn.Linear(K, N), plan_of("smooth"))
