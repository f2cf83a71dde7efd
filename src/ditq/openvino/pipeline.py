"""Exports a whole pipeline's folder: graphs of its transformers and, optionally, of its other components."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditq.architectures import Architecture
from ditq.components import transformer_names
from ditq.errors import UsageError
from ditq.openvino import attention_ranges, components
from ditq.openvino.export import export
from ditq.sampling import example_condition, first_call

# The largest number of prompts for attention in 8 bits: maxima hardly grow after the first few.
MOST_PROMPTS = 16


def export_pipeline(
    pipe: Any,
    architecture: Architecture,
    root: Path,
    engine: Mapping[str, Any],
    *,
    quantized: Sequence[str],
    condition: str | None = None,
    prompts: Sequence[str] | None = None,
    whole_pipeline: bool = False,
    allow_float: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """Writes graphs into a copy of a pipeline's folder, and sets their engine in the configs.

    Args:
        pipe: the pipeline of that folder, executed by torch; it is not changed.
        root: the copy; ``root/transformer/openvino`` and so on are written.
        engine: the ``engine`` field of the configs, see ``ditq.checkpoint.backend.DitqConfig``.
        quantized: components quantized by ditq; any other transformer stays in torch.
        condition, prompts, whole_pipeline, allow_float, seed, progress: see :func:`ditq.export`.

    Returns:
        The execution of the layers of each component, as text.

    Raises:
        UsageError, DitqError: see :func:`ditq.export`.
    """
    labels = list(getattr(pipe, "labels", None) or {})
    example = condition or example_condition(pipe, architecture)
    # Experts of one pipeline are called with the same arguments, so the call of the first one is an example for all.
    call = first_call(pipe, architecture, [example])
    names, lines = transformer_names(pipe), []
    for name in names:
        if name not in quantized:
            lines.append(f"{name}: stays in torch: it is not quantized by ditq.")
            continue
        largest = None
        if engine["attention"] == "int8":
            largest = attention_ranges.sampled_ranges(
                pipe, architecture, _calibration(prompts, labels), component=name, seed=seed, progress=progress
            )
        graphs = _empty(root / name / str(engine["name"]))
        report = export(
            getattr(pipe, name), architecture, call, graphs, largest=largest, allow_float=allow_float
        )  # fmt: skip
        _set_engine(root / name / "config.json", engine)
        lines.append(f"{name}: {report.summary()}" if len(names) > 1 else report.summary())
    if whole_pipeline:
        others = components.export_components(pipe, root, {**engine, "attention": "f32"})
        lines += [f"{name}: {f'stays in torch: {why}' if why else 'in floats'}." for name, why in others.items()]
    return "\n".join(lines)


def _calibration(prompts: Sequence[str] | None, labels: Sequence[str]) -> list[str]:
    """The prompts, or evenly spaced classes; at most :data:`MOST_PROMPTS`."""
    chosen = list(prompts or labels[:: max(1, len(labels) // MOST_PROMPTS)])[:MOST_PROMPTS]
    if not chosen:
        raise UsageError("attention='int8' computes scales from samples: pass prompts=[...] (--prompts FILE).")
    return chosen


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _set_engine(path: Path, engine: Mapping[str, Any]) -> None:
    """Sets the engine in the config of a quantized component; its plan is not changed."""
    content = json.loads(path.read_text())
    plan = {k: v for k, v in content["quantization_config"].items() if k not in ("quant_method", "engine")}
    content["quantization_config"] = {"quant_method": "ditq", "engine": dict(engine), **plan}
    path.write_text(json.dumps(content, indent=2) + "\n")
