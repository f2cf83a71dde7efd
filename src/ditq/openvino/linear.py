"""One quantized linear layer in OpenVINO's CPU plugin: the choice of its kernel, and the reference for it.

The plugin has two ways to multiply 8-bit integers, and ditq chooses one for each layer:

* ``graph``: the graph itself rounds the input to 8-bit codes (scales from reductions, or static ones), the plugin
  multiplies u8 by i8 codes in int32, and the graph rescales. This follows the plan exactly, for any scales of whole
  tokens, and is the faster way. Weights take 8 bits each.
* ``plugin``: the plugin turns a product with weights that are dequantized in the graph into one node. The node stores
  the integer weights, 4-bit ones too, and quantizes its input at run time: symmetric, 8 bits, a scale for every token
  and every G channels. If one of its conditions does not hold, it silently multiplies floats, three times slower. The
  conditions, determined by experiment with OpenVINO 2026.4:
  G = DYNAMIC_QUANTIZATION_GROUP_SIZE, one number for a whole model, is a multiple of 16 and at most K; groups of
  weights are whole multiples of G; weights are u8 or u4 with zero points of the same type, or i8 or i4 without;
  there is more than one output, and the CPU has VNNI.

Weights with normal levels are constants of 8 bits, the levels themselves, in every kernel: the plugin has no tables.

``ditq.openvino.probe`` proves for every kernel that it multiplies integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.numerics import Grid, Quantized, Rotation, dequantize, fake_quantize, rotate, unpack
from ditq.numerics.grid import Granularity

Storage = Literal["i8", "u8", "i4", "u4"]
Activations = Literal["float", "plugin", "graph"]

# Suffixes of a layer's name in the names of its other nodes.
BIAS, CLIP, SHIFT, SUMS = "/bias", "/clip", "/shift", "/sums"

# The smallest number of input channels, and the unit of groups, that the plugin itself quantizes.
STEP = 16


@dataclass(frozen=True)
class Kernel:
    """The properties that determine how the plugin executes a linear layer; the probe runs every kernel once.

    Attributes:
        columns: K, input features.
        rows: N, output features.
        storage: element type of the weight; unsigned ones have zero points.
        weight_group: input channels that share a weight scale; None: all of them.
        activations: where they are rounded; "float": nowhere, and the kernel multiplies floats.
    """

    columns: int
    rows: int
    storage: Storage
    weight_group: int | None = None
    activations: Activations = "graph"

    @property
    def integer(self) -> bool:
        """Whether the plan has integer activations."""
        return self.activations != "float"

    @property
    def element_type(self) -> str:
        """Element type of the weight in the compiled graph, which subtracts zero points after the product."""
        return "i8" if self.activations == "graph" else self.storage

    def __str__(self) -> str:
        per = f"groups of {self.weight_group}" if self.weight_group else "channels"
        return f"{self.columns} -> {self.rows}, {self.storage} weights by {per}"


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """One quantized linear: y = Q(x / s R) W^T + b [+ x D^T U^T], with W the integer weight of the balanced input.

    Attributes:
        weight: codes, scales and zero points.
        bias: float [N] or None.
        activation: the planned format of the input; None: 16 bit.
        smooth: s, float32 [K], if the layer itself divides by it; None if it was folded.
        rotation: R or None.
        input_scale: float32 [1, 1] of static activations, else None.
        branch: D [r, K] and U [N, r] in floats, or None.
    """

    name: str
    weight: QuantizedWeight
    bias: Tensor | None = None
    activation: Grid | None = None
    smooth: Tensor | None = None
    rotation: Rotation | None = None
    input_scale: Tensor | None = None
    branch: tuple[Tensor, Tensor] | None = None

    @property
    def kernel(self) -> Kernel:
        fmt, activations = self.weight.format, self._activations()
        width = 4 if _fits_4_bits(fmt) and activations != "graph" else 8
        # A float kernel has a zero point that is not an integer, which keeps the plugin from quantizing the input.
        signed = fmt.symmetric and activations != "float"
        return Kernel(
            self.weight.columns,
            len(self.weight.packed),
            f"{'i' if signed else 'u'}{width}",  # type: ignore[arg-type]
            self.weight_group,
            activations,
        )

    @property
    def weight_group(self) -> int | None:
        """Input channels that share a weight scale; None for all of them."""
        size = self.weight.format.group_size
        return None if size == self.weight.columns else size

    def _activations(self) -> Activations:
        if self.activation is None:
            return "float"
        if self.weight_group or self.activation.group_size:
            return "plugin"
        # Weights stay in four bits in memory only if the plugin rounds the input.
        small = _fits_4_bits(self.weight.format) and self.weight.columns >= STEP and len(self.weight.packed) > 1
        return "plugin" if small and _is_plugin_format(self.activation) else "graph"


def _fits_4_bits(weight: Grid) -> bool:
    """Whether the codes themselves have four bits; normal levels are integers of eight bits."""
    return weight.bits <= 4 and weight.levels == "uniform"


def _is_plugin_format(activation: Grid) -> bool:
    return activation.dynamic and activation.bits == 8 and activation.symmetric and activation.levels == "uniform"


def why_inexact(linear: LinearSpec) -> str | None:
    """Why OpenVINO cannot quantize the input of a layer as planned, or None.

    A finer granularity is allowed (groups of channels for tokens, tokens for tensors), but not a coarser one.
    """
    activation = linear.activation
    if linear.weight.format.full:
        return "scales of full grids may be negative, for which no probe exists; use weights with a zero point"
    if activation is not None and activation.levels != "uniform":
        return f"a graph rounds activations to evenly spaced codes, not to {activation.levels} levels"
    if activation is None or linear.kernel.activations == "graph" or _is_plugin_format(activation):
        return None
    if not activation.dynamic:
        return "with groups the CPU plugin scales activations at run time, not by static scales"
    if activation.bits != 8:
        return f"with groups the CPU plugin quantizes activations to 8 bits, not to {activation.bits}"
    return "with groups the CPU plugin quantizes activations symmetrically, without zero points"


def balance(x: Tensor, linear: LinearSpec) -> Tensor:
    """The input after online smoothing and rotation, float32 [..., K]."""
    x = x.float()
    if linear.smooth is not None:
        x = x * (1 / linear.smooth)
    return x if linear.rotation is None else rotate(x, linear.rotation)


def dequantized(linear: LinearSpec) -> Tensor:
    """The weight's values, float32 [N, K], for the balanced input."""
    fmt = linear.weight.format
    codes = unpack(linear.weight.packed, fmt, linear.weight.columns)
    return dequantize(Quantized(codes, linear.weight.scale, linear.weight.zero_point, fmt))


def emulate(
    x: Tensor, linear: LinearSpec, group_size: int, dtype: torch.dtype = torch.float64, rounded: bool = True
) -> Tensor:
    """The plugin's output in plain torch: the reference for the probe, for exports and for tests.

    Args:
        x: [..., K].
        group_size: G, for layers whose input the plugin rounds; 0: it is not rounded.
        dtype: of sums and products. Activation codes are computed in float32, as in the plugin.
        rounded: whether the input is rounded.

    Returns:
        [..., N] in ``dtype``.
    """
    low = None
    if linear.branch is not None:
        down, up = (factor.to(dtype) for factor in linear.branch)
        low = x.to(dtype) @ down.T @ up.T
    x = balance(x, linear)
    activations = linear.kernel.activations if rounded else "float"
    if activations == "plugin" and group_size:
        x = _values_by_plugin(x, group_size)
    elif activations == "graph":
        x = _values_by_graph(x, linear)
    y = x.to(dtype) @ dequantized(linear).to(dtype).T
    y = y if low is None else y + low
    return y if linear.bias is None else y + linear.bias.to(dtype)


def _values_by_graph(x: Tensor, linear: LinearSpec) -> Tensor:
    """``x`` [..., K] rounded as planned, but with a scale per token if the plan has one dynamic scale per tensor."""
    fmt = linear.activation
    assert fmt is not None
    rows = x.reshape(-1, x.shape[-1])
    granularity: Granularity = "token" if fmt.dynamic else "tensor"
    grid = fmt.model_copy(update={"granularity": granularity, "group_size": None})
    scale = None if linear.input_scale is None else linear.input_scale.float()
    return fake_quantize(rows, grid, scale=scale).reshape(x.shape)


def _values_by_plugin(x: Tensor, group_size: int) -> Tensor:
    """``x`` [..., K] rounded to 8-bit codes per token and ``group_size`` channels; the last group may be shorter."""
    out = torch.empty_like(x)
    for begin in range(0, x.shape[-1], group_size):
        part = x[..., begin : begin + group_size]
        scale = part.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        out[..., begin : begin + group_size] = (part * (1 / scale)).round_() * scale
    return out
