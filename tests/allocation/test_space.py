"""Cost, legality and the errors of a search space."""

from random import Random

import pytest
from helpers import layer_plan, token_format, weight_format
from hypothesis import given
from hypothesis import strategies as st
from toy import SIZES, toy_space

from ditq.allocation import Space
from ditq.allocation.costs import bit_operations, grouped, scale_overhead_bits
from ditq.errors import UsageError


def test_bit_operations_count_products_and_rescaled_partial_sums() -> None:
    layer = layer_plan(k=128, n=24)  # W4A8
    products = rescales = 0
    for _ in range(3):  # tokens
        for _ in range(24):  # outputs
            for k in range(128):
                products += 4 * 8
                rescales += 32 * (k % 32 == 0)
    assert bit_operations(grouped(layer, 32), rows=3) == products + rescales


def test_bit_operations_of_16_bit_activations() -> None:
    layer = layer_plan(k=64, n=2, activation=None)
    assert bit_operations(grouped(layer, 64), rows=1) == 2 * 64 * 4 * 16 + 2 * 32


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_overhead_is_that_of_the_stored_buffers(symmetric: bool) -> None:
    layers = [grouped(layer_plan(str(g), k=128, n=24, weight=weight_format(symmetric=symmetric)), g) for g in (16, 64)]
    bits = sum(8 * stored.bytes for layer in layers for name, stored in layer.tensors().items() if name != "qweight")
    assert scale_overhead_bits(layers) == bits / sum(layer.parameters for layer in layers)


def test_grouped_keeps_the_rest_of_a_plan() -> None:
    layer = layer_plan(k=128, weight=weight_format(3, symmetric=True), activation=token_format(6))
    new = grouped(layer, 32)
    assert (new.weight.bits, new.weight.symmetric, new.weight.group_size) == (3, True, 32)
    assert (new.activation.bits, new.activation.dynamic, new.activation.group_size) == (6, True, 32)
    restored = new.model_copy(update={"weight": layer.weight, "activation": layer.activation})
    assert restored == layer


def test_layers_take_the_sizes_that_divide_them() -> None:
    assert toy_space((128, 384, 96 * 4)).choices == ((16, 32, 64, 128),) * 3
    layers = [layer_plan("a", k=96), layer_plan("b", k=128), layer_plan("c", k=100, weight=None, activation=None)]
    space = Space.of(layers, {"a": 1.0, "b": 1.0}, sizes=(64, 32, 48), budget="uniform:32")
    assert space.choices == ((32, 48), (32, 64))


def test_default_sizes_are_those_of_the_paper_that_fit() -> None:
    space = Space.of([layer_plan("a", k=1024)], {"a": 1.0}, budget="uniform:64")
    assert space.choices == ((32, 64, 128),)
    space = Space.of([layer_plan("a", k=1152)], {"a": 1.0})
    assert space.choices == ((32, 64, 128, 192, 288),)


@given(
    genome=st.tuples(*[st.sampled_from(SIZES)] * 4),
    budget=st.sampled_from(["uniform:32", "uniform:48", "uniform:64", "uniform:96"]),
    seed=st.integers(0, 9),
)
def test_repair_is_legal_and_never_makes_groups_finer(genome: tuple[int, ...], budget: str, seed: int) -> None:
    space = toy_space((384, 384, 768, 1536), budget)
    repaired = space.repaired(genome, Random(seed))
    assert space.cost(repaired) <= space.budget * (1 + 1e-6)
    assert all(after >= before for before, after in zip(genome, repaired, strict=True))
    if space.legal(genome):
        assert repaired == genome


def test_budget_is_that_of_a_uniform_size() -> None:
    space = toy_space()
    assert space.budget == pytest.approx(space.cost((64,) * 6))
    assert space.uniforms == [(64,) * 6, (128,) * 6]
    assert toy_space(budget=str(space.budget)).uniforms == space.uniforms


@pytest.mark.parametrize(
    ("sizes", "budget", "words"),
    [
        ((32, 100), "uniform:64", ["100", "divides no layer", "128, 256"]),
        ((4, 32), "uniform:64", ["4 divides no layer"]),
        ((64, 256), "uniform:64", ["64, 256", "'narrow'", "96 input channels"]),
        ((32, 64), 1e3, ["No allocation meets the budget", "1000", "Raise the budget"]),
        ((32, 64), "uniform:48", ["uniform:48", "128 input channels", "'a'"]),
        ((32, 64), "uniform:4", ["uniform:4", "number of BitOps"]),
        ((32, 64), "much", ["'much'", "number of BitOps"]),
        ((32, 64), "uniform:64", ["nothing to search", "larger group sizes"]),
    ],
)
def test_impossible_spaces_say_why(sizes: tuple[int, ...], budget: float | str, words: list[str]) -> None:
    layers = [layer_plan("a", k=128), layer_plan("b", k=256)]
    if "'narrow'" in words:
        layers.append(layer_plan("narrow", k=96))
    with pytest.raises(UsageError) as error:
        Space.of(layers, {"a": 1.0, "b": 1.0, "narrow": 1.0}, sizes=sizes, budget=budget)
    assert all(word in str(error.value) for word in words), error.value


def test_static_activations_and_timestep_ranges_are_refused() -> None:
    static = token_format(granularity="tensor").model_copy(update={"dynamic": False})
    with pytest.raises(UsageError, match="static activation scales"):
        Space.of([layer_plan("a", k=256, activation=static)], {"a": 1.0})
    with pytest.raises(UsageError, match="timestep range"):
        Space.of([layer_plan("a", k=256, timesteps=((0, 500), (501, 999)))], {"a": 1.0})
