"""Export to OpenVINO: the blocks of a quantized transformer become one compiled graph, the rest stays torch."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.engines import openvino as engine
from ditq.engines.openvino.linear import LinearSpec, why_inexact
from ditq.engines.openvino.probe import core
from ditq.engines.openvino.settings import PRECISION, compile_config, group_size, why_float
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.export.calls import variations
from ditq.export.capture import StackCall, capture, leaves
from ditq.export.compiled import CompiledStack
from ditq.export.convert import Chain, graph, linear_spec, traceable
from ditq.export.manifest import FILE, Input, Layer, Manifest, Plain, Segment
from ditq.export.report import PLANNED_FLOAT, Report, examine, some
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.numerics import relative_error

# Rounding flips: a value that falls on the other side of a rounding boundary moves the output by one code.
TOLERANCE = 0.02


def export(
    model: nn.Module,
    architecture: Architecture,
    call: Mapping[str, Any],
    folder: str | Path,
    *,
    allow_float: bool = False,
) -> Manifest:
    """Writes the blocks of a transformer that ditq has quantized as OpenVINO graphs; the model stays as it is.

    Batch, resolution and text length stay open. Linears that the plan keeps in 16 bit, norms, attention
    and everything else of a block is computed in float32.

    Args:
        call: keyword arguments of one call of the model, see :func:`ditq.export.calls.record`.
        folder: an existing folder; gets a graph for every stack and a small JSON file.
        allow_float: takes layers whose shape keeps OpenVINO from multiplying integers.

    Raises:
        UsageError: the model is not quantized, or its plan has formats that OpenVINO does not execute.
        DitqError: OpenVINO or its integer kernels are not available, a layer would be executed in floats,
            or the exported graph does not compute what the model computes.
    """
    import openvino as ov

    _require_engine()
    folder = Path(folder)
    quantized = _check(model, architecture)
    specs = {name: linear_spec(name, layer) for name, layer in quantized.items()}
    width = group_size(specs.values())
    reasons = _float_shapes(specs, width, allow_float)
    for name in reasons:
        specs[name] = replace(specs[name], activation=None)
    calls = variations(call, architecture, model)
    was_training = model.training
    model.eval()
    segments: list[Segment] = []
    try:
        for stack in architecture.stacks:
            first, second = (capture(model, stack, example) for example in calls)
            segments += [
                _segment(model, stack, numbers, (first, second), specs, reasons, width, folder)
                for numbers in _chains(first, second)
            ]
    finally:
        model.train(was_training)
    manifest = Manifest(
        openvino=ov.__version__, architecture=architecture.name, group_size=width, segments=tuple(segments)
    )
    config = compile_config(width)
    compiled = [_compile(folder, segment, config) for segment in manifest.segments]
    examine(manifest, compiled, config[PRECISION], allow_float)
    manifest.write(folder)
    return manifest


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    properties: Mapping[str, str | int] | None = None,
    allow_float: bool = False,
) -> Report:
    """Puts the compiled blocks of an exported folder into a transformer of the same class, in place of its own.

    The model's own blocks are dropped and may be without weights (on the meta device), except for those of
    their modules that the model itself calls (``Segment.kept``; DiT's ``norm1.emb``).

    Args:
        properties: of OpenVINO, by its names (``INFERENCE_NUM_THREADS``, ``NUM_STREAMS``, ``CACHE_DIR``, ...).
        allow_float: takes layers that this machine cannot execute on integers.

    Raises:
        CheckpointError: the folder is damaged, or does not fit the model.
        UsageError: OpenVINO does not know a property.
        DitqError: OpenVINO is not available here, or a layer would be executed in floats.
    """
    _require_engine()
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for segment in manifest.segments:
        _check_place(model, segment)
    config = compile_config(manifest.group_size, properties)
    compiled = [_compile(folder, segment, config) for segment in manifest.segments]
    report = examine(manifest, compiled, config[PRECISION], allow_float)
    for segment, compiled_graph in zip(manifest.segments, compiled, strict=True):
        _install(model, segment, compiled_graph)
    return report


def compile_in_place(
    model: nn.Module,
    architecture: Architecture,
    call: Mapping[str, Any],
    *,
    properties: Mapping[str, str | int] | None = None,
    allow_float: bool = False,
) -> Report:
    """:func:`export` and :func:`load` without a folder that stays. Arguments and errors as there."""
    with tempfile.TemporaryDirectory(prefix="ditq-") as folder:
        export(model, architecture, call, folder, allow_float=allow_float)
        # The files go away: OpenVINO must not map them into memory.
        return load(folder, model, properties={"ENABLE_MMAP": "NO", **(properties or {})}, allow_float=allow_float)


# ------------------------------------------------------------------------------------------- checks


def _require_engine() -> None:
    reason = engine.ENGINE.why_unavailable()
    if reason is not None:
        raise DitqError(f"Engine 'openvino' is not available: {reason}.")


def _check(model: nn.Module, architecture: Architecture) -> dict[str, QuantizedLinear]:
    """The quantized linears of all blocks; refuses what cannot be executed as planned."""
    found: dict[str, QuantizedLinear] = {}
    inexact: dict[str, list[str]] = {}
    for stack in architecture.stacks:
        for name, module in model.get_submodule(stack).named_modules(prefix=stack):
            if isinstance(module, TimestepLinear):
                raise UsageError(
                    f"Layer {name!r} has its own integers for each range of timesteps, and an OpenVINO graph has no "
                    "clock. Quantize with a recipe without balance.timesteps."
                )
            if isinstance(module, QuantizedLinear):
                found[name] = module
                if (reason := why_inexact(module.plan.activation)) is not None:
                    inexact.setdefault(f"activations {module.plan.activation}: {reason}", []).append(name)
    if inexact:
        detail = "; ".join(f"{some(names)} with {reason}" for reason, names in inexact.items())
        raise UsageError(
            f"OpenVINO cannot execute this plan exactly: {detail}. Use a recipe with dynamic int8 activations."
        )
    if not found:
        raise UsageError(
            f"The blocks of this {type(model).__name__} have no quantized layers; quantize it first (ditq quantize)."
        )
    return found


def _float_shapes(specs: Mapping[str, LinearSpec], width: int, allow_float: bool) -> dict[str, str]:
    """Layers whose shape rules integers out, with the reason; an error unless that is allowed."""
    reasons = {
        name: reason
        for name, spec in specs.items()
        if spec.activation is not None and (reason := why_float(spec, width)) is not None
    }
    if reasons and not allow_float:
        name, reason = next(iter(reasons.items()))
        raise DitqError(
            f"OpenVINO would execute {len(reasons)} layers in floats, among them {name!r} ({specs[name].kernel}): "
            f"{reason}. Keep such layers in 16 bit, or allow floats (allow_float=True)."
        )
    return reasons


# ------------------------------------------------------------------------------------------- export


def _chains(first: StackCall, second: StackCall) -> list[range]:
    """Which blocks become one graph: all, where each one's output goes straight into the next; else each alone."""
    count = len(first.blocks)
    if first.chain() is not None and first.chain() == second.chain():
        return [range(count)]
    return [range(i, i + 1) for i in range(count)]


def _segment(
    model: nn.Module,
    stack: str,
    numbers: range,
    calls: tuple[StackCall, StackCall],
    specs: Mapping[str, LinearSpec],
    reasons: Mapping[str, str],
    width: int,
    folder: Path,
) -> Segment:
    """Exports some blocks of a stack, and checks the graph on the second call."""
    all_blocks: Any = model.get_submodule(stack)
    whole = len(numbers) == len(all_blocks)
    place = stack if whole else f"{stack}.{numbers[0]}"
    blocks = {f"{stack}.{i}": all_blocks[i] for i in numbers}
    call, other = (c.blocks[numbers[0]] for c in calls)
    link = (calls[0].chain() or {}) if whole else {}
    given, varied = leaves(call.arguments), leaves(other.arguments)
    tensors = sorted((n for n, v in given.items() if isinstance(v, Tensor)), key=lambda n: n not in link)
    constants = {name: value for name, value in given.items() if name not in tensors}
    _check_constants(place, constants, varied)
    inputs = {name: _plain(given[name]) for name in tensors}
    shapes = {
        name: tuple(a if a == b else None for a, b in zip(given[name].shape, varied[name].shape, strict=True))
        for name in tensors
    }
    linears = [spec for name, spec in specs.items() if name.startswith(tuple(f"{block}." for block in blocks))]
    chain = Chain(list(blocks.values()), call, link, tensors)
    with traceable(blocks, linears, width), torch.no_grad():
        converted = graph(chain, inputs, shapes, linears, width)
        check = {name: _plain(varied[name]) for name in tensors}
        expected = chain(*check.values())
    file = f"{place}.xml"
    _save(converted, folder / file)
    del converted
    segment = Segment(
        place=place,
        file=file,
        parameters=tuple(call.arguments),
        inputs=tuple(Input(name=n, dtype=_dtype(inputs[n]), shape=shapes[n]) for n in tensors),
        constants=constants,
        outputs=len(call.outputs),
        single=call.single,
        kept=_kept(stack, numbers, calls),
        digests={name: digest(folder / name) for name in (file, f"{place}.bin")},
        layers=tuple(_layers(blocks, specs, reasons)),
    )
    _check_graph(segment, folder, width, check, expected)
    return segment


def _check_constants(place: str, constants: Mapping[str, Any], varied: Mapping[str, Any]) -> None:
    for name, value in constants.items():
        if not isinstance(value, Plain):
            raise DitqError(f"Argument {name!r} of {place} is a {type(value).__name__} and cannot be exported.")
        if name not in varied or varied[name] != value:
            raise DitqError(
                f"Argument {name!r} of {place} is a number that depends on the size of the input ({value} and "
                f"{varied.get(name)}); only tensors may."
            )


def _kept(stack: str, numbers: range, calls: tuple[StackCall, StackCall]) -> tuple[str, ...]:
    """Modules inside these blocks that the model itself calls, relative to the first block."""
    names = sorted(calls[0].outside | calls[1].outside)
    prefix = f"{numbers[0]}."
    here = [name for name in names if int(name.partition(".")[0]) in numbers]
    strays = [name for name in here if not name.startswith(prefix)]
    if strays:
        raise DitqError(f"The model calls {stack}.{strays[0]} itself; only modules of the first block can be kept.")
    return tuple(name.removeprefix(prefix) for name in here)


def _layers(
    blocks: Mapping[str, nn.Module], specs: Mapping[str, LinearSpec], reasons: Mapping[str, str]
) -> Iterator[Layer]:
    for prefix, block in blocks.items():
        for name, module in block.named_modules(prefix=prefix):
            if not isinstance(module, nn.Linear) or isinstance(module, TimestepLinear):
                continue
            shape = {"name": name, "columns": module.in_features, "rows": module.out_features}
            if name not in specs:
                yield Layer(**shape, reason=PLANNED_FLOAT)
                continue
            kernel = specs[name].kernel
            yield Layer(
                **shape, storage=kernel.storage, weight_group=kernel.weight_group, integer=kernel.integer,
                reason="" if kernel.integer else reasons.get(name, "16-bit activations by its plan"),
            )  # fmt: skip


def _check_graph(
    segment: Segment, folder: Path, width: int, inputs: Mapping[str, Tensor], expected: tuple[Tensor, ...]
) -> None:
    """Compares the graph with the blocks it was made of, on a call of other sizes than the traced one.

    A size that the trace has frozen, or an input that was mistaken for a constant, shows here.
    """
    compiled = _compile(folder, segment, compile_config(width))
    results = compiled({name: x.numpy() for name, x in inputs.items()})
    for i, reference in enumerate(expected):
        error = relative_error(reference, torch.from_numpy(results[i]))
        if not error < TOLERANCE:
            raise DitqError(
                f"The OpenVINO graph of {segment.place} does not compute what the model computes (relative error "
                f"{error:.1e}, at most {TOLERANCE:g} is allowed): this architecture cannot be exported."
            )


def _save(converted: Any, path: Path) -> None:
    import openvino as ov

    ov.save_model(converted, str(path), compress_to_fp16=False)


def _plain(value: Tensor) -> Tensor:
    """As OpenVINO takes it: float32, int64 or bool, on the CPU."""
    value = value.detach().cpu()
    if value.is_floating_point():
        return value.float().contiguous()
    return value.contiguous() if value.dtype == torch.bool else value.long().contiguous()


def _dtype(value: Tensor) -> Any:
    return str(value.dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------- load


def _compile(folder: Path, segment: Segment, config: Mapping[str, str]) -> Any:
    for name, expected in segment.digests.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}.")
        if digest(path) != expected:
            raise CheckpointError(f"{path} was changed since it was exported, or is damaged.")
    try:
        model = core().read_model(str(folder / segment.file))
    except RuntimeError as error:
        raise CheckpointError(f"OpenVINO cannot read {folder / segment.file}: {_first_line(error)}") from error
    names = [name for port in model.inputs for name in port.get_names()]
    if sorted(names) != sorted(spec.name for spec in segment.inputs) or len(model.outputs) != segment.outputs:
        raise CheckpointError(f"{folder / segment.file} does not have the inputs and outputs that {FILE} says.")
    try:
        return core().compile_model(model, "CPU", dict(config))
    except RuntimeError as error:
        raise UsageError(f"OpenVINO cannot compile {segment.place}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_place(model: nn.Module, segment: Segment) -> None:
    """Whether the model has blocks at this place that are called as the exported ones were."""
    try:
        found: Any = model.get_submodule(segment.place)
    except AttributeError as error:
        raise CheckpointError(
            f"The exported model has blocks at {segment.place!r}, {type(model).__name__} has none."
        ) from error
    block = found[0] if isinstance(found, nn.ModuleList) else found
    parameters = tuple(inspect.signature(block.forward).parameters)
    if parameters != segment.parameters:
        raise CheckpointError(
            f"Blocks of {type(model).__name__} at {segment.place!r} take ({', '.join(parameters)}), "
            f"the exported ones ({', '.join(segment.parameters)}): another version of diffusers?"
        )
    for name in segment.kept:
        try:
            block.get_submodule(name)
        except AttributeError as error:
            raise CheckpointError(f"{type(model).__name__} has no {segment.place}.{name}.") from error


def _install(model: nn.Module, segment: Segment, compiled: Any) -> None:
    found: Any = model.get_submodule(segment.place)
    whole = isinstance(found, nn.ModuleList)
    block = found[0] if whole else found
    stack = CompiledStack(segment, compiled, {name: block.get_submodule(name) for name in segment.kept})
    parent, _, child = segment.place.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, nn.ModuleList([stack]) if whole else stack)


def digest(path: Path) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
