"""Counts the tokens that each linear layer reads while a pipeline samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ditq.plan import LayerPlan
from ditq.trace.hooks import Before, all_hooked, hooked


@contextmanager
def counted_rows(model: nn.Module, layers: Sequence[LayerPlan]) -> Iterator[dict[str, int]]:
    """Counts the rows (tokens) that each layer reads inside the ``with`` block."""
    rows = {layer.name: 0 for layer in layers}

    def count(name: str) -> Before:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows[name] += args[0].numel() // args[0].shape[-1]

        return hook

    with all_hooked(hooked(model.get_submodule(name), count(name)) for name in rows):
        yield rows
