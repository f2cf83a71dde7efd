"""Rewrites functions of a graph, before it is stored, to forms that OpenVINO computes faster."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ditq.openvino.linear import CLIP


def rewrite(model: Any) -> None:
    """Writes every tanh GELU of an ``openvino.Model`` as a quotient, in place, which takes half the time.

    0.5 x (1 + tanh u) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). If the exponential is infinite
    the quotient is 0, like the GELU in float32. A GELU before static rounding is not changed: OpenVINO fuses both into
    the product before it.
    """
    import openvino as ov
    import openvino.opset13 as op

    def constant(value: float) -> Any:
        return op.constant(np.float32(value))

    slope = math.sqrt(2 / math.pi)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Gelu" or node.get_attributes()["approximation_mode"].lower() != "tanh":
            continue
        if _is_rounded_statically(node):
            continue
        x = node.input_value(0)
        if x.get_element_type().get_type_name() != "f32":
            continue
        cubic = op.add(op.multiply(op.multiply(x, x), constant(-2 * slope * 0.044715)), constant(-2 * slope))
        quotient = op.divide(x, op.add(op.exp(op.multiply(x, cubic)), constant(1.0)))
        quotient.set_friendly_name(node.get_friendly_name())
        ov.utils.replace_node(node, quotient)


def _is_rounded_statically(node: Any) -> bool:
    """Whether all users of this output clip it to the range of its codes, possibly after a multiplication."""

    def clips(user: Any) -> bool:
        if user.get_type_name() == "Multiply":
            return _is_rounded_statically(user)
        return user.get_type_name() == "Clamp" and user.get_friendly_name().endswith(CLIP)

    users = [port.get_node() for port in node.output(0).get_target_inputs()]
    return bool(users) and all(map(clips, users))
