"""Converts a stack of blocks to an OpenVINO graph: one trace, with every quantized linear as one operation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ditq.layers import QuantizedLinear
from ditq.openvino import attention_ranges
from ditq.openvino.graph import Builder
from ditq.openvino.linear import LinearSpec, emulate
from ditq.openvino.settings import GROUP_SIZE
from ditq.trace.arguments import filled
from ditq.trace.stacks import BlockCall, returned

# The linears that ``ditq::openvino_linear`` indexes, G, and whether their inputs are rounded.
_linears: ContextVar[tuple[Sequence[LinearSpec], int, bool]] = ContextVar("ditq_openvino_linears")

_library = torch.library.Library("ditq", "FRAGMENT")
_library.define("openvino_linear(Tensor x, int index) -> Tensor")
_library.define("openvino_codes(Tensor x, float scale) -> Tensor")


def _openvino_linear(x: Tensor, index: int) -> Tensor:
    linears, group_size, rounded = _linears.get()
    return emulate(x, linears[index], group_size, torch.float32, rounded)


def _openvino_codes(x: Tensor, scale: float) -> Tensor:
    return attention_ranges.emulate(x, scale) if _linears.get()[2] else x.clone()


_library.impl("openvino_linear", _openvino_linear, "CompositeExplicitAutograd")
_library.impl("openvino_codes", _openvino_codes, "CompositeExplicitAutograd")


class _Stub(nn.Module):
    """Replaces a quantized linear while its block is traced."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ditq.openvino_linear(x, self.index)


class Chain(nn.Module):
    """Blocks in a row as one function of tensors.

    Args:
        example: a call of the first block; its arguments that are not tensors are constants.
        link: the index of a block's output, by the argument of the next block.
        names: of the tensor arguments, in the order of this function's arguments.
        largest: ranges of the queries and keys of each attention, if they are rounded.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        example: BlockCall,
        link: Mapping[str, int],
        names: Sequence[str],
        largest: attention_ranges.Largest = (),
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.example, self.link, self.names, self.largest = example, dict(link), list(names), largest

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(zip(self.names, tensors, strict=True))
        outputs: tuple[Tensor, ...] = ()
        with attention_ranges.rounding(self.largest):
            for block in self.blocks:
                outputs, _ = returned(block(**filled(self.example.arguments, arguments)), "a block")
                arguments |= {name: outputs[i] for name, i in self.link.items()}
        return outputs


def linear_spec(name: str, layer: QuantizedLinear) -> LinearSpec:
    """The description of a quantized layer for the export."""
    return LinearSpec(
        name,
        layer.quantized_weight,
        None if layer.bias is None else layer.bias.detach(),
        layer.plan.activation,
        layer._buffers.get("smooth_scale"),
        layer.rotation,
        layer._buffers.get("input_scale"),
        None if layer.plan.branch is None else (layer.branch_down, layer.branch_up),
    )


@contextmanager
def emulated(linears: Sequence[LinearSpec], group_size: int, rounded: bool = True) -> Iterator[None]:
    """Inside, stubs emulate OpenVINO with this group size, with or without rounding of their inputs."""
    token = _linears.set((linears, group_size, rounded))
    try:
        yield
    finally:
        _linears.reset(token)


@contextmanager
def traceable(blocks: Mapping[str, nn.Module], linears: Sequence[LinearSpec]) -> Iterator[None]:
    """Inside, the ``linears`` of the ``blocks`` (by full name) are stubs, and everything else is float32."""
    index = {linear.name: i for i, linear in enumerate(linears)}
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for prefix, block in blocks.items():
            for name, module in list(block.named_modules()):
                if (full := f"{prefix}.{name}") in index:
                    parent, _, child = name.rpartition(".")
                    owner = block.get_submodule(parent)
                    replaced.append((owner, child, module))
                    setattr(owner, child, _Stub(index[full]))
            for tensor in [*block.parameters(), *block.buffers()]:
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    originals.append((tensor, tensor.data))
                    tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data
        for owner, child, module in replaced:
            setattr(owner, child, module)


@torch.no_grad()
def graph(
    chain: Chain,
    inputs: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int | None]],
    linears: Sequence[LinearSpec],
    group_size: int,
) -> Any:
    """The ``openvino.Model`` of a chain, inside of :func:`traceable` and :func:`emulated`.

    Args:
        inputs: example values of the tensor arguments.
        shapes: of the arguments, with None for sizes that may change between calls.
    """
    import openvino as ov
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch import ConversionExtension
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    builder = Builder()

    def convert(context: Any) -> Any:
        linear = linears[context.get_values_from_const_input(1)]
        return builder.linear(context.get_input(0), linear).outputs()

    with warnings.catch_warnings():
        # torch recommends its own exporter, which cannot leave batch, resolution and text length open here.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(chain, tuple(inputs.values()), check_trace=False, strict=False)
    # ov.convert_model does the same, but also sends usage statistics to Intel.
    frontend = FrontEndManager().load_by_framework("pytorch")
    frontend.add_extension(ConversionExtension("ditq::openvino_linear", convert))
    frontend.add_extension(ConversionExtension("ditq::openvino_codes", attention_ranges.convert))
    decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
    model = frontend.convert(frontend.load(decoder))
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    model.reshape({name: ov.PartialShape([-1 if n is None else n for n in shapes[name]]) for name in inputs})
    # So that compiling the file without ditq multiplies integers too.
    model.set_rt_info(str(group_size), ["runtime_options", GROUP_SIZE])
    return model
