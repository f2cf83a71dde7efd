"""What a layer plan costs: stored bytes, bit operations, and average bits of weights and of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from ditq.numerics import Grid
from ditq.plan import LayerPlan

# Bit operations to rescale one partial sum: a 32-bit number times 1.
RESCALE = 32

Cost = Literal["bytes", "bit_operations", "weights", "activations"]

COSTS: dict[Cost, str] = {
    "bytes": "bytes of the transformer as stored",
    "bit_operations": "bit operations (BitOps) per image",
    "weights": "average bits of the searched weights, without scales",
    "activations": "average bits of the searched layers' inputs over products and time",
}
"""The costs that a budget may limit, in words."""


def costs_of(
    layer: LayerPlan, rows: float, share: float | None = None, trajectory: Sequence[float] = ()
) -> dict[Cost, float]:
    """The costs of a layer as sums over layers: average bits are multiplied by their weights in the average.

    Args:
        layer: of the plan.
        rows: M, the tokens of this layer per generated image (all steps, both halves of a guided batch).
        share: of the rows that are in the timestep segment whose activations are priced; the weights are not priced
            then. None: all timesteps, and the weights.
        trajectory: timesteps of the sampling run, for layers whose bits change with the timestep.
    """
    part = 1.0 if share is None else share
    inputs = layer.average_activation_bits(trajectory) if share is None else float(layer.activation_bits)
    weights = layer.average_weight_bits(trajectory)
    return {
        "bytes": float(layer.stored_bytes()) if share is None else 0.0,
        "bit_operations": bit_operations(layer, part * rows, weights * inputs),
        "weights": weights * layer.parameters if share is None else 0.0,
        "activations": inputs * layer.parameters * part * rows,
    }


def averaged(layers: Iterable[LayerPlan], rows: Mapping[str, float]) -> dict[Cost, float]:
    """What 1 unit of every cost is for these layers: 1 byte, 1 BitOp, 1 bit in every weight, 1 bit in every input."""
    layers = list(layers)
    return {
        "bytes": 1.0,
        "bit_operations": 1.0,
        "weights": float(sum(layer.parameters for layer in layers)),
        "activations": sum(layer.parameters * rows[layer.name] for layer in layers),
    }


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


def bit_operations(layer: LayerPlan, rows: float, per_product: float | None = None) -> float:
    """BitOps of one linear y [M, N] = X [M, K] W^T [K, N] with groups of g channels (g = K without groups):

        B = M N K b_w b_a + M N (K / g) 32

    A product of a b_w-bit and a b_a-bit number counts b_w b_a. Each of the K / g partial sums of an output is rescaled
    once by the product of two scales, which counts 32; a layer in 16 bit has none. The paper (Q-DiT) names BitOps as
    its constraint without a formula. Its code bounds the mean group size instead, a proxy of the second term. Dynamic
    ranges and the sums over rows for zero points are not counted, since they do not have a factor M N.

    Args:
        layer: of the plan.
        rows: M, the tokens of this layer per generated image (all steps, both halves of a guided batch).
        per_product: b_w b_a, if it is not that of the plan's formats: an average over timesteps.
    """
    rescaled, product = 0.0, layer.weight_bits * layer.activation_bits if per_product is None else per_product
    if layer.weight is not None:
        rescaled = RESCALE / min(grid.group_size or layer.in_features for grid in (layer.weight, layer.activation or
                                 layer.weight))  # fmt: skip
    return rows * layer.parameters * (product + rescaled)


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
