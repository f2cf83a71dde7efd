"""One linear layer of ditq as an OpenVINO graph that the CPU plugin executes on 8-bit integers.

The plugin turns MatMul(x, Constant(int) -> Convert -> [Subtract] -> Multiply) into one node that holds the
integers as they are. It quantizes x at run time (symmetric, 8 bits, a scale for every token and every G
channels) and multiplies in int32, if every one of its conditions holds; otherwise it multiplies floats, three
times slower and without a word. The conditions, found by experiment with OpenVINO 2026.4:

* G = DYNAMIC_QUANTIZATION_GROUP_SIZE, one number for a whole model, is a multiple of 16 and at most K;
* groups of weights are whole multiples of G;
* weights are u8 or u4 with zero points of the same type, or i8 or i4 without zero points;
* there is more than one output, and the CPU has VNNI.

``ditq.engines.openvino.probe`` proves for every kernel that the integers were really multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.numerics import Quantized, Rotation, dequantize, hadamard_matrix, is_supported, pack, rotate, signs, unpack
from ditq.plan import TensorFormat

Storage = Literal["i8", "u8", "i4", "u4"]

# What follows the name of a layer in the name of its second node.
BIAS = "/bias"


@dataclass(frozen=True)
class Kernel:
    """What decides how the plugin executes a linear layer; the probe tries every kernel once.

    Attributes:
        columns: K, input features.
        rows: N, output features.
        storage: element type of the weight; unsigned ones have zero points.
        weight_group: input channels that share a weight scale, None for all of them.
        integer: whether the plan has 8-bit activations; if not, the kernel is built such that it multiplies floats.
    """

    columns: int
    rows: int
    storage: Storage
    weight_group: int | None = None
    integer: bool = True

    def __str__(self) -> str:
        per = f"groups of {self.weight_group}" if self.weight_group else "channels"
        return f"{self.columns} -> {self.rows}, {self.storage} weights by {per}"


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """One quantized linear: y = Q(x / s R) W^T + b, with W the integer weight of the balanced input.

    Attributes:
        weight: codes, scales and zero points.
        bias: float [N] or None.
        activation: the planned format of the input, None for 16 bit.
        smooth: s, float32 [K], where the layer itself divides by it; None where that was folded.
        rotation: R or None.
    """

    name: str
    weight: QuantizedWeight
    bias: Tensor | None = None
    activation: TensorFormat | None = None
    smooth: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def kernel(self) -> Kernel:
        fmt = self.weight.format
        width = 4 if fmt.bits <= 4 else 8
        # A zero point that is no integer keeps the plugin from quantizing the input.
        signed = fmt.symmetric and self.activation is not None
        return Kernel(
            self.weight.columns,
            len(self.weight.packed),
            f"{'i' if signed else 'u'}{width}",  # type: ignore[arg-type]
            None if fmt.group_size == self.weight.columns else fmt.group_size,
            self.activation is not None,
        )


def why_inexact(activation: TensorFormat | None) -> str | None:
    """Why the plugin cannot quantize activations as planned, or None.

    It may quantize more finely (groups of channels instead of tokens, tokens instead of tensors), never more coarsely.
    """
    if activation is None:
        return None
    if not activation.dynamic:
        return "the CPU plugin scales activations at run time, not by static scales"
    if activation.bits != 8:
        return f"the CPU plugin quantizes activations to 8 bits, not to {activation.bits}"
    if not activation.symmetric:
        return "the CPU plugin quantizes activations symmetrically, without zero points"
    return None


def balance(x: Tensor, linear: LinearSpec) -> Tensor:
    """The input after online smoothing and rotation, float32 [..., K]."""
    x = x.float()
    if linear.smooth is not None:
        x = x * (1 / linear.smooth)
    return x if linear.rotation is None else rotate(x, linear.rotation)


def dequantized(linear: LinearSpec) -> Tensor:
    """The weight's values, float32 [N, K], with respect to the balanced input."""
    fmt = linear.weight.format
    codes = unpack(linear.weight.packed, fmt.bits, linear.weight.columns)
    return dequantize(Quantized(codes, linear.weight.scale, linear.weight.zero_point), fmt.rows, fmt.group_size)


def emulate(x: Tensor, linear: LinearSpec, group_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the plugin computes, in plain torch: the reference of the probe, of exports and of tests.

    Args:
        x: [..., K].
        group_size: G; 0 leaves the input as it is, as for 16-bit activations.
        dtype: of sums and products. Activation codes are found in float32, as the plugin does.

    Returns:
        [..., N] in ``dtype``.
    """
    x = balance(x, linear)
    if group_size:
        x = _quantized_values(x, group_size)
    y = x.to(dtype) @ dequantized(linear).to(dtype).T
    return y if linear.bias is None else y + linear.bias.to(dtype)


def _quantized_values(x: Tensor, group_size: int) -> Tensor:
    """``x`` [..., K] rounded to 8-bit codes per token and ``group_size`` channels; the last group may be shorter."""
    out = torch.empty_like(x)
    for begin in range(0, x.shape[-1], group_size):
        part = x[..., begin : begin + group_size]
        scale = part.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        out[..., begin : begin + group_size] = (part * (1 / scale)).round_() * scale
    return out


class Builder:
    """Adds linear layers to an OpenVINO graph. Inputs that several layers share are balanced once."""

    def __init__(self) -> None:
        self._balanced: dict[tuple[Any, ...], Any] = {}

    def linear(self, x: Any, linear: LinearSpec) -> Any:
        """The node of ``linear`` for an input ``x`` (an ``openvino.Output`` [B, tokens, K] or [B, K])."""
        import openvino.opset13 as op

        y = op.matmul(self.balance(x, linear), self.weight(linear), False, True)
        y.set_friendly_name(linear.name)  # by which the compiled graph is searched
        if linear.bias is not None:
            y = op.add(y, _constant(linear.bias.float()))
            y.set_friendly_name(linear.name + BIAS)  # one of the two names survives
        return y

    def balance(self, x: Any, linear: LinearSpec) -> Any:
        """``x / s R`` as a multiplication and two small products, see :func:`split`."""
        if linear.smooth is None and linear.rotation is None:
            return x
        smooth = None if linear.smooth is None else linear.smooth.detach().cpu().numpy().tobytes()
        key = (x.get_node().get_name(), x.get_index(), linear.rotation, smooth)
        if key not in self._balanced:
            self._balanced[key] = _balance(x, linear)
        return self._balanced[key]

    def weight(self, linear: LinearSpec) -> Any:
        """The dequantized weight [N, K] as the pattern that the plugin knows."""
        import openvino.opset13 as op

        kernel, weight = linear.kernel, linear.weight
        bits = int(kernel.storage[1:])
        groups = weight.scale.shape[1]
        shape = [kernel.rows, kernel.columns] if groups == 1 else [kernel.rows, groups, kernel.columns // groups]
        scale_shape = [kernel.rows, *([1] if groups == 1 else [groups, 1])]
        node = op.convert(_integers(_codes(weight), kernel.storage, shape), "f32")
        if kernel.storage.startswith("u"):
            zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
            zero = zero.expand(kernel.rows, groups)
            if kernel.integer:
                points = op.convert(_integers(zero, kernel.storage, scale_shape), "f32")
            else:
                points = _constant(zero.reshape(scale_shape).float() + 2 ** (bits - 1))
            node = op.subtract(node, points)
        node = op.multiply(node, _constant(weight.scale.expand(kernel.rows, groups).reshape(scale_shape)))
        if groups > 1:
            node = op.reshape(node, _shape(kernel.rows, kernel.columns), False)
        return node


def _codes(weight: QuantizedWeight) -> Tensor:
    return unpack(weight.packed, weight.format.bits, weight.columns)


def _integers(codes: Tensor, storage: str, shape: list[int]) -> Any:
    """int8 ``codes`` as a Constant of 4 or 8 bits; unsigned ones are moved up by half of the range."""
    import openvino as ov

    bits = int(storage[1:])
    flat = codes.detach().cpu().reshape(1, -1)
    if storage.startswith("u"):
        data = pack(flat, bits)  # ditq packs codes + 2^(b-1), the low nibble first: what OpenVINO calls unsigned
    else:
        data = flat if bits == 8 else pack(flat, 4) ^ 0x88  # two's complement: the sign bit of a nibble is flipped
    kind = getattr(ov.Type, storage)
    # Not shared: a constant that aliases memory which is freed later becomes garbage without an error.
    return ov.op.Constant(ov.Tensor(data.numpy().reshape(-1), ov.Shape(shape), kind), shared_memory=False)


def _constant(value: Tensor) -> Any:
    import openvino as ov

    return ov.op.Constant(ov.Tensor(value.detach().cpu().contiguous().numpy()), shared_memory=False)


def _shape(*sizes: int) -> Any:
    return _constant(torch.tensor(sizes, dtype=torch.int64))


def _balance(x: Any, linear: LinearSpec) -> Any:
    import openvino.opset13 as op

    columns, rotation = linear.weight.columns, linear.rotation
    factor = torch.ones(columns)
    if linear.smooth is not None:
        factor = 1 / linear.smooth.detach().cpu().float()
    if rotation is None:
        return op.multiply(x, _constant(factor))
    factor = factor * signs(columns, rotation.seed) / rotation.block**0.5
    outer, inner = split(rotation.block)
    scaled = op.multiply(x, _constant(factor))
    lead = [0] * (x.get_partial_shape().rank.get_length() - 1)  # 0: this axis as it was
    # With H = kron(A, B) and a block of x as a matrix V [outer, inner]: v H = A^T V B.
    v = op.reshape(scaled, _shape(*lead, columns // inner, inner), True)
    v = op.matmul(v, _constant(hadamard_matrix(inner)), False, False)
    if outer > 1:
        v = op.reshape(v, _shape(*lead, columns // rotation.block, outer, inner), True)
        v = op.matmul(_constant(hadamard_matrix(outer).T), v, False, False)
    return op.reshape(v, _shape(*lead, columns), True)


def split(order: int) -> tuple[int, int]:
    """Orders of A and B in H = kron(A, B) of this order, B a power of two: the split with the fewest operations.

    A product with H by its factors costs outer + inner multiplications a channel; as one matrix it costs ``order``,
    in floats, which for the widths of today's models is more than the layer itself.
    """
    powers = [2**i for i in range((order & -order).bit_length())]
    splits = [(order // inner, inner) for inner in powers if is_supported(order // inner)]
    return min(splits, key=sum)
