"""Attention in a graph of fixed sizes as two products; long ones optionally in bf16.

Inside a quantized block only the two products of attention still run in floating point. On a CPU with bf16
instructions they take a seventh of a DiT block's time in float32, and two thirds of that in bf16.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ditq.openvino.options import Attention
from ditq.openvino.probe import core
from ditq.openvino.settings import PRECISION

# With fewer pairs of a query and a key, rounding saves no time: frames of a clip, small images and their texts.
LONG = 128 * 128

KIND = "ScaledDotProductAttention"

# Operations that only move numbers, and so commute with rounding.
MOVES = ("Transpose", "Reshape")


def resolved(attention: Attention) -> Literal["f32", "bf16"]:
    """The precision of attention. ``auto`` is OpenVINO's choice for this CPU: bf16 if it has the instructions.

    With "int8" the remaining float operations are as with ``auto``.
    """
    if attention == "f32" or attention == "bf16":
        return attention
    return "bf16" if core().get_property("CPU", PRECISION).get_type_name() == "bf16" else "f32"


def as_products(model: Any, half: bool = False) -> None:
    """Writes every attention of fixed sizes as softmax(q k^T) v, in place.

    OpenVINO does that by itself, but then transposes all keys in memory, which takes a tenth of attention's time; in
    this form it reads them in place. If there are as many queries as heads (16 frames and 16 heads of Latte), OpenVINO
    2026.4 confuses both axes when it fuses their transposition with the product; an additional axis prevents that.

    Args:
        model: an ``openvino.Model``; attention of open sizes, and causal attention, is not changed.
        half: rounds the inputs of attention over :data:`LONG` pairs or more to bf16, unless its queries and keys
            have 8 bits. With open sizes OpenVINO would truncate instead of rounding.
    """
    import openvino as ov

    for node in model.get_ordered_ops():
        if node.get_type_name() != KIND or node.get_attributes()["causal"]:
            continue
        shapes = [port.get_partial_shape() for port in node.inputs()[:3]]
        if any(shape.is_dynamic for shape in shapes):
            continue
        y = _products(node, half and int(shapes[0][-2].get_length() * shapes[1][-2].get_length()) >= LONG)
        y.set_friendly_name(node.get_friendly_name())
        last = node
        if y.get_element_type().get_type_name() == "bf16":
            y, last = _moved(y, node)
        ov.utils.replace_node(last, y)


def rounded_attentions(model: Any) -> int:
    """The number of attentions of an exported ``openvino.Model`` that multiply 8-bit queries and keys."""
    nodes = (node for node in model.get_ops() if node.get_type_name() == KIND)
    return sum(_is_rounded(node.input_value(0)) and _is_rounded(node.input_value(1)) for node in nodes)


def multiplying(compiled: Any) -> int:
    """The number of attentions of an ``openvino.CompiledModel`` that multiply queries and keys as integers."""
    count = 0
    for node in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        fused = info["layerType"] == "Subgraph" and KIND in info["originalLayersNames"]
        count += (fused or info["layerType"] == "MatMul") and info["runtimePrecision"] in ("i8", "u8")
    return count


def _is_rounded(x: Any) -> bool:
    """Whether an ``openvino.Output`` of heads was rounded to 8-bit codes."""
    node = x.get_node()
    while node.get_type_name() in MOVES:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _products(node: Any, half: bool) -> Any:
    """softmax(q k^T scale + mask) v for the inputs of an attention node."""
    import openvino.opset13 as op

    q, k, v, *optional = (port.get_source_output() for port in node.inputs())
    scale = (
        optional[1] if len(optional) > 1 else op.constant(np.float32(q.get_partial_shape()[-1].get_length() ** -0.5))
    )
    mask = optional[0] if optional and len(optional[0].get_partial_shape()) > 0 else None
    if mask is not None and mask.get_element_type().get_type_name() == "boolean":
        mask = op.select(mask, op.constant(np.float32(0)), op.constant(np.float32(-np.inf))).output(0)
    rounded = _is_rounded(q) and _is_rounded(k)
    half = half and not rounded
    # The scale stays after the product of codes. Queries of 16 bits are scaled before, in float32: OpenVINO would
    # round them, scale them in bf16, and so round them twice.
    before, after = (None, scale) if rounded else (scale, None)
    if half:
        q, k, v, mask = _half(q, before), _half(k), _half(v), None if mask is None else _half(mask)
    elif before is not None:
        q = op.multiply(q, before).output(0)
    shape = q.get_partial_shape()
    ambiguous = len(shape) > 3 and shape[-3] == shape[-2]
    if ambiguous:
        q, k, v = (op.unsqueeze(x, op.constant(0)).output(0) for x in (q, k, v))
    scores = op.matmul(q, k, False, True)
    scores = scores if after is None else op.multiply(scores, after)
    scores = scores if mask is None else op.add(scores, mask)
    y = op.matmul(op.softmax(scores, -1), v, False, False)
    return op.squeeze(y, op.constant(0)) if ambiguous else y


def _half(x: Any, factor: Any = None) -> Any:
    """``x`` in bf16, rounded before heads are transposed: half the bytes to move, fused with the layer before."""
    import openvino.opset13 as op

    node = x.get_node()
    if node.get_type_name() == "Transpose":
        return op.transpose(_half(node.input_value(0), factor), node.input_value(1)).output(0)
    x = x if factor is None else op.multiply(x, factor).output(0)
    return op.convert(x, "bf16").output(0) if x.get_element_type().get_type_name() == "f32" else x


def _moved(y: Any, node: Any) -> tuple[Any, Any]:
    """Applies the moves after ``node`` to ``y``, and only then converts to float32, fused with the next operation.

    Returns:
        The new node, and the last node that it replaces.
    """
    import openvino.opset13 as op

    last = node
    while len(users := last.output(0).get_target_inputs()) == 1:
        following = next(iter(users)).get_node()
        if (kind := following.get_type_name()) not in MOVES:
            break
        last = following
        order, zero_keeps_size = last.input_value(1), last.get_attributes().get("special_zero")
        y = op.transpose(y, order) if kind == "Transpose" else op.reshape(y, order, zero_keeps_size)
        y.set_friendly_name(last.get_friendly_name())
    return op.convert(y, "f32"), last
