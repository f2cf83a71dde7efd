"""Settings of the compilation: the model's group size of activations, and OpenVINO's properties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ditq.errors import UsageError
from ditq.openvino.linear import STEP, LinearSpec

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
PRECISION = "INFERENCE_PRECISION_HINT"

# OpenVINO's default hint on a CPU with bf16 instructions is bf16: faster, but it rounds every activation.
DEFAULTS = {PRECISION: "f32", "PERFORMANCE_HINT": "LATENCY"}

# A wider G saves little or no time (G = 32, OpenVINO's default, takes a quarter longer); a narrower one is more exact.
WIDEST = 128


def why_float(linear: LinearSpec, group_size: int) -> str | None:
    """Why the plugin would multiply floats in a layer with planned integer activations, or None."""
    if linear.kernel.activations != "plugin":
        return None
    columns, group = linear.weight.columns, linear.weight.format.group_size
    if columns < STEP:
        return f"its {columns} input channels are fewer than {STEP}"
    if len(linear.weight.packed) < 2:
        return "it has a single output"
    if group is not None and group % STEP:
        return f"its weight groups of {group} are not a multiple of {STEP}"
    if linear.activation is not None and (linear.activation.group_size or STEP) % STEP:
        return f"its activation groups of {linear.activation.group_size} are not a multiple of {STEP}"
    if group_size and group_size > columns:
        return f"activation groups of {group_size} are wider than its {columns} input channels"
    return None


def group_size(linears: Iterable[LinearSpec]) -> int:
    """The largest G up to :data:`WIDEST` for all layers whose input the plugin rounds; 0 if there are none.

    G is a multiple of 16, at most the smallest K, and divides every group of weights or activations, so that
    no layer has a coarser scale than planned.
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
    """The configuration for ``compile_model``: ditq's defaults, overridden by the user's properties.

    Raises:
        UsageError: the properties set the group size, which follows from the plan.
    """
    by_user = {str(key): str(value) for key, value in (properties or {}).items()}
    if GROUP_SIZE in by_user:
        raise UsageError(f"{GROUP_SIZE} follows from the plan of the model ({group_size}) and cannot be set.")
    return {**DEFAULTS, **by_user, GROUP_SIZE: str(group_size)}
