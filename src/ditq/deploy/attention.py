"""Attention in bf16 inside of a graph that computes everything else in float32.

The two products of attention are all that is left in floats of a quantized block: on a CPU with bf16 instructions
they take a seventh of a DiT block's time in float32, and two thirds of that in bf16. ``INFERENCE_PRECISION_HINT=bf16``
would round the residual stream and the outputs of every layer too, which costs digits and, for the casts, time.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ditq.engines.openvino.probe import core
from ditq.engines.openvino.settings import PRECISION

Attention = Literal["auto", "f32", "bf16"]

# Fewer pairs of a query and a key take no time worth a rounding: the frames of a clip, small pictures and their texts.
LONG = 128 * 128


def resolved(attention: Attention) -> Literal["f32", "bf16"]:
    """What ``auto`` is on this CPU: the precision that OpenVINO chooses for it, bf16 where it has the instructions."""
    if attention != "auto":
        return attention
    return "bf16" if core().get_property("CPU", PRECISION).get_type_name() == "bf16" else "f32"


def in_bf16(model: Any) -> None:
    """Rounds the inputs of every attention over :data:`LONG` pairs or more to bf16, in place.

    Queries are scaled in float32 first: OpenVINO would round them, scale them in bf16, and so round them twice.

    Args:
        model: an ``openvino.Model`` of fixed sizes; with open ones OpenVINO cuts digits off instead of rounding.
    """
    import openvino as ov
    import openvino.opset13 as op

    def half(x: Any, factor: Any = None) -> Any:
        """In bf16; rounded before heads are moved, which is then half the work, and joins that of the layer before."""
        node = x.get_node()
        if node.get_type_name() == "Transpose":
            return op.transpose(half(node.input_value(0), factor), node.input_value(1)).output(0)
        x = x if factor is None else op.multiply(x, factor).output(0)
        return op.convert(x, "bf16").output(0) if x.get_element_type().get_type_name() == "f32" else x

    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        q, k, v, *rest = (port.get_source_output() for port in node.inputs())
        queries, keys, channels = q.get_partial_shape()[2], k.get_partial_shape()[2], q.get_partial_shape()[3]
        if queries.is_dynamic or keys.is_dynamic or queries.get_length() * keys.get_length() < LONG:
            continue
        mask = rest[0] if rest else op.constant(np.float32(0)).output(0)
        scale = rest[1] if len(rest) > 1 else op.constant(np.float32(channels.get_length() ** -0.5))
        y = op.scaled_dot_product_attention(
            half(q, scale), half(k), half(v), half(mask),
            half(op.constant(np.float32(1)).output(0)), causal=node.get_attributes()["causal"],
        )  # fmt: skip
        y.set_friendly_name(node.get_friendly_name())
        # Back in float32 only where heads lie beside each other again, in the pass of whatever comes next.
        last = node
        while len(users := last.output(0).get_target_inputs()) == 1:
            following = next(iter(users)).get_node()
            if (kind := following.get_type_name()) not in ("Transpose", "Reshape"):
                break
            last = following
            order, same = last.input_value(1), last.get_attributes().get("special_zero")
            y = op.transpose(y, order) if kind == "Transpose" else op.reshape(y, order, same)
            y.set_friendly_name(last.get_friendly_name())
        ov.utils.replace_node(last, op.convert(y, "f32"))
