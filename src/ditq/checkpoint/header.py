"""The JSON header of a safetensors file, without reading its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 100_000_000  # the limit of the safetensors library
_LENGTH = 8  # bytes in front of the header, little-endian


def metadata(file: Path) -> dict[str, str]:
    """The texts that the writer stored beside the tensors; empty if there are none, or the file cannot be read."""
    try:
        entries = _read(file)[0].get("__metadata__")
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def sort_metadata(file: Path) -> None:
    """Sorts the metadata of a file by name, in place, so that the same tensors give the same bytes.

    safetensors writes them in an order that changes from run to run.

    Raises:
        ValueError: the file is not a safetensors file.
    """
    header, size = _read(file)
    if len(header.get("__metadata__", {})) < 2:
        return
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    if len(text) != size:
        raise ValueError(f"The header of {file} is not written as safetensors writes it.")
    with file.open("r+b") as stream:
        stream.seek(_LENGTH)
        stream.write(text)


def _read(file: Path) -> tuple[dict[str, Any], int]:
    """The header and its length in bytes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(_LENGTH), "little")
        if size > MOST_BYTES:
            raise ValueError(f"{file} is not a safetensors file: its header would have {size} bytes.")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is not a JSON object.")
    return header, size
