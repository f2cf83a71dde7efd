"""The interface of engines: their operations, and what they declare about themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ditq.numerics import Grid, Quantized, Rotation, rotate


@dataclass(frozen=True)
class QuantizedWeight:
    """A packed integer weight in memory.

    Attributes:
        packed: uint8 [N, ceil(K * bits / 8)], see ``ditq.numerics.packing``; unpacking needs the whole ``format``.
        scale: float32 [N, G], or [1, 1] per tensor.
        zero_point: int8 of the same shape; None if symmetric.
        columns: K, the number of input features.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: int
    format: Grid


class Engine(ABC):
    """Executes quantized linears. Stateless; one instance per process.

    ``priority`` orders the engines that support a job, the highest first.
    """

    name: str
    priority: int = 0
    note: str = ""
    """A note for users, shown where the engine can run."""

    @abstractmethod
    def why_unavailable(self) -> str | None:
        """Why this engine cannot run on this machine at all, and what to do about it; or None."""

    @abstractmethod
    def why_unsupported(self, weight: Grid, activation: Grid | None, device: torch.device) -> str | None:
        """Why this engine cannot run these formats on this device, or None."""

    def prove(self, device: torch.device) -> str | None:
        """Why this engine's results cannot be trusted on this device, or None.

        An engine with compiled kernels runs them here on small inputs and compares the results with their references.
        The registry calls this method once per process and device, in a separate thread, before it first chooses the
        engine on the device; see :func:`ditq.engines.registry.choose`. An exception counts as a failure. The method
        must not choose engines itself.
        """
        return None

    @abstractmethod
    def quantize_activations(self, x: Tensor, format: Grid, scale: Tensor | None) -> Quantized:
        """Integers of activations ``x`` [M, K]; ``scale`` is for static formats only."""

    def quantize_input(
        self, x: Tensor, smooth: Tensor | None, rotation: Rotation | None, format: Grid, scale: Tensor | None
    ) -> Quantized:
        """Integers of the balanced input, see :func:`balance`; an engine may fuse both steps."""
        return self.quantize_activations(balance(x, smooth, rotation), format, scale)

    @abstractmethod
    def linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """``x @ weight.T + bias`` [M, N] in ``dtype`` by integer matrix products."""

    @abstractmethod
    def dequantize_weight(self, weight: QuantizedWeight) -> Tensor:
        """The weight's values, float32 [N, K]."""


class Norm(NamedTuple):
    """A LayerNorm over the last dimension, and its modulation: norm(x) [* weight + bias] [* factor + shift].

    Attributes:
        x: [M, K]; weight, bias: [K] or None.
        factor, shift: [samples, K] with samples dividing M; both or neither.
    """

    x: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    shift: Tensor | None


class Activation(NamedTuple):
    """A nonlinearity of x [M, K], or value * f(gate) for x = [value, gate] [M, 2 K] where ``gated``.

    ``function``: "gelu", "gelu_tanh" or "silu".
    """

    x: Tensor
    function: str
    gated: bool


class FusingEngine(Engine):
    """An engine that fuses the operations before and after a linear layer into its kernels."""

    @abstractmethod
    def quantize_result(
        self,
        of: Norm | Activation,
        smooth: Tensor | None,
        rotation: Rotation | None,
        format: Grid,
        scale: Tensor | None,
    ) -> Quantized | None:
        """Integers of the balanced output of a norm or a nonlinearity; None if there is no kernel for it."""

    @abstractmethod
    def gated_linear(
        self,
        x: Quantized,
        weight: QuantizedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
        gate: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """``residual + gate * (x @ weight.T + bias)`` [M, N]; gate [samples, N], residual [M, N], or None."""


def balance(x: Tensor, smooth: Tensor | None, rotation: Rotation | None) -> Tensor:
    """The input after online smoothing and rotation, ``x / smooth @ Q``, float32 [..., K]."""
    x = x.float()
    if smooth is not None:
        x = x / smooth
    return rotate(x, rotation) if rotation is not None else x


def too_old(device: torch.device, smallest: tuple[int, int], what: str) -> str | None:
    """Why a CUDA device cannot run ``what``, which needs the compute capability ``smallest``; or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= smallest:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}; {what} need {smallest[0]}.{smallest[1]}"
