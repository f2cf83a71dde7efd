"""Graphs without a constant twice, and with 16-bit constants where those are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditq.openvino import runtime

if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

import openvino as ov
import openvino.opset13 as op

from ditq.openvino.passes.constants import keep_bf16, shrink
from ditq.openvino.probe import core

K, N = 64, 96


def weights(seed: int, bf16: bool) -> Any:
    values = np.random.default_rng(seed).standard_normal((N, K), dtype=np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if bf16 else values


def model(*constants: Any, add: bool = False) -> Any:
    """Input times every constant; ``add`` reads the first constant a second time."""
    x = op.parameter([-1, K], np.float32)
    nodes = [op.constant(values, shared_memory=False) for values in constants]
    outputs = [op.matmul(x, node, False, True) for node in nodes]
    if add:
        outputs.append(op.reduce_sum(nodes[0], op.constant([0, 1]), False))
    return ov.Model(outputs, [x], "products")


def kinds(model: Any) -> list[str]:
    large = [n for n in model.get_ordered_ops() if n.get_type_name() == "Constant" and n.data.size > 4]
    return [n.get_element_type().get_type_name() for n in large]


def compiled_weights(model: Any) -> tuple[Any, list[str]]:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ordered_ops()
    products = [n for n in nodes if n.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    return compiled, [n.input(1).get_element_type().get_type_name() for n in products]


def test_exact_weights_become_bf16_and_stay_so_in_memory(tmp_path: Path) -> None:
    a, b = weights(0, True), weights(1, False)
    graph = model(a, b)
    shrink(graph)
    assert sorted(kinds(graph)) == ["bf16", "f32"]
    ov.save_model(graph, tmp_path / "model.xml", compress_to_fp16=False)
    read = core().read_model(tmp_path / "model.xml")
    keep_bf16(read)
    compiled, found = compiled_weights(read)
    assert sorted(found) == ["bf16", "f32"]
    x = np.random.default_rng(2).standard_normal((5, K), dtype=np.float32)
    first, second = compiled([x]).values()
    np.testing.assert_allclose(first, x @ a.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, x @ b.T, rtol=1e-5, atol=1e-5)


def test_equal_constants_are_one() -> None:
    graph = model(weights(0, False), weights(0, False), weights(3, False))
    shrink(graph)
    assert kinds(graph) == ["f32", "f32"]


def test_equal_bf16_constants_are_one() -> None:
    graph = model(weights(0, True), weights(0, True))
    shrink(graph)
    assert kinds(graph) == ["bf16"]


def test_what_other_operations_read_stays_float32() -> None:
    graph = model(weights(0, True), add=True)
    shrink(graph)
    assert kinds(graph) == ["f32"]


def test_small_constants_are_left_alone() -> None:
    x = op.parameter([-1, 8], np.float32)
    graph = ov.Model([op.matmul(x, op.constant(np.ones((8, 8), np.float32)), False, True)], [x], "small")
    shrink(graph)
    assert kinds(graph) == ["f32"]
