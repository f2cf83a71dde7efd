"""Shrinks the constants of a graph: stores equal ones once, and numbers that are exact in bf16 as bf16."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

# Smaller constants are not worth a node.
FEW = 4096


def shrink(model: Any) -> None:
    """Shares equal constants of an ``openvino.Model``, and stores weights of products in 16 bit if that is exact.

    A DiT has a copy of its embedders in every block; with shared constants OpenVINO also computes them once.
    Parameters that ditq keeps in 16 bit are bf16 numbers in float32 tensors at this point.
    """
    replacements: dict[tuple[Any, ...], Any] = {}
    for constant in _constants(model):
        values, kind = constant.data, constant.get_element_type().get_type_name()
        key = (kind, tuple(constant.get_output_shape(0)), hashlib.sha256(values.tobytes()).digest())
        if key in replacements:
            _replace(constant, replacements[key])
            continue
        replacements[key] = constant
        if kind == "f32" and _only_weights(constant) and (half := _as_bf16(values)) is not None:
            replacements[key] = half
            _replace(constant, half)


def keep_bf16(model: Any) -> None:
    """Marks the bf16 constants of :func:`shrink`, or OpenVINO expands them; files do not store the mark."""
    for constant in _constants(model):
        if constant.get_element_type().get_type_name() != "bf16":
            continue
        for reader in constant.output(0).get_target_inputs():
            reader.get_node().get_rt_info()["decompression_0"] = True


def _constants(model: Any) -> Iterator[Any]:
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and np.prod(list(node.get_output_shape(0))) >= FEW:
            yield node


def _only_weights(constant: Any) -> bool:
    """Whether only products read it, as their second operand: other operations have no 16-bit kernels."""
    return all(
        reader.get_node().get_type_name() == "MatMul" and reader.get_index() == 1
        for reader in constant.output(0).get_target_inputs()
    )


def _as_bf16(values: Any) -> Any:
    """A Convert of a bf16 Constant with the same values, or None if some need more bits."""
    import openvino as ov
    import openvino.opset13 as op

    words = np.ascontiguousarray(values).view(np.uint32)
    if (words & 0xFFFF).any():
        return None
    halves = (words >> 16).astype(np.uint16).reshape(-1)
    tensor = ov.Tensor(halves, ov.Shape(list(values.shape)), ov.Type.bf16)
    return op.convert(ov.op.Constant(tensor, shared_memory=False), "f32")


def _replace(old: Any, new: Any) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
