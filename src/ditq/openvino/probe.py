"""Proves that the CPU plugin multiplies integers, since its runtime graph looks the same if it multiplies floats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.errors import DitqError
from ditq.numerics import Grid, pack, relative_error
from ditq.openvino.graph import Builder
from ditq.openvino.linear import BIAS, Kernel, LinearSpec, emulate
from ditq.openvino.settings import PRECISION, compile_config

Execution = Literal["int8", "float"]

# The suffix that OpenVINO appends to a product's name when it moves the weight scales after it.
_RESCALED = "/DequantizationMultiply"

# Rows of a probe: more than one block of the plugin's loops, and not a multiple of one.
ROWS = 19


@cache
def core() -> Any:
    """OpenVINO's entry point; one per process, since each has separate caches and threads."""
    import openvino as ov

    return ov.Core()


@cache
def execution(kernel: Kernel, group_size: int, precision: str = "f32") -> Execution:
    """Compiles one layer and determines from its output, or its edges, how it was executed.

    The input is constructed such that 8-bit codes have no ties and are exact in bf16, but far from the input: in every
    group of ``group_size`` channels one value of 127 * 2^k sets the scale to 2^k, and all others are odd. If the
    plugin rounds the input, integer execution then differs from float execution by percents, and from its emulation
    only by the rounding of float32 (or bf16) outputs. If the graph rounds it, both executions round; then the plugin
    must read u8, for which it has integer kernels only.

    Raises:
        DitqError: the output is neither that of integers nor that of floats, so it is wrong.
    """
    import openvino as ov
    import openvino.opset13 as op

    linear, x = synthetic(kernel, group_size)
    node = op.parameter([-1, -1, kernel.columns], ov.Type.f32)
    model = ov.Model([op.result(Builder().linear(node.output(0), linear))], [node], "probe")
    compiled = core().compile_model(model, "CPU", compile_config(group_size, {PRECISION: precision}))
    y = torch.from_numpy(compiled([x[None].numpy()])[0][0])
    errors: dict[Execution, float] = {
        "float": relative_error(emulate(x, linear, group_size, rounded=False), y),
        "int8": relative_error(emulate(x, linear, group_size), y),
    }
    closest = min(errors, key=lambda name: errors[name])
    if not errors[closest] < (1e-5 if precision == "f32" else 5e-3):
        raise DitqError(
            f"OpenVINO {ov.__version__} computes a linear layer ({kernel}) wrongly on this CPU: its output differs by "
            f"{errors['int8']:.1e} from integer products and by {errors['float']:.1e} from float products."
        )
    return closest if multiplies(compiled, {linear.name: kernel})[linear.name] else "float"


def multiplies(compiled: Any, kernels: Mapping[str, Kernel]) -> dict[str, bool]:
    """Whether layers of a compiled graph have the integer operands of their kernels, not expanded by any pass.

    Args:
        kernels: by the name of the layer.
    """
    operands: dict[str, tuple[str, ...]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if node.get_input_size() > 1 and info["layerType"].astype(str) == "FullyConnected":
            kinds = tuple(node.input(i).get_element_type().get_type_name() for i in (0, 1))
            for name in info["originalLayersNames"].astype(str).split(","):
                operands[name.removesuffix(BIAS).removesuffix(_RESCALED)] = kinds
    missing = ("", "")
    return {
        name: operands.get(name, missing)[1] == kernel.element_type
        and (kernel.activations != "graph" or operands[name][0] == "u8")
        for name, kernel in kernels.items()
    }


def synthetic(kernel: Kernel, group_size: int) -> tuple[LinearSpec, Tensor]:
    """A layer with this kernel and random integers, and an input [ROWS, K] that distinguishes integers from floats."""
    generator = torch.Generator().manual_seed(0)
    bits = int(kernel.storage[1:])
    symmetric = kernel.storage.startswith("i")
    top = 2 ** (bits - 1) - 1

    def codes(*shape: int) -> Tensor:
        return torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)

    group = kernel.weight_group
    weight_codes = codes(kernel.rows, kernel.columns)
    weight_codes[0] = top
    fmt = Grid(bits=bits, symmetric=symmetric, granularity="group" if group else "channel", group_size=group)
    scales = (kernel.rows, fmt.groups(kernel.columns))
    weight = QuantizedWeight(
        pack(weight_codes, bits),
        0.5 + torch.rand(scales, generator=generator),
        None if symmetric else codes(*scales),
        kernel.columns,
        fmt,
    )
    step = kernel.columns
    if kernel.activations == "plugin":
        step = group_size or step
        activation = Grid(bits=8, granularity="group", group_size=max(step, 8), dynamic=True)
    else:
        activation = Grid(bits=8, granularity="token", dynamic=True)
    x = 2.0 * torch.randint(-10, 10, (ROWS, kernel.columns), generator=generator) + 1
    for i, begin in enumerate(range(0, kernel.columns, step)):
        x[:, begin] = 127 * 2.0 ** (2 + i % 3)
    x[0] = 127 * 4  # with weight 0 the largest possible sum, which saturating instructions would clip
    return LinearSpec("probe", weight, None, activation if kernel.integer else None), x
