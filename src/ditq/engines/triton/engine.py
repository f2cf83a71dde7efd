"""Fused kernels for NVIDIA GPUs from Ampere on: two passes over memory, where the torch engine needs many."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditq.engines.base import Activation, FusingEngine, Norm, QuantizedWeight, balance, too_old
from ditq.engines.torch.engine import TorchEngine
from ditq.numerics import Grid, Quantized, Rotation, scaled_signs, unpack

if TYPE_CHECKING:
    from ditq.engines.triton.rows import Target

OLDEST = (3, 6)
"""The oldest version of Triton that the tests of a release compile the kernels with."""

SMALLEST_CAPABILITY = (8, 0)
"""Ampere: 8-bit products on tensor cores, and asynchronous copies to shared memory."""


class TritonEngine(TorchEngine, FusingEngine):
    """Computes the same integers as the torch engine, but faster.

    ``torch.compile`` fuses the quantizer, in plain torch, into the operation before it; the product is one opaque
    operation to it. In eager code the quantizer is a kernel too, fused with the norm or the nonlinearity before it,
    and gate and residual are part of the product. Normal levels of weights and inputs are looked up by torch, in
    passes of their own.
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

    def why_unsupported(self, weight: Grid, activation: Grid | None, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"its kernels run on cuda, not on {device.type}"
        return too_old(device, SMALLEST_CAPABILITY, "the kernels")

    def prove(self, device: torch.device) -> str | None:
        from ditq.engines.triton.proof import prove

        return prove(device)

    def quantize_activations(self, x: Tensor, format: Grid, scale: Tensor | None) -> Quantized:
        return self.quantize_input(x, None, None, format, scale)

    def quantize_input(
        self, x: Tensor, smooth: Tensor | None, rotation: Rotation | None, format: Grid, scale: Tensor | None
    ) -> Quantized:
        groups = format.groups(x.shape[1])
        if torch.compiler.is_compiling() or not _in_kernels(format, scale):
            return super().quantize_activations(balance(x, smooth, rotation), format, scale)
        if rotation is not None and not rotates(rotation, x.shape[1] // groups, x.device):
            x, smooth, rotation = balance(x, smooth, rotation), None, None
        from ditq.engines.triton.quantize import quantize_rows
        from ditq.engines.triton.rows import quantized

        return quantized(quantize_rows(x, *_target(smooth, rotation, format, groups, scale, x.device)), format)

    def quantize_result(
        self,
        of: Norm | Activation,
        smooth: Tensor | None,
        rotation: Rotation | None,
        format: Grid,
        scale: Tensor | None,
    ) -> Quantized | None:
        columns = of.x.shape[1] // (2 if isinstance(of, Activation) and of.gated else 1)
        groups = format.groups(columns)
        size = columns // groups
        if not _in_kernels(format, scale) or (groups > 1 and size & (size - 1)):
            return None
        if rotation is not None and not rotates(rotation, size, of.x.device):
            return None
        from ditq.engines.triton.activation import activation_quantize
        from ditq.engines.triton.norm import norm_quantize
        from ditq.engines.triton.rows import quantized

        target = _target(smooth, rotation, format, groups, scale, of.x.device)
        if isinstance(of, Activation):
            return quantized(activation_quantize(of.x, of.function, of.gated, *target), format)
        if (of.factor is None) != (of.shift is None):
            return None
        return quantized(norm_quantize(of.x, of.eps, of.weight, of.bias, of.factor, of.shift, *target), format)

    def linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return self.gated_linear(x, weight, bias, dtype, None, None)

    def gated_linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        gate: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        from ditq.engines.triton.linear import int8_linear
        from ditq.engines.triton.rows import sums_of

        packed, bits, sums = weight.packed, weight.format.bits, x.sums
        if weight.format.levels == "normal":  # torch looks the levels up; the product takes them as 8-bit integers
            packed, bits = unpack(packed, weight.format, weight.columns), 8
        needed = weight.zero_point is not None or bits == 4
        if sums is None and needed and torch.compiler.is_compiling():
            # The compiler fuses these sums into the quantizer; the product would read the codes a second time.
            sums = sums_of(x.codes, x.scale.shape[1])
        return int8_linear(
            x.codes, x.scale, x.zero_point, sums, packed, bits,
            weight.scale, weight.zero_point, bias, gate, residual, None, None, dtype,
        )  # fmt: skip


def _in_kernels(format: Grid, scale: Tensor | None) -> bool:
    """Whether the kernels quantize inputs so: levels are uniform, and no scale depends on several rows."""
    return format.levels == "uniform" and not format.full and (scale is not None or format.granularity != "tensor")


def _target(
    smooth: Tensor | None, rotation: Rotation | None, format: Grid, groups: int, scale: Tensor | None,
    device: torch.device,
) -> Target:  # fmt: skip
    from ditq.engines.triton.rows import Target

    signs, block = (None, 0) if rotation is None else (scaled_signs(rotation, device), rotation.block)
    regular = rotation is not None and rotation.kind == "regular"
    return Target(smooth, signs, block, format.bits, format.symmetric, groups, scale, regular)


def rotates(rotation: Rotation, width: int, device: torch.device) -> bool:
    """Whether the kernels support this rotation: its blocks fit tensor cores, and no block spans two groups.

    Before Hopper the compiled kernels spill kilobytes of registers, so torch rotates on such GPUs.
    """
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return hopper and rotation.block in (16, 32, 64, 128) and width % rotation.block == 0
