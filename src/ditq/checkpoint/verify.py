"""Verifies the files of a quantized transformer against its plan before any tensor is used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditq import digests
from ditq.checkpoint.header import metadata as header_metadata
from ditq.errors import CheckpointError
from ditq.plan import Plan, StoredTensor
from ditq.reading import cut, parse_json, read_json, short

# Names in the metadata of a safetensors file. Files of ditq 0.1 have the checksums only.
DIGESTS = "ditq_sha256"  # a checksum of every tensor
PLAN = "ditq_plan"  # the digest of the plan that the tensors belong to
CONFIG = "ditq_config"  # the other fields of config.json
FORMAT = "ditq_format"  # "2" if the file has all of the above


def metadata(tensors: Mapping[str, Tensor], plan: Plan, config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file with these tensors: their checksums, and what binds them to a ``config.json``.

    Args:
        config: the content of ``config.json``.
    """
    return {
        DIGESTS: json.dumps({name: digests.of_tensor(tensor) for name, tensor in tensors.items()}),
        PLAN: plan.binding(),
        CONFIG: json.dumps(_model_fields(config), sort_keys=True),
        FORMAT: "2",
    }


def refuse_unplanned(files: Iterable[str | Path]) -> None:
    """Refuses tensors quantized by ditq whose ``config.json`` has no plan: they would be loaded as other values.

    Raises:
        CheckpointError: a file has ditq's checksums.
    """
    for file in map(Path, files):
        if DIGESTS in header_metadata(file):
            raise CheckpointError(
                f"{file} holds a transformer quantized by ditq, but the config.json beside it has no ditq plan: its "
                "quantization_config was removed or replaced. Copy config.json from the original checkpoint again."
            )


def _model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that decide what the model computes, except the plan."""
    return {
        key: value
        for key, value in config.items()
        if key == "_class_name" or (not key.startswith("_") and key != "quantization_config")
    }


# The verifications that passed inside `once`, and the names of their tensors: by the hash of the plan and the state of
# every file.
_passed: ContextVar[dict[tuple[object, ...], frozenset[str]] | None] = ContextVar("ditq_passed", default=None)


@contextmanager
def once() -> Iterator[None]:
    """Inside this context, :func:`verify` skips files that already passed and have not changed since.

    ``ditq.load`` verifies all transformers before it loads anything, and loading a transformer verifies it again.
    """
    token = _passed.set({})
    try:
        yield
    finally:
        _passed.reset(token)


def verify(files: Iterable[str | Path], plan: Plan) -> frozenset[str]:
    """Compares the names, shapes, dtypes, ranges and checksums of all tensors with the plan, and the config with both.

    Returns:
        The names of all tensors in the files, also of those that the plan does not mention.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, or does not match the plan; the message names it.
    """
    paths = sorted(map(Path, files))
    passed = _passed.get()
    if passed is None:
        return _verify(paths, plan)
    if (key := (plan.hash(), *map(_state, paths))) not in passed:
        passed[key] = _verify(paths, plan)
    return passed[key]


def _state(file: Path) -> tuple[object, ...]:
    """A key that changes with the content of a file: its path, inode, size and modification time."""
    try:
        status = file.stat()
    except OSError:  # never equal, so the file is verified, which raises the error
        return (str(file), object())
    return (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)


def _verify(files: list[Path], plan: Plan) -> frozenset[str]:
    if not files:
        raise CheckpointError("There is no safetensors file of the transformer; ditq reads no other format.")
    expected = plan.tensors()
    read: set[str] = set()
    bindings: list[tuple[Path, Mapping[str, str]]] = []
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file} is not a safetensors file; ditq reads no other format.")
        try:
            with safe_open(file, framework="pt") as stored:
                texts = stored.metadata() or {}
                sums = _digests(texts, file)
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
            bindings.append((file, texts))
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{file} cannot be read ({cut(str(error))}): truncated or damaged. Copy it again."
            ) from error
    missing = sorted(set(expected) - read)
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more." if missing[1:] else ".")
        )
    for file, texts in bindings:  # last, because the errors above name the tensor
        _check_binding(texts, file, plan)
    return frozenset(read)


def _digests(texts: Mapping[str, str], file: Path) -> dict[str, str]:
    if DIGESTS not in texts:
        raise CheckpointError(
            f"{file} has no ditq checksums: it was not written by ditq, or is damaged. (A model that from_config made "
            "of a quantized config is not quantized: remove quantization_config from the config first.)"
        )
    sums = parse_json(texts[DIGESTS], f"{file}: the text of its checksums", CheckpointError)
    if not isinstance(sums, dict):
        raise CheckpointError(f"{file}: the checksums are not a JSON object.")
    return sums


def _check_binding(texts: Mapping[str, str], file: Path, plan: Plan) -> None:
    """Checks that the tensors were saved with this plan, and with the config.json beside them."""
    if not texts.keys() & {PLAN, CONFIG, FORMAT}:
        return  # written by ditq 0.1
    lacking = sorted({PLAN, CONFIG, FORMAT} - texts.keys())
    if lacking or texts[FORMAT] != "2":
        raise CheckpointError(
            f"{file}: the metadata "
            + (f"lacks {lacking[0]!r}" if lacking else f"has {FORMAT} {short(texts[FORMAT])}; this ditq reads '2'")
            + ". Copy the file again, or install a newer ditq."
        )
    if texts[PLAN] != plan.binding():
        raise CheckpointError(
            f"The plan (quantization_config in {file.parent / 'config.json'}) is not the one that {file.name} was "
            "saved with: config.json was edited, or belongs to another checkpoint. Copy the original again; to change "
            "a plan, quantize again."
        )
    config = file.parent / "config.json"
    if config.is_file():  # a caller may pass a config from elsewhere
        saved = parse_json(texts[CONFIG], f"{file}: the text of its config", CheckpointError)
        read = read_json(config, CheckpointError)
        if not isinstance(saved, dict) or not isinstance(read, dict):
            raise CheckpointError(f"{config} is not the config of a model: damaged.")
        read = _model_fields(read)
        changed = [key for key in sorted(saved.keys() | read.keys()) if not _equal(saved, read, key)]
        if changed:
            raise CheckpointError(
                f"{config}: {cut(changed[0], 60)!r} is {short(read.get(changed[0]))}, but was "
                f"{short(saved.get(changed[0]))} when {file.name} was saved: config.json was edited, or belongs to "
                "another checkpoint. Copy the original again."
            )


def _equal(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    """Whether both have the field with the same value, or neither; 1, 1.0 and true differ."""
    return (key in one, json.dumps(one.get(key))) == (key in other, json.dumps(other.get(key)))


def _check(name: str, tensor: Tensor, expected: StoredTensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != expected.shape or dtype != expected.dtype:
        raise CheckpointError(
            f"Tensor {name!r} is {dtype} {cut(str(tuple(tensor.shape)))}; the plan expects {expected.dtype} "
            f"{expected.shape}."
        )
    if tensor.is_floating_point() and expected.signed and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"Tensor {name!r} holds numbers that are not finite.")
    if tensor.is_floating_point() and not expected.signed and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise CheckpointError(f"Tensor {name!r} holds scales that are not positive and finite.")
    if expected.range is not None:
        low, high = expected.range
        if int(tensor.min()) < low or int(tensor.max()) > high:
            raise CheckpointError(f"Tensor {name!r} holds zero points outside [{low}, {high}].")
