"""How a model is compiled: the one group size of its activations, and OpenVINO's own properties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ditq.errors import UsageError
from ditq.openvino.linear import STEP, LinearSpec

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
PRECISION = "INFERENCE_PRECISION_HINT"

# OpenVINO's default hint on a CPU with bf16 instructions is bf16: faster, but it rounds every activation.
DEFAULTS = {PRECISION: "f32", "PERFORMANCE_HINT": "LATENCY"}

# A wider G saves little or no time (G = 32, OpenVINO's default, takes a quarter longer), a narrower one is more exact.
WIDEST = 128


def why_float(linear: LinearSpec, group_size: int) -> str | None:
    """Why the plugin would multiply floats in a layer that has integer activations by its plan, or None."""
    if linear.kernel.activations != "plugin":
        return None
    columns, group = linear.weight.columns, linear.weight.format.group_size
    if columns < STEP:
        return f"its {columns} input channels are fewer than {STEP}"
    if len(linear.weight.packed) < 2:
        return "it has a single output"
    if group is not None and group % STEP:
        return f"its weight groups of {group} are no multiple of {STEP}"
    if linear.activation is not None and (linear.activation.group_size or STEP) % STEP:
        return f"its activation groups of {linear.activation.group_size} are no multiple of {STEP}"
    if group_size and group_size > columns:
        return f"activation groups of {group_size} are wider than its {columns} input channels"
    return None


def group_size(linears: Iterable[LinearSpec]) -> int:
    """The largest G up to :data:`WIDEST` that suits all layers whose input the plugin rounds; 0 if there is none.

    G is a multiple of 16, at most the smallest K, and divides every group of weights or activations, so that
    no layer shares a scale more widely than its plan says.
    """
    linears = [x for x in linears if x.kernel.activations == "plugin" and why_float(x, 0) is None]
    if not linears:
        return 0
    groups = {linear.weight.format.group_size for linear in linears}
    groups |= {linear.activation.group_size for linear in linears if linear.activation is not None}
    limit = min(WIDEST, *(linear.weight.columns for linear in linears))
    sizes = range(limit - limit % STEP, 0, -STEP)
    return next(size for size in sizes if all(group % size == 0 for group in groups if group is not None))


def compile_config(group_size: int, properties: Mapping[str, str | int] | None = None) -> dict[str, str]:
    """What ``compile_model`` takes: the defaults of ditq, then the user's properties by OpenVINO's names.

    Raises:
        UsageError: the properties set the group size, which follows from the plan.
    """
    given = {str(key): str(value) for key, value in (properties or {}).items()}
    if GROUP_SIZE in given:
        raise UsageError(f"{GROUP_SIZE} follows from the plan of the model ({group_size}) and cannot be set.")
    return {**DEFAULTS, **given, GROUP_SIZE: str(group_size)}
