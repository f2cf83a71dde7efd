"""A candidate in a model equals the model that its plan quantizes, and shares the 16-bit weights with all others."""

from random import Random
from typing import Any

import pytest
import torch
from helpers import run, tiny_model, tiny_statistics

from ditq import architectures
from ditq.allocation import Candidates, Space
from ditq.conversion import convert, estimate, plan_layers
from ditq.layers import QuantizedLinear
from ditq.recipe import Recipe, load

ARCH = architectures.load("dit")


def candidates_of(recipe: Recipe) -> tuple[Any, Candidates, Space, list[Any], Any]:
    model = tiny_model("dit")
    statistics = tiny_statistics(model, "dit") if recipe.needs_calibration else None
    layers = plan_layers(model, ARCH, recipe, statistics)
    searched = [layer for layer in layers if layer.weight]
    rows = dict.fromkeys((layer.name for layer in searched), 1.0)
    space = Space.of(searched, rows, sizes=(16, 32, 64, 128), budget="uniform:32")
    return model, Candidates(model, ARCH, layers, space, statistics, recipe, 0), space, layers, statistics


@pytest.mark.parametrize("name", ["rtn-w4a4", "smoothquant-w4a8", "quarot-w4a4"])
def test_a_candidate_generates_the_images_of_its_plan(name: str) -> None:
    recipe = load(name)
    model, candidates, space, layers, statistics = candidates_of(recipe)
    random = Random(0)
    for genome in (space.random(random), space.random(random), space.coarsest):
        candidates.put(genome)
        chosen = {layer.name: layer for layer in space.planned(genome)}
        fresh = tiny_model("dit")
        allocated = tuple(chosen.get(layer.name, layer) for layer in layers)
        plan = estimate(fresh, ARCH, recipe).model_copy(update={"layers": allocated})
        plan = convert(fresh, ARCH, plan, statistics)
        assert torch.equal(run(model, "dit"), run(fresh, "dit"))
        assert [(x.name, x.weight, x.activation) for x in plan] == [
            (x.name, x.weight, x.activation) for x in candidates.plan
        ]


def test_gptq_rounds_on_inputs_of_the_16_bit_model() -> None:
    """In the first block these are also the inputs when a plan is applied; in later blocks they differ."""
    recipe = load("qdit-w3a8")
    model, candidates, space, layers, statistics = candidates_of(recipe)
    genome = space.random(Random(1))
    candidates.put(genome)
    chosen = {layer.name: layer for layer in space.planned(genome)}
    fresh = tiny_model("dit")
    allocated = tuple(chosen.get(layer.name, layer) for layer in layers)
    convert(fresh, ARCH, estimate(fresh, ARCH, recipe).model_copy(update={"layers": allocated}), statistics)
    same = {
        layer.name: torch.equal(model.get_submodule(layer.name).qweight, fresh.get_submodule(layer.name).qweight)
        for layer in space.layers
    }
    assert {layer.rounding for layer in candidates.plan if layer.weight} == {"gptq"}
    assert all(equal for name, equal in same.items() if "blocks.0." in name)
    assert not all(equal for name, equal in same.items() if "blocks.1." in name)


def test_layers_that_keep_their_size_are_not_touched_and_known_ones_not_made_again() -> None:
    model, candidates, space, _, _ = candidates_of(load("rtn-w4a4"))
    first = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    genome = (16, *space.coarsest[1:])
    candidates.put(genome)
    second = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert [name for name in first if first[name] is not second[name]] == [space.layers[0].name]
    candidates.put(space.coarsest)
    assert all(model.get_submodule(name) is module for name, module in first.items())


def test_16_bit_weights_are_held_once() -> None:
    model = tiny_model("dit")
    before = dict(model.named_modules())
    recipe = load("rtn-w4a4")
    layers = plan_layers(model, ARCH, recipe, None)
    searched = [layer for layer in layers if layer.weight]
    space = Space.of(searched, {x.name: 1.0 for x in searched}, sizes=(16, 32, 64), budget="uniform:32")
    candidates = Candidates(model, ARCH, layers, space, None, recipe, 0)
    candidates.put(space.random(Random(0)))
    assert all(linear is before[name] for name, linear in candidates.linears.items())
