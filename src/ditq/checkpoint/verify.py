"""Verifies the files of a quantized transformer against its plan before any tensor is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditq import digests
from ditq.errors import CheckpointError
from ditq.plan import Plan, StoredTensor

DIGESTS = "ditq_sha256"


# The verifications that passed inside `once`: the hash of the plan, and the state of every file.
_passed: ContextVar[set[tuple[object, ...]] | None] = ContextVar("ditq_passed", default=None)


@contextmanager
def once() -> Iterator[None]:
    """Inside this context, :func:`verify` skips files that already passed and have not changed since.

    ``ditq.load`` verifies all transformers before it loads anything, and loading a transformer verifies it again.
    """
    token = _passed.set(set())
    try:
        yield
    finally:
        _passed.reset(token)


def verify(files: Iterable[str | Path], plan: Plan) -> None:
    """Reads safetensors files and compares names, shapes, dtypes, ranges and checksums with the plan.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or does not match the plan; the message names it.
    """
    paths = sorted(map(Path, files))
    passed = _passed.get()
    if passed is None:
        _verify(paths, plan)
    elif (key := (plan.hash(), *map(_state, paths))) not in passed:
        _verify(paths, plan)
        passed.add(key)


def _state(file: Path) -> tuple[object, ...]:
    """A key that changes with the content of a file: its path, inode, size and modification time."""
    try:
        status = file.stat()
    except OSError:  # never equal, so the file is verified, which raises the error
        return (str(file), object())
    return (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)


def _verify(files: list[Path], plan: Plan) -> None:
    if not files:
        raise CheckpointError("There is no safetensors file of the transformer; ditq reads no other format.")
    expected = plan.tensors()
    read: set[str] = set()
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file} is not a safetensors file; ditq reads no other format.")
        try:
            with safe_open(file, framework="pt") as stored:
                sums = _digests(stored.metadata(), file)
                for name in stored.keys():  # noqa: SIM118
                    tensor = stored.get_tensor(name)
                    if name in expected:
                        _check(name, tensor, expected[name])
                    if sums.get(name) != digests.of_tensor(tensor):
                        raise CheckpointError(
                            f"Tensor {name!r} of {file} does not match its checksum: the file is damaged. "
                            "Copy or download it again."
                        )
                    read.add(name)
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{file} cannot be read ({error}): truncated or damaged. Copy it again.") from error
    missing = sorted(set(expected) - read)
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more." if missing[1:] else ".")
        )


def _digests(metadata: dict[str, str] | None, file: Path) -> dict[str, str]:
    try:
        digests = json.loads((metadata or {})[DIGESTS])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} has no ditq checksums: it was not written by ditq, or is damaged.") from error
    if not isinstance(digests, dict):
        raise CheckpointError(f"{file}: the checksums are not a JSON object.")
    return digests


def _check(name: str, tensor: Tensor, expected: StoredTensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != expected.shape or dtype != expected.dtype:
        raise CheckpointError(
            f"Tensor {name!r} is {dtype} {tuple(tensor.shape)}; the plan expects {expected.dtype} {expected.shape}."
        )
    if tensor.is_floating_point() and expected.signed and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"Tensor {name!r} holds numbers that are not finite.")
    if tensor.is_floating_point() and not expected.signed and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise CheckpointError(f"Tensor {name!r} holds scales that are not positive and finite.")
    if expected.range is not None:
        low, high = expected.range
        if int(tensor.min()) < low or int(tensor.max()) > high:
            raise CheckpointError(f"Tensor {name!r} holds zero points outside [{low}, {high}].")
