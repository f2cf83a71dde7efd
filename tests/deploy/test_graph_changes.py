"""What is changed in a graph after it was converted: GELU as a quotient, attention in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ditq.engines.openvino import ENGINE

if (reason := ENGINE.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import numpy as np
import openvino as ov
import openvino.opset13 as op

from ditq.deploy.attention import in_bf16, resolved
from ditq.deploy.rewrite import rewrite
from ditq.engines.openvino.probe import core

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def call(model: Any, *inputs: Tensor) -> Tensor:
    compiled = core().compile_model(model, "CPU", EXACT)
    return torch.from_numpy(compiled([x.numpy() for x in inputs])[0].copy())


def gelu(mode: str) -> Any:
    x = op.parameter([-1], ov.Type.f32)
    return ov.Model([op.multiply(op.gelu(x, mode), op.constant(np.float32(1)))], [x])


def test_gelu_is_the_same_function() -> None:
    model = gelu("tanh")
    rewrite(model)
    assert "Gelu" not in kinds(model)
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4, 1e12, -1e12, 3e38])])
    expected = F.gelu(x.double(), approximate="tanh")
    found = call(model, x).double()
    assert torch.isfinite(found).all()
    assert ((found - expected).abs() <= 1e-6 * expected.abs() + 1e-7).all()


def test_other_gelus_stay() -> None:
    model = gelu("erf")
    rewrite(model)
    assert kinds(model).count("Gelu") == 1


def attention(masked: bool) -> Any:
    sizes = [[2, 3, -1, 16]] * 3 + ([[2, 1, -1, -1]] if masked else [])
    inputs = [op.parameter(size, ov.Type.f32) for size in sizes]
    y = op.scaled_dot_product_attention(*inputs)
    return ov.Model([op.multiply(y, op.constant(np.float32(2)))], inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_rounds_its_inputs_to_bf16(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
    mask = torch.zeros(2, 1, 8, 8)
    mask[1, :, :, 5:] = -10000.0
    inputs = (q, k, v, mask) if masked else (q, k, v)
    exact = 2 * F.scaled_dot_product_attention(q, k, v, mask if masked else None)
    plain, model = attention(masked), in_bf16(attention(masked))
    node = next(x for x in model.get_ordered_ops() if x.get_type_name() == "ScaledDotProductAttention")
    assert {port.get_element_type().get_type_name() for port in node.inputs()} == {"bf16"}
    assert model.outputs[0].get_element_type().get_type_name() == "f32"
    torch.testing.assert_close(call(plain, *inputs), exact, rtol=1e-4, atol=1e-5)
    found = call(model, *inputs)
    error = float((found - exact).norm() / exact.norm())
    assert 1e-4 < error < 1e-2  # rounded, and by no more than bf16 rounds


def test_auto_is_what_openvino_prefers() -> None:
    assert resolved("f32") == "f32"
    assert resolved("bf16") == "bf16"
    preferred = core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    assert resolved("auto") == ("bf16" if preferred == "bf16" else "f32")
