"""Normal levels in OpenVINO: kernels, constants and reasons. Nothing is compiled, so any CPU runs these tests."""

from __future__ import annotations

import pytest
import torch
from helpers import full_weights, layer_plan, normal_weights, token_format, weight_format
from torch import nn

from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, normal_levels, unpack
from ditq.openvino.linear import LinearSpec, dequantized, emulate, why_inexact

STATIC = Grid(bits=8, granularity="tensor")
WEIGHTS = {
    "channel": normal_weights(4),
    "tensor": normal_weights(3, granularity="tensor"),
    "groups": normal_weights(4, granularity="group", group=32),
}
INPUTS = {"float": None, "token": token_format(), "token-asym": token_format(symmetric=False), "static": STATIC}


def spec(weight: Grid, activation: Grid | None) -> LinearSpec:
    plan = layer_plan(k=64, n=24, weight=weight, activation=activation)
    static = torch.tensor(0.03) if activation is not None and not activation.dynamic else None
    layer = QuantizedLinear.from_linear(nn.Linear(64, 24), plan, input_scale=static)
    return LinearSpec("layer", layer.quantized_weight, layer.bias, activation, input_scale=static)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_take_eight_bits_in_every_kernel(weights: str, inputs: str) -> None:
    linear = spec(WEIGHTS[weights], INPUTS[inputs])
    expected = {"float": "u8"}.get(inputs, "i8")
    assert linear.kernel.storage == expected
    if inputs == "token" and weights == "channel":  # four uniform bits stay four
        assert linear.kernel.activations == "graph"
        assert spec(weight_format(4, symmetric=True), token_format()).kernel.storage == "i4"


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_constants_of_a_graph_are_the_levels(weights: str, inputs: str) -> None:
    pytest.importorskip("openvino")
    import openvino as ov
    import openvino.opset13 as op

    from ditq.openvino.graph import Builder

    linear = spec(WEIGHTS[weights], INPUTS[inputs])
    codes = unpack(linear.weight.packed, linear.weight.format, 64)
    assert set(codes.unique().tolist()) <= set(normal_levels(linear.weight.format.bits))
    node = op.parameter([-1, -1, 64], ov.Type.f32).output(0)
    constants, nodes = [], [Builder().linear(node, linear)]
    while nodes:
        current = nodes.pop()
        current = current.get_node() if hasattr(current, "get_node") else current
        if current.get_type_name() == "Constant" and current.get_element_type().size == 1:
            constants.append(torch.from_numpy(current.data.copy()).to(torch.int16).reshape(-1))
        nodes += [current.input_value(i) for i in range(current.get_input_size())]
    offset = 128 if linear.kernel.storage == "u8" else 0
    assert any(
        len(found) == codes.numel() and torch.equal(found, codes.flatten().to(torch.int16) + offset)
        for found in constants
    )


def test_emulation_multiplies_the_values_of_the_levels() -> None:
    linear = spec(WEIGHTS["channel"], token_format())
    x = torch.randn(3, 5, 64)
    y = emulate(x, linear, 0)
    assert linear.bias is not None
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / scale).round() * scale).double() @ dequantized(linear).double().T + linear.bias.double()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [WEIGHTS["channel"], WEIGHTS["groups"], weight_format(8)])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_inputs_with_normal_levels_are_refused(weights: Grid, granularity: str) -> None:
    reason = why_inexact(spec(weights, token_format(4, granularity, levels="normal")))
    assert reason is not None and "evenly spaced codes, not to normal levels" in reason
    assert why_inexact(spec(WEIGHTS["channel"], token_format(4))) is None


@pytest.mark.parametrize("inputs", INPUTS)
def test_full_grids_are_refused(inputs: str) -> None:
    assert "may be negative" in str(why_inexact(spec(full_weights(), INPUTS[inputs])))
