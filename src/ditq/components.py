"""The components of a pipeline that are transformers. Every verb uses this list."""

from __future__ import annotations

from typing import Any

NAMES = ("transformer", "transformer_2")
"""In the order in which a pipeline calls them. Wan 2.2 A14B has one expert for high noise and one for low noise."""


def transformer_names(pipe: Any) -> list[str]:
    """Names of the transformers that ``pipe`` has; most pipelines have one."""
    return [name for name in NAMES if getattr(pipe, name, None) is not None]


def transformers(pipe: Any) -> dict[str, Any]:
    """The transformers of a pipeline by name."""
    return {name: getattr(pipe, name) for name in transformer_names(pipe)}


def plan_of(model: Any) -> Any:
    """The :class:`ditq.plan.Plan` of a quantized model; None for a 16-bit model."""
    return getattr(getattr(getattr(model, "config", None), "quantization_config", None), "plan", None)


def prefixed(component: str, layer: str) -> str:
    """A layer name that is unique in the pipeline: the component comes first, except for the first transformer."""
    return layer if component == NAMES[0] else f"{component}.{layer}"
