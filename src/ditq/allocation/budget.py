"""The cost of a group size: bit operations of integer products and their rescaling, and the bits of the scales."""

from __future__ import annotations

from collections.abc import Iterable

from ditq.numerics import Grid
from ditq.plan import LayerPlan

# Bit operations to rescale one partial sum: a 32-bit number times 1.
RESCALE = 32


def grouped(layer: LayerPlan, size: int) -> LayerPlan:
    """The plan of ``layer`` with groups of ``size`` input channels in its weight and in its dynamic activations.

    Raises:
        ValueError: ``size`` does not divide the layer's input channels.
    """

    def with_groups(fmt: Grid | None) -> Grid | None:
        return None if fmt is None else Grid(**{**dict(fmt), "granularity": "group", "group_size": size})

    return LayerPlan(
        **{**dict(layer), "weight": with_groups(layer.weight), "activation": with_groups(layer.activation)}
    )


def bit_operations(layer: LayerPlan, size: int, rows: float) -> float:
    """BitOps of one linear y [M, N] = X [M, K] W^T [K, N] with groups of ``size`` g:

        B = M N K b_w b_a + M N (K / g) 32

    A product of a b_w-bit and a b_a-bit number counts b_w b_a. Each of the K / g partial sums of an output is rescaled
    once by the product of two scales, which counts 32. The paper names BitOps as its constraint without a formula. Its
    code bounds the mean group size instead, a proxy of the second term. Dynamic ranges and the sums over rows for zero
    points are not counted, since they do not have a factor M N.

    Args:
        layer: of the plan.
        size: g, the group size.
        rows: M, the tokens of this layer per generated image (all steps, both halves of a guided batch).
    """
    return rows * layer.parameters * (layer.weight_bits * layer.activation_bits + RESCALE / size)


def scale_overhead_bits(layers: Iterable[LayerPlan]) -> float:
    """Average number of bits that scales and zero points add to a quantized weight.

    A scale has 32 bits, a zero point 8: (32 + 8) / g bits per weight for asymmetric groups of g.
    """
    bits = parameters = 0
    for layer in layers:
        if layer.weight is not None:
            rows = 1 if layer.weight.granularity == "tensor" else layer.out_features
            bits += rows * layer.weight.groups(layer.in_features) * (32 if layer.weight.symmetric else 40)
            parameters += layer.parameters
    return bits / max(1, parameters)
