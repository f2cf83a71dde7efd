"""Short digests of contents: truncated SHA-256. They are part of the formats on disk."""

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
    """The digest of a value as JSON with sorted keys. Types that JSON lacks are replaced by their ``repr``."""
    return of_text(json.dumps(value, sort_keys=True, default=repr))


def of_file(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def of_tensor(tensor: Tensor) -> str:
    """The digest of a tensor's bytes in row-major order, followed by its dtype and shape: ``torch.uint8(24, 16)``."""
    content = hashlib.sha256(tensor_bytes(tensor))
    content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return content.hexdigest()[:DIGITS]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor as bytes, row-major. A contiguous tensor in CPU memory is not copied."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
