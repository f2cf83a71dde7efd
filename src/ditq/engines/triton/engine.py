"""Fused kernels for NVIDIA GPUs from Ampere on: what the torch engine does in many passes over memory, in two."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight, balance
from ditq.engines.torch.engine import TorchEngine
from ditq.numerics import Quantized, Rotation
from ditq.plan import TensorFormat

OLDEST = (3, 6)
"""The first version of Triton that the kernels are compiled with in the tests of a release."""

SMALLEST_CAPABILITY = (8, 0)
"""Ampere: 8-bit products on tensor cores, and asynchronous copies to shared memory."""


class TritonEngine(TorchEngine):
    """Equal to the torch engine in the integers, and faster.

    ``torch.compile`` fuses the quantizer, in plain torch, into what comes before it; the product is the one operation
    that it cannot see into. Without it the quantizer is a kernel too.
    """

    name = "triton"
    priority = 10

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'ditq[triton]'"
        found = importlib.metadata.version("triton")
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            return f"Triton {found} is older than {OLDEST[0]}.{OLDEST[1]}: install a newer torch, which brings its own"
        if torch.version.hip is not None:
            return "its kernels are written for NVIDIA GPUs, and this torch is built for AMD"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        return None

    def why_unsupported(
        self, weight: TensorFormat, activation: TensorFormat | None, device: torch.device
    ) -> str | None:
        if device.type != "cuda":
            return f"its kernels run on cuda, not on {device.type}"
        capability = torch.cuda.get_device_capability(device)
        if capability < SMALLEST_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; "
                f"the kernels need {SMALLEST_CAPABILITY[0]}.{SMALLEST_CAPABILITY[1]}"
            )
        return None

    def quantize_activations(self, x: Tensor, format: TensorFormat, scale: Tensor | None) -> Quantized:
        return self.quantize_input(x, None, None, format, scale)

    def quantize_input(
        self, x: Tensor, smooth: Tensor | None, rotation: Rotation | None, format: TensorFormat, scale: Tensor | None
    ) -> Quantized:
        groups = format.groups(x.shape[1])
        dynamic_tensor = scale is None and format.granularity == "tensor"
        if torch.compiler.is_compiling() or dynamic_tensor:
            return super().quantize_activations(balance(x, smooth, rotation), format, scale)
        if rotation is not None and not rotates(rotation, x.shape[1] // groups, x.device):
            x, smooth, rotation = balance(x, smooth, rotation), None, None
        from ditq.engines.triton.quantize import quantize_rows
        from ditq.engines.triton.rows import quantized, scaled_signs

        signs = None if rotation is None else scaled_signs(rotation, x.device)
        block = 0 if rotation is None else rotation.block
        return quantized(quantize_rows(x, smooth, signs, block, format.bits, format.symmetric, groups, scale))

    def linear(
        self,
        x: Quantized,
        x_format: TensorFormat,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        from ditq.engines.triton.linear import int8_linear
        from ditq.engines.triton.rows import sums_of

        sums = x.sums
        needed = weight.zero_point is not None or weight.format.bits == 4
        if sums is None and needed and torch.compiler.is_compiling():
            # Here the compiler fuses them into the quantizer; the product would read the codes once more.
            sums = sums_of(x.codes, x.scale.shape[1])
        return int8_linear(
            x.codes, x.scale, x.zero_point, sums, weight.packed, weight.format.bits,
            weight.scale, weight.zero_point, bias, None, None, dtype,
        )  # fmt: skip


def rotates(rotation: Rotation, width: int, device: torch.device) -> bool:
    """Whether the kernels have this rotation: blocks that a tensor core takes, none of them across two groups.

    Before Hopper the compiled kernels spill kilobytes of registers, so torch rotates there.
    """
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and rotation.block in (16, 32, 64, 128) and width % rotation.block == 0
