"""Checks the files of a quantized transformer against its plan before a single tensor is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditq.conversion.folding import BUFFER
from ditq.errors import CheckpointError
from ditq.layers.quantized_linear import buffers
from ditq.plan import Plan

DIGESTS = "ditq_sha256"


def digest(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a tensor's bytes, its dtype and its shape."""
    raw = tensor.detach().cpu().contiguous().view(-1)
    data = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
    return hashlib.sha256(data + f"{tensor.dtype}{tuple(tensor.shape)}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Expected:
    """What the plan says about one tensor; ``bits`` where it holds zero points of so many."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int | None = None


def expected(plan: Plan) -> dict[str, Expected]:
    """Every tensor that the plan's quantized layers and folds must have, parameters apart."""
    out = {
        f"{fold.block}.{BUFFER}": Expected((fold.chunks * fold.width,), torch.float32)
        for fold in plan.folds
        if fold.block
    }
    for layer in plan.quantized:
        prefixes = [f"{layer.name}."]
        if layer.timesteps:
            prefixes = [f"{layer.name}.ranges.{i}." for i in range(len(layer.timesteps))]
        for prefix in prefixes:
            for buffer, (shape, dtype) in buffers(layer).items():
                bits = layer.weight_bits if buffer == "weight_zero_point" else None
                out[prefix + buffer] = Expected(shape, dtype, bits)
    return out


def verify(files: Iterable[str | Path], plan: Plan) -> None:
    """Reads safetensors files and compares names, shapes, dtypes, ranges and checksums with the plan.

    Raises:
        CheckpointError: names the file or the tensor and what is wrong with it.
    """
    files = list(files)
    if not files:
        raise CheckpointError("There is no safetensors file of the transformer; ditq reads no other format.")
    wanted = expected(plan)
    seen: set[str] = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise CheckpointError(f"{file} is not a safetensors file; ditq reads no other format.")
        try:
            with safe_open(file, framework="pt") as stored:
                digests = _digests(stored.metadata(), file)
                for name in stored.keys():  # noqa: SIM118
                    tensor = stored.get_tensor(name)
                    if name in wanted:
                        _check(name, tensor, wanted[name])
                    if digests.get(name) != digest(tensor):
                        raise CheckpointError(
                            f"Tensor {name!r} of {file} does not match its checksum: the file is damaged. "
                            "Copy or download it again."
                        )
                    seen.add(name)
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} cannot be read ({error}): truncated or damaged. Copy it again.") from error
    missing = sorted(set(wanted) - seen)
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more." if missing[1:] else ".")
        )


def _digests(metadata: dict[str, str] | None, file: str | Path) -> dict[str, str]:
    try:
        digests = json.loads((metadata or {})[DIGESTS])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file} has no checksums of ditq: it was not written by ditq, or is damaged."
        ) from error
    if not isinstance(digests, dict):
        raise CheckpointError(f"{file}: the checksums are no JSON object.")
    return digests


def _check(name: str, tensor: Tensor, wanted: Expected) -> None:
    if tuple(tensor.shape) != wanted.shape or tensor.dtype != wanted.dtype:
        raise CheckpointError(
            f"Tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; the plan says {wanted.dtype} {wanted.shape}."
        )
    if wanted.dtype == torch.float32 and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise CheckpointError(f"Tensor {name!r} holds scales that are not positive and finite.")
    if wanted.bits is not None:
        half = 2 ** (wanted.bits - 1)
        if int(tensor.min()) < -half or int(tensor.max()) >= half:
            raise CheckpointError(f"Tensor {name!r} holds zero points outside [{-half}, {half - 1}].")
