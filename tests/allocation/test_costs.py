"""Costs of layers by hand: bytes, bit operations, average bits, and those of a segment of the trajectory."""

import pytest
from helpers import grid, layer_plan, token_format, weight_format

from ditq.allocation.costs import averaged, bit_operations, costs_of, grouped, scale_overhead_bits

K, N, ROWS = 32, 24, 10.0


def test_costs_of_a_layer_by_hand() -> None:
    costs = costs_of(layer_plan(k=K, n=N), ROWS)  # W4A8, a scale and a zero point for each output channel
    assert costs == {
        "bytes": N * K / 2 + N * (4 + 1) + 2 * N,
        "bit_operations": ROWS * N * K * 4 * 8 + ROWS * N * 32,
        "weights": 4 * N * K,
        "activations": 8 * N * K * ROWS,
    }


def test_a_layer_in_16_bit_has_nothing_to_rescale() -> None:
    costs = costs_of(layer_plan(k=K, n=N, weight=None, activation=None, bias=False), ROWS)
    assert costs == {
        "bytes": 2 * N * K,
        "bit_operations": ROWS * N * K * 16 * 16,
        "weights": 16 * N * K,
        "activations": 16 * N * K * ROWS,
    }


@pytest.mark.parametrize(
    ("weight_group", "activation_group", "sums"),
    [(16, None, 2), (None, 8, 4), (16, 8, 4), (8, 16, 4), (None, None, 1)],
)
def test_partial_sums_are_those_of_the_smaller_groups(
    weight_group: int | None, activation_group: int | None, sums: int
) -> None:
    layer = layer_plan(
        k=K, n=N,
        weight=grid(4, granularity="group" if weight_group else "channel", group_size=weight_group),
        activation=token_format(8, "group" if activation_group else "token", group=activation_group),
    )  # fmt: skip
    assert bit_operations(layer, 1) == N * K * 4 * 8 + N * sums * 32


def test_a_segment_has_its_share_of_the_activations_and_no_weights() -> None:
    layer = layer_plan(k=K, n=N)
    whole, part, rest = costs_of(layer, ROWS), costs_of(layer, ROWS, 0.3), costs_of(layer, ROWS, 0.7)
    assert (part["bytes"], part["weights"]) == (0, 0)
    assert part["activations"] == pytest.approx(0.3 * whole["activations"])
    assert part["bit_operations"] + rest["bit_operations"] == pytest.approx(whole["bit_operations"])


def test_sums_over_units_are_average_bits() -> None:
    layers = [
        layer_plan("a", k=32, n=10, weight=weight_format(3), activation=token_format(8)),
        layer_plan("b", k=64, n=20, weight=weight_format(8), activation=None),
    ]
    rows = {"a": 100.0, "b": 10.0}
    units = averaged(layers, rows)
    totals = {
        name: sum(costs_of(layer, rows[layer.name])[name] for layer in layers) / unit for name, unit in units.items()
    }
    a, b = 32 * 10, 64 * 20
    assert totals["weights"] == pytest.approx((3 * a + 8 * b) / (a + b))
    assert totals["activations"] == pytest.approx((8 * a * 100 + 16 * b * 10) / (a * 100 + b * 10))
    assert totals["bytes"] == sum(layer.stored_bytes() for layer in layers)
    assert totals["bit_operations"] == sum(bit_operations(layer, rows[layer.name]) for layer in layers)


def test_grouped_needs_a_divisor_and_leaves_16_bit_inputs() -> None:
    layer = grouped(layer_plan(k=K, activation=None), 16)
    assert layer.weight is not None
    assert (layer.weight.granularity, layer.weight.group_size, layer.activation) == ("group", 16, None)
    with pytest.raises(ValueError, match="24"):
        grouped(layer_plan(k=K), 24)


def test_scale_overhead_of_channels_and_tensors() -> None:
    tensor = layer_plan(k=K, n=N, weight=weight_format(granularity="tensor", symmetric=True))
    kept = layer_plan("kept", k=K, n=N, weight=None, activation=None)
    assert scale_overhead_bits([layer_plan(k=K, n=N), kept]) == 40 / K  # 16-bit layers are not counted
    assert scale_overhead_bits([tensor]) == 32 / (K * N)
    assert scale_overhead_bits([kept]) == 0
