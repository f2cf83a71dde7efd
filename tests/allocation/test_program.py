"""The integer program against all genomes of a small space; layer errors; uniform sizes."""

import itertools

import pytest
import torch
from helpers import layer_plan, tiny_model, tiny_statistics
from toy import toy_space

from ditq import architectures
from ditq.allocation import Space, integer_program, layer_errors, uniform_genomes
from ditq.conversion import draft
from ditq.errors import UsageError
from ditq.recipe import load


@pytest.mark.parametrize("budget", ["uniform:16", "uniform:32", "uniform:64"])
@pytest.mark.parametrize("seed", range(3))
def test_program_finds_the_smallest_sum(budget: str, seed: int) -> None:
    space = toy_space((128, 256, 384, 512), budget)
    generator = torch.Generator().manual_seed(seed)
    errors = [
        dict(zip(possible, torch.rand(len(possible), generator=generator).tolist(), strict=True))
        for possible in space.choices
    ]

    def total(genome: tuple[int, ...]) -> float:
        return sum(error[size] for error, size in zip(errors, genome, strict=True))

    best = min(filter(space.legal, itertools.product(*space.choices)), key=total)
    assert total(integer_program(space, errors)) == pytest.approx(total(best))


def test_program_at_costs_of_a_large_model() -> None:
    small = toy_space()
    costs = tuple(
        {g: {name: c * 1e9 for name, c in cost.items()} for g, cost in of_gene.items()} for of_gene in small.costs
    )
    space = Space(small.genes, costs, {"bit_operations": small.budget * 1e9}, {}, small.units)
    errors = [{g: g * (i + 1.0) for g in possible} for i, possible in enumerate(space.choices)]
    assert integer_program(space, errors) == integer_program(small, errors)
    assert space.legal(integer_program(space, errors))


def test_layer_errors_grow_with_the_group() -> None:
    model, arch = tiny_model("dit"), architectures.load("dit")
    layers = [layer for layer in draft(model, arch, load("rtn-w4a4")) if layer.weight]
    space = Space.of(layers, dict.fromkeys((x.name for x in layers), 1.0), sizes=(16, 32, 128), budget="uniform:32")
    errors = layer_errors(model, arch, space, tiny_statistics(model, "dit"))
    assert [tuple(error) for error in errors] == [(16, 32, 128)] * len(layers)
    assert all(0 < error[16] < error[128] < 1 for error in errors)


def test_uniform_genomes_are_the_legal_ones() -> None:
    assert uniform_genomes(toy_space()).genomes == ((64,) * 6, (128,) * 6)
    layers = [layer_plan("a", k=96), layer_plan("b", k=128)]
    space = Space.of(layers, {"a": 1.0, "b": 1.0}, sizes=(24, 32, 64), budget="uniform:16")
    assert uniform_genomes(space).genomes == ((32, 32),)


def test_no_uniform_size_at_all_is_an_error() -> None:
    layers = [layer_plan("a", k=96), layer_plan("b", k=128)]
    space = Space.of(layers, {"a": 1.0, "b": 1.0}, sizes=(24, 48, 64), budget="uniform:16")
    with pytest.raises(UsageError, match="No single group size"):
        uniform_genomes(space)
