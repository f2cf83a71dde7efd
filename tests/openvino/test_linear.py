"""The OpenVINO engine: graphs of single linears against their emulation, and the probe of integer execution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import layer_plan, token_format, weight_format
from torch import Tensor, nn

from ditq import engines
from ditq.errors import DitqError, UsageError
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, Rotation, RotationKind, hadamard_matrix, is_supported, relative_error, rotate
from ditq.numerics.hadamard import REGULAR
from ditq.openvino import runtime
from ditq.plan import Rotate, Smooth

if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import openvino as ov
import openvino.opset13 as op

from ditq.openvino import graph, probe
from ditq.openvino.graph import Builder, split, unrounded
from ditq.openvino.linear import Activations, Kernel, LinearSpec, balance, emulate, why_inexact
from ditq.openvino.settings import compile_config, group_size, why_float

CPU = torch.device("cpu")
TOKEN = token_format()


def linear(
    k: int = 64,
    n: int = 40,
    *,
    weight: Grid | None = None,
    activation: Grid | None = TOKEN,
    smooth: bool = False,
    rotate: int | None = None,
    kind: RotationKind = "hadamard",
    bias: bool = True,
) -> QuantizedLinear:
    """A quantized linear of random weights; ``rotate`` is the block of its Hadamard rotation."""
    static = activation is not None and not activation.dynamic
    rotation = Rotate(kind=kind, block=rotate, seed=0 if kind == "regular" else 3) if rotate else None
    plan = layer_plan(
        k=k, n=n, weight=weight or weight_format(), activation=activation, bias=bias,
        smooth=Smooth(alpha=0.5) if smooth else None, rotate=rotation,
    )  # fmt: skip
    torch.manual_seed(k + n)
    scale = torch.rand(k) + 0.5 if smooth else None
    return QuantizedLinear.from_linear(
        nn.Linear(k, n, bias=bias), plan, smooth_scale=scale, input_scale=torch.tensor(0.07) if static else None
    )


def spec(layer: QuantizedLinear) -> LinearSpec:
    return LinearSpec(
        "layer", layer.quantized_weight, layer.bias, layer.plan.activation, layer._buffers.get("smooth_scale"),
        layer.rotation, layer._buffers.get("input_scale"),
    )  # fmt: skip


def run(spec: LinearSpec, x: Tensor, group: int) -> Tensor:
    """``x`` [B, tokens, K] through one layer compiled by OpenVINO."""
    node = op.parameter([-1] * x.ndim, ov.Type.f32)
    node.set_partial_shape(ov.PartialShape([-1] * (x.ndim - 1) + [x.shape[-1]]))
    node.validate_and_infer_types()
    model = ov.Model([op.result(Builder().linear(node.output(0), spec))], [node], "layer")
    return torch.from_numpy(probe.core().compile_model(model, "CPU", compile_config(group))([x.numpy()])[0])


def inputs(*shape: int) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[..., 5] *= 20  # a channel of outliers, which makes rounding coarse
    return x


# -------------------------------------------------------------------------- graphs against emulation

FORMATS = {
    **{f"w{bits}-asym": weight_format(bits) for bits in range(2, 9)},
    **{f"w{bits}-sym": weight_format(bits, symmetric=True) for bits in range(2, 9)},
    "w4-tensor": weight_format(4, "tensor"),
    "w8-tensor-sym": weight_format(8, "tensor", symmetric=True),
    "w4-group16": weight_format(4, "group", group=16),
    "w4-group32-sym": weight_format(4, "group", symmetric=True, group=32),
    "w3-group32": weight_format(3, "group", group=32),
    "w8-group32": weight_format(8, "group", group=32),
    "w6-group64": weight_format(6, "group", group=64),
}  # fmt: skip
STATIC = Grid(bits=8, granularity="tensor")
ACTIVATIONS = {
    "a8": TOKEN,
    "a8-asym": token_format(symmetric=False),
    "a6": token_format(6),
    "a3-asym": token_format(3, symmetric=False),
    "a8-tensor": Grid(bits=8, granularity="tensor", dynamic=True),
    "a8-static": STATIC,
    "a5-static": Grid(bits=5, granularity="tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_integers_of_every_format_are_multiplied_as_they_are(name: str) -> None:
    layer = spec(linear(272 if FORMATS[name].group_size is None else 256, weight=FORMATS[name]))
    width = group_size([layer])
    x = inputs(2, 19, layer.weight.columns)
    y = run(layer, x, width)
    by_plugin = layer.weight.format.bits <= 4 or layer.weight_group is not None
    assert layer.kernel.activations == ("plugin" if by_plugin else "graph")
    assert width == (min(FORMATS[name].group_size or 128, 128) if by_plugin else 0)
    assert relative_error(emulate(x, layer, width), y) < 1e-4
    assert relative_error(emulate(x, layer, width, rounded=False), y) > 2e-3


@pytest.mark.parametrize("bits", ["w8-asym", "w8-sym", "w4-asym", "w6-sym"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_every_format_are_rounded_as_planned(name: str, bits: str) -> None:
    layer = linear(72, weight=FORMATS[bits], activation=ACTIVATIONS[name])
    x = inputs(2, 19, 72)
    width = group_size([spec(layer)])
    y = run(spec(layer), x, width)
    assert relative_error(emulate(x, spec(layer), width), y) < 1e-4
    if name != "a8-tensor":  # which is executed with a scale for each token
        # One code that falls on the other side is all that may differ, or all where the plugin has narrower groups.
        assert relative_error(layer(x), y) < (1e-4 if spec(layer).kernel.activations == "graph" else 2e-2)


def test_codes_are_those_of_the_torch_engine() -> None:
    """No code may differ but by a tie, which these inputs have not; sums of integers are exact."""
    layer = linear(144, weight=weight_format(8))
    x = inputs(3, 40, 144)
    assert relative_error(layer(x), run(spec(layer), x, 0)) < 1e-6


@pytest.mark.parametrize("activation", ["a8", "a8-asym", "a8-static"])
@pytest.mark.parametrize("weight", ["w8-asym", "w8-sym"])
def test_a_graph_without_rounding_is_the_float_product(weight: str, activation: str) -> None:
    layer = spec(linear(weight=FORMATS[weight], activation=ACTIVATIONS[activation]))
    x = inputs(2, 19, 64)
    node = op.parameter([-1, -1, 64], ov.Type.f32)
    model = unrounded(ov.Model([op.result(Builder().linear(node.output(0), layer))], [node], "layer"))
    y = torch.from_numpy(probe.core().compile_model(model, "CPU", compile_config(0))([x.numpy()])[0])
    assert relative_error(emulate(x, layer, 0, rounded=False), y) < 1e-5


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("smooth", [True, False], ids=["smooth", "plain"])
@pytest.mark.parametrize(("k", "block"), [(64, None), (64, 64), (64, 16), (96, 96), (96, 32), (144, 72), (48, 16)])
def test_balance_is_that_of_the_layer(k: int, block: int | None, smooth: bool, bias: bool) -> None:
    """With 16-bit activations, so that no rounding hides a wrong sign or a permuted channel."""
    kind: RotationKind = "regular" if k == 48 else "hadamard"
    layer = linear(k, weight=weight_format(8), activation=None, smooth=smooth, rotate=block, kind=kind, bias=bias)
    x = inputs(2, 7, k)
    y = run(spec(layer), x, 0)
    assert relative_error(layer(x), y) < 2e-6
    assert relative_error(layer(x.flatten(0, 1)), run(spec(layer), x.flatten(0, 1), 0)) < 2e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_rotated_and_smoothed_layers_multiply_integers_too(bits: int) -> None:
    layer = spec(linear(144, weight=weight_format(bits), smooth=True, rotate=144))
    x = inputs(2, 50, 144)
    width = group_size([layer])
    y = run(layer, x, width)
    # The rotation rounds differently, so a few codes flip; 8-bit activations cost 40 times as much.
    assert relative_error(emulate(x, layer, width), y) < 2e-4
    assert relative_error(emulate(x, layer, width, rounded=False), y) > 2e-3


@pytest.mark.parametrize("name", ["w8-asym", "w4-asym", "w4-group16", "w8-sym"])
def test_agrees_with_the_torch_engine_where_one_scale_serves_a_whole_token(name: str) -> None:
    layer = linear(weight=FORMATS[name], activation=token_format())
    x = inputs(3, 40, 64)
    assert relative_error(layer(x), emulate(x, spec(layer), 64)) < 1e-4


def test_narrower_groups_than_planned_are_more_exact() -> None:
    layer = spec(linear(256, weight=weight_format(4)))
    x = inputs(2, 40, 256)
    exact = emulate(x, layer, 0, rounded=False)
    errors = [relative_error(exact, run(layer, x, group)) for group in (64, 256)]
    assert errors[0] < 0.8 * errors[1]


def test_a_ragged_last_group_is_a_group() -> None:
    layer = spec(linear(160, weight=weight_format(4)))
    x = inputs(2, 9, 160)
    assert relative_error(emulate(x, layer, 64), run(layer, x, 64)) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 257])
def test_a_token_does_not_depend_on_its_batch(tokens: int, bits: int) -> None:
    layer = spec(linear(weight=weight_format(bits)))
    x = inputs(2, tokens, 64)
    assert torch.equal(run(layer, x, 64)[1:, -1:], run(layer, x[1:, -1:].contiguous(), 64))


@pytest.mark.parametrize("name", ["a8", "a8-asym", "a8-static"])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_give_the_bias(bits: int, name: str) -> None:
    layer = spec(linear(weight=weight_format(bits), activation=ACTIVATIONS[name]))
    y = run(layer, torch.zeros(1, 3, 64), group_size([layer]))
    torch.testing.assert_close(y, layer.bias.detach().expand_as(y), rtol=0, atol=1e-5 if name == "a8-static" else 0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_of_any_size(size: float) -> None:
    layer = spec(linear(bias=False))
    x = inputs(1, 5, 64)
    x[0, 2] *= size
    y = run(layer, x, 0)
    for row in range(5):
        assert relative_error(emulate(x, layer, 0)[:, row], y[:, row]) < 1e-5


def test_weights_outlive_the_tensors_they_were_made_of() -> None:
    layer = spec(linear())
    x = inputs(1, 5, 64)
    expected = emulate(x, layer, 64)
    node = op.parameter([-1, -1, 64], ov.Type.f32)
    model = ov.Model([op.result(Builder().linear(node.output(0), layer))], [node], "layer")
    for tensor in (layer.weight.packed, layer.weight.scale, layer.weight.zero_point, layer.bias.data):
        tensor.zero_()
    y = probe.core().compile_model(model, "CPU", compile_config(64))([x.numpy()])[0]
    assert relative_error(expected, torch.from_numpy(y)) < 1e-4


def test_inputs_shared_by_layers_are_balanced_once() -> None:
    layers = [spec(linear(n=n, smooth=True, rotate=64)) for n in (8, 8, 24)]
    layers[2].smooth.add_(0.1)
    node = op.parameter([-1, -1, 64], ov.Type.f32)
    builder = Builder()
    first, second, other = (builder.balance(node.output(0), layer) for layer in layers)
    assert first is second
    assert first is not other


@pytest.mark.parametrize("order", [n for n in [*range(1, 200), 256, 1024, 1152, 4608] if is_supported(n)])
def test_split_of_a_hadamard_matrix(order: int) -> None:
    outer, inner = split(order)
    assert torch.equal(torch.kron(hadamard_matrix(outer), hadamard_matrix(inner)), hadamard_matrix(order))


@pytest.mark.parametrize("order", REGULAR)
def test_split_of_a_regular_matrix(order: int) -> None:
    outer, inner = split(order, "regular")
    both = [hadamard_matrix(n, "regular") if n > 1 else torch.ones(1, 1) for n in (outer, inner)]
    assert torch.equal(torch.kron(*both), hadamard_matrix(order, "regular"))


def test_split_has_the_fewest_operations() -> None:
    assert {n: split(n) for n in (256, 1024, 1152, 4608)} == {
        256: (16, 16), 1024: (32, 32), 1152: (36, 32), 4608: (72, 64)
    }  # fmt: skip


def test_emulation_balances_as_numerics_do() -> None:
    layer = spec(linear(smooth=True, rotate=32))
    x = inputs(3, 64)
    expected = rotate(x / layer.smooth, Rotation(64, 32, 3))
    assert relative_error(expected, balance(x, layer)) < 1e-6


# --------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("storage", ["i8", "u8", "i4", "u4"])
@pytest.mark.parametrize(
    ("k", "n", "group", "width"), [(64, 32, None, 64), (273, 70, None, 256), (256, 8, 128, 64), (128, 2, 64, 64)]
)
def test_probe_finds_integers_that_the_plugin_rounds(
    storage: Any, k: int, n: int, group: int | None, width: int
) -> None:
    assert probe.execution(Kernel(k, n, storage, group, "plugin"), width) == "int8"
    assert probe.execution(Kernel(k, n, storage, group, "plugin"), width, "bf16") == "int8"


@pytest.mark.parametrize("storage", ["i8", "u8"])
@pytest.mark.parametrize(("k", "n"), [(64, 32), (273, 70), (4608, 16), (5, 8), (64, 1)])
def test_probe_finds_integers_that_the_graph_rounds(storage: Any, k: int, n: int) -> None:
    assert probe.execution(Kernel(k, n, storage), 0) == "int8"
    assert probe.execution(Kernel(k, n, storage), 128, "bf16") == "int8"


@pytest.mark.parametrize(
    ("kernel", "width"),
    [
        (Kernel(64, 32, "i8", None, "plugin"), 0),
        (Kernel(64, 32, "i8", None, "plugin"), 128),
        (Kernel(72, 32, "u4", None, "plugin"), 72),
        (Kernel(64, 1, "i8", None, "plugin"), 64),
        (Kernel(64, 32, "u4", 32, "plugin"), 64),
        (Kernel(64, 32, "u8", 32, "plugin"), 48),
        (Kernel(64, 32, "u8", None, "float"), 64),
        (Kernel(64, 32, "u4", None, "float"), 64),
    ],
    ids=str,
)
def test_probe_finds_floats(kernel: Kernel, width: int) -> None:
    assert probe.execution(kernel, width) == "float"


def test_probe_finds_a_graph_whose_codes_are_multiplied_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same to the last digit; only the operands tell."""
    in_floats = lambda values, bottom: op.round(op.subtract(values, np.float32(bottom))).output(0)  # noqa: E731
    monkeypatch.setattr(graph, "_to_u8", in_floats)
    assert probe.execution(Kernel(64, 48, "i8"), 0) == "float"


@pytest.mark.parametrize("how", ["plugin", "graph"])
def test_probe_reports_a_wrong_result(how: Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Builder.linear
    monkeypatch.setattr(Builder, "linear", lambda self, x, spec: op.multiply(linear(self, x, spec), np.float32(1.1)))
    with pytest.raises(DitqError, match=r"computes a linear layer \(64 -> 16, i8 weights by channels\) wrongly"):
        probe.execution(Kernel(64, 16, "i8", None, how), 64)


# ------------------------------------------------------------------------------- settings and engine


def test_group_size_is_the_widest_that_suits_all() -> None:
    def width(*layers: QuantizedLinear) -> int:
        return group_size([spec(layer) for layer in layers])

    def four(k: int, group: int | None = None, **options: Any) -> QuantizedLinear:
        return linear(k, weight=weight_format(4, "group" if group else "channel", group=group), **options)

    by_groups = token_format(granularity="group", group=96)
    assert width(four(256)) == 128
    assert width(four(256), four(96)) == 96
    assert width(four(72)) == 64
    assert width(four(8)) == 0  # such a layer has 8-bit weights in the graph
    assert width(four(256), four(8)) == 128
    assert width(four(256), four(256, 64)) == 64
    assert width(four(256), linear(192, activation=by_groups)) == 96
    assert width(linear(192, activation=by_groups), four(256, 64)) == 32
    assert width(linear(256, weight=weight_format(8))) == 0
    assert width(linear(256, activation=None)) == 0


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (linear(8, activation=token_format(granularity="group", group=8)), 16, "8 input channels are fewer than 16"),
        (linear(64, 1, weight=weight_format(4, "group", group=16)), 16, "a single output"),
        (linear(64, weight=weight_format(4)), 128, "groups of 128 are wider than its 64"),
        (linear(64, weight=weight_format(4, "group", group=8)), 16, "weight groups of 8 are not a multiple"),
        (linear(64, activation=token_format(granularity="group", group=8)), 16, "activation groups of 8"),
    ],
)
def test_shapes_that_rule_integers_out(layer: QuantizedLinear, width: int, message: str) -> None:
    assert message in (why_float(spec(layer), width) or "")


def test_shapes_that_multiply_integers() -> None:
    assert why_float(spec(linear(64, weight=weight_format(4))), 64) is None
    for k, n in ((8, 40), (64, 1), (72, 40)):
        for bits in (4, 8):
            assert why_float(spec(linear(k, n, weight=weight_format(bits))), 64) is None


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (weight_format(4, "group", group=16), STATIC, "not by static scales"),
        (weight_format(4, "group", group=16), token_format(4), "to 8 bits, not to 4"),
        (weight_format(8), token_format(4, granularity="group", group=16), "to 8 bits, not to 4"),
        (weight_format(4, "group", group=16), token_format(symmetric=False), "without zero points"),
    ],
)
def test_formats_that_cannot_be_executed_exactly(weight: Grid, activation: Grid, message: str) -> None:
    assert message in (why_inexact(spec(linear(weight=weight, activation=activation))) or "")


def test_formats_that_can() -> None:
    for activation in (None, *ACTIVATIONS.values(), token_format(granularity="group", group=32)):
        for bits in (4, 8):
            assert why_inexact(spec(linear(weight=weight_format(bits), activation=activation))) is None
    assert why_inexact(spec(linear(weight=weight_format(4, "group", group=16)))) is None


def test_properties_keep_openvino_names_but_not_the_group_size() -> None:
    config = compile_config(64, {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "bf16"})
    assert config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "64"
    assert (config["INFERENCE_NUM_THREADS"], config["INFERENCE_PRECISION_HINT"]) == ("2", "bf16")
    assert compile_config(64)["INFERENCE_PRECISION_HINT"] == "f32"
    with pytest.raises(UsageError, match="follows from the plan"):
        compile_config(64, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"})


def test_is_no_engine_for_single_linears() -> None:
    assert "openvino" not in engines.engines()
    assert engines.choose(weight_format(8), token_format(), CPU).name == "torch"
    with pytest.raises(UsageError, match="Unknown engine 'openvino'"), engines.use_engine("openvino"):
        pass
