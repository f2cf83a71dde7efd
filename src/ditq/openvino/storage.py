"""Writes, checks and compiles graphs on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ditq import digests
from ditq.errors import CheckpointError, UsageError
from ditq.openvino.manifest import FILE, Segment
from ditq.openvino.options import Shapes
from ditq.openvino.passes.constants import keep_bf16, shrink
from ditq.openvino.passes.rewrite import rewrite
from ditq.openvino.probe import core
from ditq.openvino.program import Program

MMAP = "ENABLE_MMAP"


def write(graph: Any, folder: Path, place: str) -> dict[str, str]:
    """Writes an ``openvino.Model`` as ``PLACE.xml`` and ``PLACE.bin``; returns the digest of each file."""
    import openvino as ov

    path = folder / f"{place}.xml"
    shrink(graph)
    rewrite(graph)
    ov.save_model(graph, str(path), compress_to_fp16=False)  # scales stay float32
    return {name: digests.of_file(folder / name) for name in (path.name, path.with_suffix(".bin").name)}


def program(
    folder: Path,
    segment: Segment,
    config: Mapping[str, str],
    shapes: Shapes = "dynamic",
    change: Callable[[Any], Any] | None = None,
    half: bool = False,
) -> Program:
    """The compiled graph of a segment.

    Args:
        change: transforms the graph from the file.
        half: computes long attention in bf16, see :class:`ditq.openvino.program.Program`.

    Raises:
        CheckpointError: a file is missing, was changed, or is not the graph of the manifest.
        UsageError: OpenVINO refuses a property.
    """
    for name, digest in segment.digests.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} does not contain {name}.")
        if digests.of_file(folder / name) != digest:
            raise CheckpointError(f"{folder / name} was changed since it was exported, or is damaged.")
    path = folder / segment.file
    reading = {key: value for key, value in config.items() if key == MMAP}
    try:
        graph = core().read_model(str(path), config=reading)
    except RuntimeError as error:
        raise CheckpointError(f"OpenVINO cannot read {path}: {first_line(error)}") from error
    keep_bf16(graph)
    inputs = {name: port for port in graph.inputs for name in port.get_names()}
    if inputs.keys() != {spec.name for spec in segment.inputs} or len(graph.outputs) != segment.outputs:
        raise CheckpointError(f"{path} does not have the inputs and outputs listed in {FILE}.")
    try:
        return Program(graph if change is None else change(graph), config, shapes, half)
    except RuntimeError as error:
        raise UsageError(f"OpenVINO cannot compile {path}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an OpenVINO error, without positions in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(("Exception from", "Check '"))), "no reason")
