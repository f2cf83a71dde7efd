"""Export to OpenVINO: the blocks of a quantized transformer become compiled graphs; other modules stay in torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ditq.architectures import Architecture
from ditq.components import plan_of
from ditq.conversion.finest import without_steps
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.layers import QuantizedLinear, SteppedLinear, TimestepLinear
from ditq.openvino import runtime
from ditq.openvino import storage as files
from ditq.openvino.attention_ranges import Largest
from ditq.openvino.compiled import CompiledStack
from ditq.openvino.convert import linear_spec
from ditq.openvino.graph import unrounded
from ditq.openvino.linear import LinearSpec, why_inexact
from ditq.openvino.manifest import Manifest, Segment
from ditq.openvino.options import Attention, Shapes
from ditq.openvino.passes.attention import resolved
from ditq.openvino.program import Program
from ditq.openvino.segment import parts, write_segment
from ditq.openvino.settings import PRECISION, compile_config, group_size, why_float
from ditq.openvino.summary import Report, examine, some
from ditq.openvino.threads import one_thread
from ditq.plan import Plan
from ditq.reading import cut
from ditq.trace.arguments import parameters
from ditq.trace.stacks import capture
from ditq.trace.variations import variations


def export(
    model: nn.Module,
    architecture: Architecture,
    call: Mapping[str, Any],
    folder: str | Path,
    *,
    largest: Mapping[str, Largest] | None = None,
    allow_float: bool = False,
) -> Report:
    """Writes the blocks of a transformer quantized by ditq as OpenVINO graphs; the model is not changed.

    Batch, resolution and text length stay open. Linears that the plan keeps in 16 bit, norms, attention and all other
    operations of a block are computed in float32.

    Args:
        call: keyword arguments of one call of the model, see :func:`ditq.sampling.first_call.first_call`.
        folder: an existing folder, for a graph of every stack and a small JSON file.
        largest: ranges of the queries and keys of every block, see
            :func:`ditq.openvino.attention_ranges.observed`; they are then rounded to 8 bits.
        allow_float: accepts layers whose shape keeps OpenVINO from multiplying integers, and models without quantized
            layers.

    Returns:
        The execution of each layer on this machine.

    Raises:
        UsageError: the model is not quantized, or its plan has formats that OpenVINO does not execute.
        DitqError: OpenVINO or its integer kernels are not available, a layer would be executed in floats,
            or the exported graph does not compute what the model computes.
    """
    import openvino as ov

    runtime.require()
    folder = Path(folder)
    specs = _specs(model, architecture, allow_float)
    width = group_size(specs.values())
    reasons = _float_shapes(specs, width, allow_float)
    specs |= {name: replace(specs[name], activation=None) for name in reasons}
    config = compile_config(width)
    segments, programs = [], []
    was_training = model.training
    model.eval()
    try:
        for stack in architecture.stacks:
            first, second = (capture(model, stack, c) for c in variations(call, architecture, model))
            for part in parts(model, stack, first, second):
                segment, check = write_segment(part, folder, specs, reasons, width, largest)
                segments.append(segment)
                programs.append(files.program(folder, segment, config))
                in_floats = files.program(folder, segment, compile_config(0), change=unrounded)
                check.run(segment.place, in_floats, programs[-1])
    finally:
        model.train(was_training)
    manifest = Manifest(
        openvino=ov.__version__, architecture=architecture.name, group_size=width, segments=tuple(segments)
    )
    report = examine(manifest, programs, config[PRECISION], allow_float)
    manifest.write(folder, plan_of(model))
    return report


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    properties: Mapping[str, str | int] | None = None,
    shapes: Shapes = "dynamic",
    attention: Attention = "f32",
    allow_float: bool = False,
) -> Report:
    """Replaces the blocks of a transformer by the compiled ones of an exported folder of the same class.

    The model's blocks are dropped and need no weights (they may be on the meta device), except for modules inside them
    that the model itself calls (``Segment.kept``; DiT's ``norm1.emb``).

    Args:
        properties: of OpenVINO, by its names: ``INFERENCE_NUM_THREADS``, ``NUM_STREAMS``, ``CACHE_DIR``
            (a cache of compiled models), ``INFERENCE_PRECISION_HINT`` (``bf16`` is faster on CPUs that support it,
            and rounds all tensors between the linears).
        shapes: "static" compiles for the sizes of each call, see :class:`ditq.openvino.program.Program`.
        attention: see :mod:`ditq.openvino.options`; "int8" takes effect at export, and is the same as "auto" here.
        allow_float: accepts layers that this machine cannot execute on integers.

    Raises:
        CheckpointError: the folder is damaged, or does not fit the model.
        UsageError: OpenVINO refuses a property.
        DitqError: OpenVINO is not available here, or a layer would be executed in floats.
    """
    runtime.require()
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for segment in manifest.segments:
        _check_place(model, segment)
    config = compile_config(manifest.group_size, properties)
    half = resolved(attention) == "bf16" and config[PRECISION] != "bf16"  # else everything is in bf16 already
    programs = [files.program(folder, segment, config, shapes, half=half) for segment in manifest.segments]
    report = examine(manifest, programs, config[PRECISION], allow_float)
    for segment, program in zip(manifest.segments, programs, strict=True):
        _install(model, segment, program)
    if all(program.small for program in programs):
        one_thread(model)
    return report


def compile_in_place(
    model: nn.Module,
    architecture: Architecture,
    call: Mapping[str, Any],
    *,
    properties: Mapping[str, str | int] | None = None,
    shapes: Shapes = "dynamic",
    attention: Attention = "f32",
    largest: Mapping[str, Largest] | None = None,
    allow_float: bool = False,
) -> Report:
    """:func:`export` and :func:`load` with a temporary folder. Arguments and errors as there."""
    with tempfile.TemporaryDirectory(prefix="ditq-") as folder:
        export(model, architecture, call, folder, largest=largest, allow_float=allow_float)
        # Except on Windows a deleted file stays mapped, and mapped weights need no additional memory.
        extra = {files.MMAP: "NO"} if os.name == "nt" else {}
        options = {**(properties or {}), **extra}
        return load(folder, model, properties=options, shapes=shapes, attention=attention, allow_float=allow_float)


def _specs(model: nn.Module, architecture: Architecture, allow_float: bool) -> dict[str, LinearSpec]:
    """The quantized linears of all blocks; raises if OpenVINO cannot execute one as planned."""
    specs: dict[str, LinearSpec] = {}
    inexact: dict[str, list[str]] = {}
    for stack in architecture.stacks:
        for name, module in model.get_submodule(stack).named_modules(prefix=stack):
            if isinstance(module, TimestepLinear):
                raise UsageError(
                    f"Layer {name!r} has integers per timestep range, and an OpenVINO graph does not have the "
                    "timestep. Quantize with a recipe without balance.timesteps."
                )
            if isinstance(module, SteppedLinear):
                raise UsageError(_with_steps(name, plan_of(model)))
            # Nested layers (adapters around a quantized linear) are listed by the name of the inner one.
            if isinstance(module, QuantizedLinear):
                specs[name] = linear_spec(name, module)
                if (reason := why_inexact(specs[name])) is not None:
                    formats = f"weights {module.plan.weight} and activations {module.plan.activation}: {reason}"
                    inexact.setdefault(formats, []).append(name)
    if inexact:
        detail = "; ".join(f"{some(names)} with {reason}" for reason, names in inexact.items())
        raise UsageError(
            f"OpenVINO cannot execute this plan exactly: {detail}. With groups use dynamic symmetric int8 activations."
        )
    if not specs and not allow_float:
        raise UsageError(
            f"The blocks of this {type(model).__name__} have no quantized layers; quantize it first (ditq quantize)."
        )
    return specs


def _with_steps(name: str, plan: Plan | None) -> str:
    """Why a plan with activation grids by timestep is refused, with the nearest one that is not."""
    cost = ""
    if plan is not None:
        nearest = without_steps(plan)
        cost = f" ({nearest.average_activation_bits:.2f} bits an input instead of {plan.average_activation_bits:.2f})"
    return (
        f"Layer {name!r} changes its activation grid with the timestep, and an OpenVINO graph does not have the "
        "timestep. The nearest plan that exports has the same weights, and the most precise activations of each layer "
        f"at all timesteps{cost}: pass steps='finest' (--steps finest)."
    )


def _float_shapes(specs: Mapping[str, LinearSpec], width: int, allow_float: bool) -> dict[str, str]:
    """Layers whose shape does not allow integers, with the reason; an error unless ``allow_float``."""
    reasons = {name: reason for name, spec in specs.items() if (reason := why_float(spec, width)) is not None}
    if reasons and not allow_float:
        name, reason = next(iter(reasons.items()))
        raise DitqError(
            f"OpenVINO would execute {len(reasons)} layers in floats, among them {name!r} ({specs[name].kernel}): "
            f"{reason}. Keep such layers in 16 bit, or allow floats (allow_float=True)."
        )
    return reasons


def _check_place(model: nn.Module, segment: Segment) -> None:
    """Raises unless the model has blocks at this place with the arguments of the exported ones."""
    try:
        module: Any = model.get_submodule(segment.place)
        block = module[0] if isinstance(module, nn.ModuleList) else module
        for name in segment.kept:
            block.get_submodule(name)
    except (AttributeError, IndexError) as error:
        raise CheckpointError(
            f"The exported model has {segment.place!r}, which {type(model).__name__} does not have: {error}."
        ) from error
    if parameters(block) != segment.parameters:
        raise CheckpointError(
            f"Blocks of {type(model).__name__} at {segment.place!r} take ({cut(', '.join(parameters(block)))}), "
            f"the exported ones ({cut(', '.join(segment.parameters))}): another version of diffusers?"
        )


def _install(model: nn.Module, segment: Segment, program: Program) -> None:
    module: Any = model.get_submodule(segment.place)
    is_list = isinstance(module, nn.ModuleList)
    block = module[0] if is_list else module
    stack = CompiledStack(segment, program, {name: block.get_submodule(name) for name in segment.kept})
    parent, _, child = segment.place.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.ModuleList([stack]) if is_list else stack)
