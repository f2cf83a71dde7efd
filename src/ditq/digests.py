"""Short names for contents: SHA-256, cut to the digits that are needed. Part of the formats on disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 16


def of_text(text: str, digits: int = DIGITS) -> str:
    """The first hexadecimal digits of the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def of_json(value: Any) -> str:
    """Of a value as JSON with sorted keys; what JSON does not know counts by its ``repr``."""
    return of_text(json.dumps(value, sort_keys=True, default=repr))


def of_file(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def of_tensor(tensor: Tensor) -> str:
    """Of a tensor's bytes in row-major order, its dtype and its shape: ``torch.uint8(24, 16)`` follows the bytes."""
    content = hashlib.sha256(tensor_bytes(tensor))
    content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return content.hexdigest()[:DIGITS]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as bytes, row-major; without a copy where it lies contiguous in the CPU's memory."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
