"""Two small example calls of a transformer that differ in every size that may change between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.errors import UsageError
from ditq.trace.calls import Call

# (batch, side in patches, text tokens) of the two calls. No size is 1, and no size occurs in both.
SIZES = ((2, 4, 5), (3, 6, 7))


def variations(call: Mapping[str, Any], architecture: Architecture, model: nn.Module) -> tuple[Call, Call]:
    """Two small calls made from a recorded one, different in batch, height, width and length of the text.

    Tensors are repeated or cut, so that their values keep the range of real inputs.

    Raises:
        UsageError: the call does not have the sample.
    """
    forward = architecture.forward
    sample = call.get(forward.sample)
    if not isinstance(sample, Tensor):
        raise UsageError(f"An example call needs the transformer's argument {forward.sample!r}, got {sorted(call)}.")
    patch = getattr(getattr(model, "config", None), "patch_size", None) or 1
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch

    def varied(batch: int, side: int, text: int) -> Call:
        def change(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: change(key, inner) for key, inner in value.items()}
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            if value.shape[0] == sample.shape[0]:
                value = _resized(value, 0, batch)
            if name == forward.sample:
                value = _resized(_resized(value, -1, side * patch), -2, side * patch)
            if name in (forward.text, forward.text_mask):
                value = _resized(value, 1, text)
            return value

        return {name: change(name, value) for name, value in call.items()}

    return varied(*SIZES[0]), varied(*SIZES[1])


def _resized(x: Tensor, axis: int, size: int) -> Tensor:
    return x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
