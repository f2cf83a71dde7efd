"""Layers with a branch in OpenVINO graphs. The float products of a graph run on any CPU, without integers too."""

from __future__ import annotations

import pytest
import torch
from helpers import layer_plan, tiny_model, token_format, weight_format
from torch import Tensor, nn

import ditq
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, relative_error
from ditq.openvino.convert import linear_spec
from ditq.openvino.graph import Builder
from ditq.openvino.linear import LinearSpec, emulate
from ditq.openvino.segment import _digest
from ditq.plan import Rotate, Smooth

ov = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")


def layer(activation: Grid | None, *, bias: bool = True, rank: int = 5) -> QuantizedLinear:
    """Smoothed and rotated, with a branch as large as the product of the integers."""
    torch.manual_seed(3)
    plan = layer_plan(
        k=64, n=40, weight=weight_format(8), activation=activation, bias=bias, smooth=Smooth(alpha=0.5),
        rotate=Rotate(kind="regular", block=16),
    )  # fmt: skip
    made = QuantizedLinear.from_linear(nn.Linear(64, 40, bias=bias), plan, smooth_scale=torch.rand(64) + 0.5)
    made.add_branch(torch.randn(rank, 64), torch.randn(40, rank) / 20, "bfloat16")
    return made


def run(spec: LinearSpec, x: Tensor) -> Tensor:
    node = op.parameter([-1] * (x.ndim - 1) + [x.shape[-1]], ov.Type.f32)
    model = ov.Model([op.result(Builder().linear(node.output(0), spec))], [node], "layer")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0])


@pytest.mark.parametrize("bias", [True, False])
def test_graph_adds_the_product_of_the_raw_input(bias: bool) -> None:
    made = layer(None, bias=bias)
    spec = linear_spec("layer", made)
    x = torch.randn(2, 7, 64)
    assert relative_error(made(x), emulate(x, spec, 0)) < 1e-5
    assert relative_error(made(x), run(spec, x)) < 1e-5
    without = run(LinearSpec(spec.name, spec.weight, spec.bias, None, spec.smooth, spec.rotation), x)
    assert relative_error(made(x), without) > 0.3


def test_emulation_of_rounded_inputs_has_the_branch() -> None:
    made = layer(token_format())
    x = torch.randn(2, 7, 64)
    assert relative_error(made(x), emulate(x, linear_spec("layer", made), 0)) < 1e-4


def test_layers_with_different_branches_are_no_twins() -> None:
    first, second = layer(None), layer(None)
    assert _digest(linear_spec("a", first)) == _digest(linear_spec("b", second))
    second.branch_up[3, 2] += 1
    assert _digest(linear_spec("a", first)) != _digest(linear_spec("b", second))


def test_every_branch_of_a_model_is_exported() -> None:
    model = tiny_model("pixart")
    ditq.quantize(model, "rtn-w8a8", overrides=["branch.rank=4"])
    specs = [linear_spec(name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert specs
    for spec in specs:
        assert spec.branch is not None
        assert spec.branch[0].shape == (4, spec.weight.columns)
