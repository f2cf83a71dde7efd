"""Checks a user's OpenVINO properties before an export, on a graph of one operation."""

from __future__ import annotations

from collections.abc import Mapping

from ditq.errors import UsageError, unknown
from ditq.openvino import runtime
from ditq.openvino.probe import core
from ditq.openvino.settings import compile_config
from ditq.openvino.storage import first_line


def check_properties(properties: Mapping[str, str | int]) -> None:
    """Refuses names and values that OpenVINO would refuse when the exported pipeline is loaded.

    Args:
        properties: by OpenVINO's names, as for :func:`ditq.openvino.export.load`.

    Raises:
        UsageError: an unknown name, an invalid value, or a property that follows from the plan.
        DitqError: OpenVINO is not available here.
    """
    if not properties:
        return
    runtime.require()
    import openvino as ov
    import openvino.opset13 as op

    x = op.parameter([1], ov.Type.f32)
    smallest = ov.Model([op.relu(x)], [x])
    config = compile_config(0, properties)
    try:
        core().compile_model(smallest, "CPU", config)
    except RuntimeError as error:
        supported = core().get_property("CPU", "SUPPORTED_PROPERTIES")
        known = [name for name, access in supported.items() if access == "RW"]
        for name in properties:
            if name not in known and name in str(error):
                raise unknown("property of OpenVINO", name, known) from error
        options = ", ".join(f"{name}={value}" for name, value in properties.items())
        raise UsageError(f"OpenVINO refuses the options {options}: {first_line(error)}") from error
