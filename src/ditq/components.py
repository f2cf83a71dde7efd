"""Which components of a pipeline are transformers: the one list that every verb goes by."""

from __future__ import annotations

from typing import Any

NAMES = ("transformer", "transformer_2")
"""In the order in which a pipeline calls them: Wan 2.2 A14B has an expert for high and one for low noise."""


def transformer_names(pipe: Any) -> list[str]:
    """Names of the transformers that ``pipe`` has; most pipelines have one."""
    return [name for name in NAMES if getattr(pipe, name, None) is not None]


def transformers(pipe: Any) -> dict[str, Any]:
    """The transformers of a pipeline by name."""
    return {name: getattr(pipe, name) for name in transformer_names(pipe)}
