"""What a group size costs: bit operations of the integer products and their rescaling, and the bits of the scales."""

from __future__ import annotations

from collections.abc import Iterable

from ditq.numerics import Grid
from ditq.plan import LayerPlan

# Bit operations of rescaling one partial sum: a float32 number, times one.
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

    Every product of a b_w-bit and a b_a-bit number counts b_w b_a. Each of the K / g partial sums of an output is
    rescaled by the product of two scales, once: 32. The paper names BitOps as its constraint without a formula, and
    its code bounds the mean group size instead, a proxy of the second term. Not counted, since they have no factor
    M N: computing dynamic ranges, and the sums over rows that zero points need.

    Args:
        rows: M, the tokens that the layer sees while one image is drawn (all steps, both halves of a guided batch).
    """
    return rows * layer.parameters * (layer.weight_bits * layer.activation_bits + RESCALE / size)


def scale_overhead_bits(layers: Iterable[LayerPlan]) -> float:
    """Bits that scales and zero points add to a quantized weight, averaged over weights.

    A scale is a float32, a zero point 8 bit: (32 + 8) / g bits a weight for asymmetric groups of g.
    """
    bits = parameters = 0
    for layer in layers:
        if layer.weight is not None:
            rows = 1 if layer.weight.granularity == "tensor" else layer.out_features
            bits += rows * layer.weight.groups(layer.in_features) * (32 if layer.weight.symmetric else 40)
            parameters += layer.parameters
    return bits / max(1, parameters)
