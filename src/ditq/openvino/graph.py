"""Linear layers as nodes of an OpenVINO graph, see ``ditq.openvino.linear`` for the two kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditq.engines.base import QuantizedWeight
from ditq.numerics import RotationKind, hadamard_matrix, is_supported, pack, scaled_signs, unpack
from ditq.openvino.linear import BIAS, CLIP, SHIFT, SUMS, LinearSpec

# Below it a float32 scale loses digits.
_SMALLEST = torch.finfo(torch.float32).tiny

# Outputs of a product with ones, of which one is needed: the plugin computes this many at a time.
_ROWS = 16

# The plugin multiplies unsigned by signed codes fastest, so codes of symmetric activations are shifted up by this.
MIDDLE = 128


@dataclass(frozen=True)
class _Codes:
    """Integers of an input, as nodes.

    Attributes:
        values: u [..., K], 8-bit codes shifted to 0 ... 255.
        scale: s_x [..., 1] of every token; None if it is static.
        offset: o [..., 1]; None if it is MIDDLE for all tokens.
        static_scale: s_x of the whole tensor.
    """

    values: Any
    scale: Any = None
    offset: Any = None
    static_scale: float | None = None


class Builder:
    """Adds linear layers to an OpenVINO graph. Inputs that several layers share are balanced once."""

    def __init__(self) -> None:
        self._shared: dict[tuple[Any, ...], Any] = {}

    def linear(self, x: Any, linear: LinearSpec) -> Any:
        """The node of ``linear`` for an input ``x`` (an ``openvino.Output`` [B, tokens, K] or [B, K])."""
        import openvino.opset13 as op

        low = None if linear.branch is None else _low_rank(x, *linear.branch)
        x = self.balance(x, linear)
        if linear.kernel.activations == "graph":
            y = self._rounded_product(x, linear)
        else:
            y = op.matmul(x, self.weight(linear), False, True)
            y.set_friendly_name(linear.name)  # the key for lookups in the compiled graph
        if linear.bias is not None:
            y = op.add(y, _constant(linear.bias.float()))
            y.set_friendly_name(linear.name + BIAS)  # the compiled graph keeps one of the two names
        return y if low is None else op.add(y, low)

    def balance(self, x: Any, linear: LinearSpec) -> Any:
        """``x / s R`` as a multiplication and two small products, see :func:`split`."""
        if linear.smooth is None and linear.rotation is None:
            return x
        smooth = None if linear.smooth is None else linear.smooth.detach().cpu().numpy().tobytes()
        return self._once(x, ("balance", linear.rotation, smooth), lambda: _balance(x, linear).output(0))

    def _once(self, x: Any, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Shares nodes that several layers compute from one input."""
        key = (x.get_node().get_name(), x.get_index(), *what)
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _rounded_product(self, x: Any, linear: LinearSpec) -> Any:
        """The rescaled product of codes: with u = Q(x) + o, where o is the shift of the codes, and W = s_w (q - z),

            s_x sum_k (u - o) s_w (q - z)  =  s_x (s_w sum u q  -  o s_w sum q  -  (sum u - o K) s_w z).

        The first sum is the product of integers. The others take one number for each output channel or token.
        """
        import openvino.opset13 as op

        codes = self._codes_of(x, linear)
        weight = linear.weight
        q, scale = _codes(weight), weight.scale.detach().cpu().expand(len(weight.packed), 1)
        if codes.static_scale is not None:
            scale = scale * codes.static_scale
        y = op.matmul(codes.values, op.multiply(op.convert(_int8(q), "f32"), _constant(scale)), False, True)
        y.set_friendly_name(linear.name)
        column_sums = scale[:, 0] * q.sum(1).float()
        if codes.offset is None:
            shift = _constant(-MIDDLE * column_sums)
            shift.set_friendly_name(linear.name + SHIFT)
            y = op.add(y, shift)
        else:
            y = op.subtract(y, op.multiply(codes.offset, _constant(column_sums)))
        if weight.zero_point is not None:
            zero = (scale * weight.zero_point.detach().cpu().expand(len(q), 1))[:, 0]
            y = op.subtract(y, op.multiply(self._sums(codes, linear), _constant(zero)))
        return y if codes.scale is None else op.multiply(y, codes.scale)

    def _codes_of(self, x: Any, linear: LinearSpec) -> _Codes:
        static = None if linear.input_scale is None else float(linear.input_scale)
        return self._once(x, ("codes", linear.activation, static), lambda: _round(x, linear, static))

    def _sums(self, codes: _Codes, linear: LinearSpec) -> Any:
        """Sums of the codes of each token, [..., 1]."""
        import openvino.opset13 as op

        def make() -> Any:
            # By a product with ones: a reduction of integers takes up to a tenth of the time of the layer itself.
            ones = op.multiply(op.convert(_int8(torch.ones(_ROWS, linear.weight.columns, dtype=torch.int8)), "f32"),
                               _constant(torch.ones(_ROWS, 1)))  # fmt: skip
            columns = linear.weight.columns
            # Shifted down before it is stored: with a bf16 hint it is stored with eight bits of precision.
            shift = _constant(torch.full((_ROWS,), -float(MIDDLE * columns)))
            if codes.offset is None:
                shift.set_friendly_name(linear.name + SUMS + SHIFT)
            total = op.add(op.matmul(codes.values, ones, False, True), shift)
            total = op.slice(total, _shape(0), _shape(1), _shape(1), _shape(-1))
            if codes.offset is None:
                return total
            return op.subtract(total, op.multiply(op.subtract(codes.offset, _scalar(MIDDLE)), _scalar(columns)))

        return self._once(codes.values, ("sums",), make)

    def weight(self, linear: LinearSpec) -> Any:
        """The dequantized weight [N, K] in the pattern that the plugin recognizes."""
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
    return unpack(weight.packed, weight.format, weight.columns)


def _round(x: Any, linear: LinearSpec, static: float | None) -> _Codes:
    """Nodes that round ``x`` [..., K]; numerics.quantize is the reference."""
    import openvino.opset13 as op

    fmt = linear.activation
    assert fmt is not None
    bottom, top = fmt.code_range
    if static is not None:
        values = op.clamp(op.multiply(x, _scalar(1 / static)), bottom, top)
        values.set_friendly_name(linear.name + CLIP)
        return _Codes(_to_u8(values, -MIDDLE), static_scale=static)
    high, low = op.reduce_max(x, _shape(-1), True), op.reduce_min(x, _shape(-1), True)
    if fmt.symmetric:
        # Two reductions are faster than one of magnitudes, which would be stored first.
        largest = op.maximum(high, op.negative(low))
        scale = op.maximum(op.multiply(largest, _scalar(1 / top)), _scalar(_SMALLEST))
        return _Codes(_to_u8(op.divide(x, scale), -MIDDLE), scale)
    high, low = op.maximum(high, _scalar(0.0)), op.minimum(low, _scalar(0.0))
    scale = op.maximum(op.multiply(op.subtract(high, low), _scalar(1 / (top - bottom))), _scalar(_SMALLEST))
    offset = op.round(op.divide(op.negative(low), scale))
    return _Codes(_to_u8(op.add(op.divide(x, scale), offset), 0), scale, offset)


def _to_u8(values: Any, bottom: int) -> Any:
    """Rounds, and shifts from [bottom, bottom + 255] to [0, 255]; the plugin stores the result as u8."""
    import openvino.opset13 as op

    ends = [_scalar(end) for end in (bottom, bottom + 255, 0, 255)]
    return op.fake_quantize(values, *ends, 256).output(0)


def unrounded(model: Any) -> Any:
    """A copy of a graph in which ``graph`` layers do not round their inputs, to check all other operations."""
    import openvino as ov

    model = model.clone()
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind == "FakeQuantize" or (kind == "Clamp" and name.endswith(CLIP)):
            node.output(0).replace(node.input_value(0))
        elif kind == "Constant" and name.endswith(SHIFT):
            zero = _constant(torch.zeros(list(node.get_output_shape(0))))
            ov.utils.replace_node(node, zero)
    return model


def _int8(codes: Tensor) -> Any:
    return _integers(codes, "i8", list(codes.shape))


def _integers(codes: Tensor, storage: str, shape: list[int]) -> Any:
    """int8 ``codes`` as a Constant of 4 or 8 bits; unsigned ones are shifted up by half of the range."""
    import openvino as ov

    bits = int(storage[1:])
    flat = codes.detach().cpu().reshape(1, -1)
    if storage.startswith("u"):
        data = pack(flat, bits)  # ditq packs codes + 2^(b-1), low nibble first, like OpenVINO's unsigned types
    else:
        data = flat if bits == 8 else pack(flat, 4) ^ 0x88  # two's complement: flips the sign bit of each nibble
    kind = getattr(ov.Type, storage)
    # A copy: a constant that aliases memory becomes garbage without an error when that memory is freed.
    return ov.op.Constant(ov.Tensor(data.numpy().reshape(-1), ov.Shape(shape), kind), shared_memory=False)


def _constant(value: Tensor) -> Any:
    import openvino as ov

    return ov.op.Constant(ov.Tensor(value.detach().cpu().contiguous().numpy()), shared_memory=False)


def _scalar(value: float) -> Any:
    return _constant(torch.tensor(float(value)))


def _shape(*sizes: int) -> Any:
    return _constant(torch.tensor(sizes, dtype=torch.int64))


def _low_rank(x: Any, down: Tensor, up: Tensor) -> Any:
    """``x D^T U^T``: two float products, which the plugin does not round."""
    import openvino.opset13 as op

    return op.matmul(op.matmul(x, _constant(down.float()), False, True), _constant(up.float()), False, True)


def _balance(x: Any, linear: LinearSpec) -> Any:
    import openvino.opset13 as op

    columns, rotation = linear.weight.columns, linear.rotation
    factor = torch.ones(columns)
    if linear.smooth is not None:
        factor = 1 / linear.smooth.detach().cpu().float()
    if rotation is None:
        return op.multiply(x, _constant(factor))
    factor = factor * scaled_signs(rotation, torch.device("cpu"))
    outer, inner = split(rotation.block, rotation.kind)
    scaled = op.multiply(x, _constant(factor))
    lead = [0] * (x.get_partial_shape().rank.get_length() - 1)  # 0: this axis keeps its size
    # With H = kron(A, B) and a block of x as a matrix V [outer, inner]: v H = A^T V B.
    v = op.reshape(scaled, _shape(*lead, columns // inner, inner), True)
    v = op.matmul(v, _constant(hadamard_matrix(inner, rotation.kind)), False, False)
    if outer > 1:
        v = op.reshape(v, _shape(*lead, columns // rotation.block, outer, inner), True)
        v = op.matmul(_constant(hadamard_matrix(outer, rotation.kind).T), v, False, False)
    return op.reshape(v, _shape(*lead, columns), True)


def split(order: int, kind: RotationKind = "hadamard") -> tuple[int, int]:
    """Orders of A and B in H = kron(A, B) of this order, B a power of two: the split with the fewest operations.

    A product with the factors of H costs outer + inner float multiplications per channel. A product with H as one
    matrix costs ``order``, which for the widths of current models is more than the layer itself.
    """
    powers = [2**i for i in range((order & -order).bit_length())]
    if kind == "regular":  # a Kronecker power of a matrix of order 4
        splits = [(order // inner, inner) for inner in powers[::2]]
    else:
        splits = [(order // inner, inner) for inner in powers if is_supported(order // inner)]
    return min(splits, key=sum)
