"""One graph: its blocks, its arguments, and the check that it computes the same as the blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.digests import tensor_bytes
from ditq.errors import DitqError
from ditq.layers import TimestepLinear
from ditq.numerics import relative_error
from ditq.openvino import storage as files
from ditq.openvino.attention_ranges import Largest
from ditq.openvino.convert import Chain, emulated, graph, traceable
from ditq.openvino.linear import LinearSpec
from ditq.openvino.manifest import Input, Layer, Plain, Segment
from ditq.openvino.passes.attention import rounded_attentions
from ditq.openvino.program import Program
from ditq.trace.arguments import leaves, parameters
from ditq.trace.stacks import BlockCall, StackCall

# Float32 rounding of a deep stack, far below the error of any wrong connection, weight or frozen size.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """A call with other sizes than the traced one.

    Attributes:
        exact: the outputs of the blocks without rounding of activations.
        rounding: relative error of the outputs if activations are rounded as in the graph.
    """

    inputs: dict[str, Tensor]
    exact: tuple[Tensor, ...]
    rounding: tuple[float, ...]

    def run(self, place: str, in_floats: Program, in_integers: Program) -> None:
        """Compares a graph, compiled for float and for integer products, with its blocks.

        With floats it must agree up to float32 rounding, which detects sizes that the trace has frozen. With integers
        it cannot, since one number rounded to the other side changes all following operations; but its error must be
        that of rounding.

        Raises:
            DitqError: they differ.
        """
        mismatch = f"The OpenVINO graph of {place} does not compute what the model computes"
        for program, share in ((in_floats, 0.0), (in_integers, 1.5)):
            try:
                results = program(self.inputs)
            except RuntimeError as error:
                raise DitqError(
                    f"{mismatch}: it takes inputs of one size only ({files.first_line(error)})."
                ) from error
            for i, exact in enumerate(self.exact):
                difference = relative_error(exact, results[i])
                limit = TOLERANCE + share * self.rounding[i]
                if not difference < limit:
                    raise DitqError(
                        f"{mismatch}: its relative error is {difference:.1e}, rounding explains at most {limit:.1e}."
                    )


@dataclass(frozen=True)
class Part:
    """Modules of a model that become one graph: blocks in a row, or a single module.

    Attributes:
        place: the module that the graph will replace.
        blocks: the modules by full name.
        calls: two calls of the first block with different sizes; sizes that are equal in both are fixed.
        link: the index of a block's output, by the argument of the next block.
        kept: modules inside the first block that the model itself calls.
    """

    place: str
    blocks: Mapping[str, nn.Module]
    calls: tuple[BlockCall, BlockCall]
    link: Mapping[str, int] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


def parts(model: nn.Module, stack: str, first: StackCall, second: StackCall) -> list[Part]:
    """One part for a stack whose blocks are chained directly; otherwise one part for each block."""
    blocks: Any = model.get_submodule(stack)
    link = first.chain()
    chained = link is not None and link == second.chain()
    groups = [range(len(blocks))] if chained else [range(i, i + 1) for i in range(len(blocks))]
    return [
        Part(
            stack if len(numbers) == len(blocks) else f"{stack}.{numbers[0]}",
            {f"{stack}.{i}": blocks[i] for i in numbers},
            (first.blocks[numbers[0]], second.blocks[numbers[0]]),
            link or {} if chained else {},
            _kept(stack, numbers, (first, second)),
        )
        for numbers in groups
    ]


@torch.no_grad()
def write_segment(
    part: Part,
    folder: Path,
    specs: Mapping[str, LinearSpec] | None = None,
    reasons: Mapping[str, str] | None = None,
    group_size: int = 0,
    largest: Mapping[str, Largest] | None = None,
) -> tuple[Segment, Check]:
    """Converts a part into one graph and writes it.

    Args:
        specs: the quantized linears of the model, by name.
        reasons: why some of them have 16-bit activations although their plan has 8-bit ones.
        largest: ranges of queries and keys by block, if they are rounded, see
            :func:`ditq.openvino.attention_ranges.observed`.

    Raises:
        DitqError: the blocks are called in a way that a graph does not support.
    """
    specs, reasons, place = specs or {}, reasons or {}, part.place
    call, other = part.calls
    arguments, varied = leaves(call.arguments), leaves(other.arguments)
    if arguments.keys() != varied.keys():
        raise DitqError(f"{place} gets different arguments in different calls; only their sizes may change.")
    # The argument that the output replaces comes first: it determines the output's dtype.
    tensors = sorted(
        (name for name, v in arguments.items() if isinstance(v, Tensor)), key=lambda name: name not in part.link
    )
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    for name, value in constants.items():
        if not isinstance(value, Plain) or varied[name] != value:
            raise DitqError(
                f"Argument {name!r} of {place} is neither a tensor nor a constant ({value!r}, {varied[name]!r}): "
                "such blocks cannot be exported."
            )
    shapes = {name: _open_shape(arguments[name], varied[name]) for name in tensors}
    inputs, check = ({name: _plain(values[name]) for name in tensors} for values in (arguments, varied))
    linears = [spec for name, spec in specs.items() if name.startswith(tuple(f"{block}." for block in part.blocks))]
    attentions = [ranges for block in part.blocks for ranges in (largest or {}).get(block, ())]
    chain = Chain(list(part.blocks.values()), call, part.link, tensors, attentions)
    with traceable(part.blocks, linears):
        with emulated(linears, group_size):
            model = graph(chain, inputs, shapes, linears, group_size)
            digests = files.write(model, folder, place)
            rounded = chain(*check.values())
        with emulated(linears, group_size, rounded=False):
            exact = chain(*check.values())
    segment = Segment(
        place=place,
        file=next(iter(digests)),
        digests=digests,
        parameters=parameters(next(iter(part.blocks.values()))),
        inputs=tuple(Input(name=n, dtype=_dtype(inputs[n]), shape=shapes[n]) for n in tensors),
        constants=constants,
        outputs=len(call.outputs),
        returns=call.returns,
        kept=part.kept,
        layers=tuple(_layers(part.blocks, specs, reasons)),
        attentions=rounded_attentions(model),
    )
    return segment, Check(check, exact, tuple(map(relative_error, exact, rounded)))


def _kept(stack: str, numbers: range, calls: tuple[StackCall, StackCall]) -> tuple[str, ...]:
    """Modules inside these blocks that the model itself calls, relative to the first block."""
    names = sorted(calls[0].outside | calls[1].outside)
    in_part = [name for name in names if int(name.partition(".")[0]) in numbers]
    later = [name for name in in_part if not name.startswith(f"{numbers[0]}.")]
    if later:
        raise DitqError(f"The model calls {stack}.{later[0]} itself; only modules of the first block can be kept.")
    return tuple(name.partition(".")[2] for name in in_part)


def _layers(
    blocks: Mapping[str, nn.Module], specs: Mapping[str, LinearSpec], reasons: Mapping[str, str]
) -> Iterator[Layer]:
    first_names: dict[bytes, str] = {}
    for prefix, block in blocks.items():
        for name, module in block.named_modules(prefix=prefix):
            if not isinstance(module, nn.Linear) or isinstance(module, TimestepLinear):
                continue
            columns, rows = module.in_features, module.out_features
            if name not in specs:
                yield Layer(name=name, columns=columns, rows=rows, reason="16 bit by the plan")
                continue
            kernel = specs[name].kernel
            reason = "" if kernel.integer else reasons.get(name, "16-bit activations by the plan")
            first = first_names.setdefault(_digest(specs[name]), name)
            yield Layer(
                name=name, columns=columns, rows=rows, storage=kernel.storage,
                weight_group=kernel.weight_group, activations=kernel.activations, reason=reason,
                twin="" if first == name else first,
            )  # fmt: skip


def _digest(spec: LinearSpec) -> bytes:
    """A digest of everything that distinguishes layers with the same kernel."""
    weight = spec.weight
    digest = hashlib.sha256(repr((spec.kernel, weight.format, spec.activation, spec.rotation)).encode())
    tensors = (weight.packed, weight.scale, weight.zero_point, spec.bias, spec.smooth, spec.input_scale)
    for tensor in (*tensors, *(spec.branch or ())):
        digest.update(b"none" if tensor is None else tensor_bytes(tensor.float()))
    return digest.digest()


def _open_shape(a: Tensor, b: Tensor) -> tuple[int | None, ...]:
    """The shape of both examples, with None for sizes that differ."""
    return tuple(x if x == y else None for x, y in zip(a.shape, b.shape, strict=True))


def _plain(value: Tensor) -> Tensor:
    """The tensor in a type that OpenVINO takes: float32, int64 or bool, on the CPU."""
    dtype = torch.float32 if value.is_floating_point() else torch.bool if value.dtype == torch.bool else torch.int64
    return value.detach().to("cpu", dtype).contiguous()


def _dtype(value: Tensor) -> Any:
    return str(value.dtype).removeprefix("torch.")
