"""Attention in bf16 inside of a graph that computes everything else in float32.

The two products of attention are all that is left in floats of a quantized block: on a CPU with bf16 instructions
they take a seventh of its time in float32, and two thirds of that in bf16. ``INFERENCE_PRECISION_HINT=bf16`` would
round the residual stream and the outputs of every layer too, which costs digits and, for the casts, time.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from ditq.engines.openvino.probe import core
from ditq.engines.openvino.settings import PRECISION

Attention = Literal["auto", "f32", "bf16"]
KINDS = get_args(Attention)


def resolved(attention: Attention) -> Literal["f32", "bf16"]:
    """What ``auto`` is on this CPU: the precision that OpenVINO chooses for it, bf16 where it has the instructions."""
    if attention != "auto":
        return attention
    return "bf16" if core().get_property("CPU", PRECISION).get_type_name() == "bf16" else "f32"


def in_bf16(model: Any) -> Any:
    """Rounds the inputs of every attention of an ``openvino.Model`` to bf16, in place; returns the model."""
    import openvino.opset13 as op

    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        for port in node.inputs():
            source = port.get_source_output()
            if source.get_element_type().get_type_name() == "f32":
                port.replace_source_output(op.convert(source, "bf16").output(0))
        readers = node.output(0).get_target_inputs()
        node.validate_and_infer_types()
        widened = op.convert(node.output(0), "f32")
        for reader in readers:
            reader.replace_source_output(widened.output(0))
    model.validate_nodes_and_infer_types()
    return model
