"""PTQ4DiT's scales against a plain computation, what is balanced and what is not, and PTQ4DM's ranges."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers import run, tiny_model, tiny_statistics
from scipy import stats

import ditq
from ditq import architectures
from ditq.calibration import Statistics
from ditq.calibration.timesteps import normal_timesteps
from ditq.conversion import draft, plan_layers
from ditq.conversion.error import output_error
from ditq.conversion.scales import group_scale
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db
from ditq.plan import Plan, Smooth
from ditq.recipe import load as load_recipe

TIMESTEPS = tuple(range(950, 0, -100))


@pytest.fixture(scope="module", params=["pixart", "dit"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def statistics(name: str) -> Statistics:
    return tiny_statistics(tiny_model(name), name, TIMESTEPS)


def scales_of(model: Any, plan: Plan) -> dict[str, float]:
    layers = {layer.name: model.get_submodule(layer.name) for layer in plan.quantized}
    assert all(isinstance(layer, QuantizedLinear) for layer in layers.values())
    return {key: layer.input_scale.item() for key, layer in layers.items()}


# ------------------------------------------------------------------------------------------- PTQ4DiT


def test_scale_is_the_papers(name: str, statistics: Statistics) -> None:
    model, arch = tiny_model(name), architectures.load(name)
    differs = 0
    for group in arch.groups(model):
        seen = statistics.groups[group.name]
        weights = [
            max(float(x.module.weight.detach()[:, j].abs().max()) for x in group.linears)
            for j in range(seen.absmax.shape[2])
        ]
        inputs = seen.absmax.amax(1).double()
        rho = [stats.spearmanr(row.numpy(), weights).statistic for row in inputs]
        total = sum(math.exp(-r) for r in rho)
        salience = sum(math.exp(-r) / total * row for r, row in zip(rho, inputs, strict=True))
        raw = [math.sqrt(x / w) for x, w in zip(salience.tolist(), weights, strict=True)]
        mean = math.exp(sum(map(math.log, raw)) / len(raw))
        scale = group_scale(Smooth(alpha=0.5, salience="spearman"), group, seen, statistics.timesteps)
        assert scale.tolist() == pytest.approx([r / mean for r in raw], rel=1e-5)
        differs += not torch.allclose(
            scale, group_scale(Smooth(alpha=0.5), group, seen, statistics.timesteps), rtol=1e-3
        )
    assert differs


def test_only_inputs_whose_producer_carries_the_scale_are_balanced(name: str, statistics: Statistics) -> None:
    model, arch = tiny_model(name), architectures.load(name)
    plans = {x.name: x for x in plan_layers(model, arch, load_recipe("ptq4dit-w4a8"), statistics)}
    kinds = set()
    for group in arch.groups(model):
        expected = None
        if group.input.foldable:
            expected = Smooth(alpha=0.5, salience="spearman")
        assert {plans[x.name].smooth for x in group.linears} == {expected}
        assert all(plans[x.name].rotate is None for x in group.linears)
        kinds.add(group.input.foldable)
    assert {None, "norm", "v"} <= kinds


def test_outputs_gain(name: str, statistics: Statistics) -> None:
    exact = run(tiny_model(name), name)
    quality = {}
    for recipe in ("rtn-static-w8a8", "ptq4dit-w8a8"):
        model = tiny_model(name)
        plan = ditq.quantize(model, recipe, statistics=statistics).plan
        assert all(layer.activation and not layer.activation.dynamic for layer in plan.quantized)
        quality[recipe] = sqnr_db(exact, run(model, name))
    assert quality["ptq4dit-w8a8"] > quality["rtn-static-w8a8"] + 0.5


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("ptq4dit-w4a8", ()), ("ptq4dit-w4a4", ("rounding=gptq",)), ("ptq4dm-w4a8", ())],
    ids=lambda value: str(value),
)
def test_saved_plan_reproduces_the_integers(
    recipe: str, overrides: tuple[str, ...], name: str, statistics: Statistics
) -> None:
    first, second = tiny_model(name), tiny_model(name)
    plan = ditq.quantize(first, recipe, statistics=statistics, overrides=list(overrides)).plan
    read = Plan.from_dict(json.loads(plan.to_json()))
    again = ditq.quantize(second, read, statistics=statistics).plan
    # A layer that GPTQ could not improve is planned as one rounded to nearest, without its Hessian.
    assert [x.smooth for x in again] == [x.smooth for x in plan]
    assert again.calibration_timesteps == plan.calibration_timesteps
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_plan_from_before_has_the_maximum_over_all_timesteps(name: str, statistics: Statistics) -> None:
    plan = ditq.quantize(tiny_model(name), "smoothquant-static-w4a8", statistics=statistics).plan
    data = json.loads(plan.to_json())
    del data["calibration_timesteps"]
    for layer in data["layers"]:
        if layer["smooth"]:
            del layer["smooth"]["salience"]
    assert Plan.from_dict(data) == plan


def test_alpha_can_be_chosen_by_error(name: str, statistics: Statistics) -> None:
    model, arch = tiny_model(name), architectures.load(name)
    recipe = load_recipe("ptq4dit-w4a4").override(["balance.alpha=[0.1, 0.9]"])
    smooths = {x.name: x.smooth for x in plan_layers(model, arch, recipe, statistics)}
    drafts = {x.name: x for x in draft(model, arch, recipe)}
    for group in (g for g in arch.groups(model) if g.input.foldable):
        seen, layers = statistics.groups[group.name], [drafts[x.name] for x in group.linears]
        errors = {}
        for alpha in (0.1, 0.9):
            scale = group_scale(Smooth(alpha=alpha, salience="spearman"), group, seen, statistics.timesteps)
            errors[output_error(seen.rows()[:: max(1, len(seen.rows()) // 512)], group, layers, scale, None)] = alpha
        smooth = smooths[group.name]
        assert smooth is not None
        assert smooth.alpha == errors[min(errors)]


# -------------------------------------------------------------------------------------------- PTQ4DM


def test_ranges_come_from_the_chosen_timesteps(name: str, statistics: Statistics) -> None:
    left_out = ~normal_timesteps(len(TIMESTEPS))
    assert left_out.any()
    groups = {
        key: type(group)(
            torch.where(left_out[:, None, None], 100 * group.absmax, group.absmax), group.sample, group.sample_time
        )
        for key, group in statistics.groups.items()
    }
    louder = Statistics(statistics.timesteps, groups, statistics.calls)

    def scales(recipe: str, seen: Statistics, *overrides: str) -> dict[str, float]:
        model = tiny_model(name)
        return scales_of(model, ditq.quantize(model, recipe, statistics=seen, overrides=list(overrides)).plan)

    quiet = scales("ptq4dm-w4a8", statistics)
    assert scales("ptq4dm-w4a8", louder) == quiet
    assert scales("rtn-static-w4a8", louder, "calibration.timesteps=normal") == quiet
    # "G4W+P4A": GPTQ's weights with PTQ4DM's activations.
    assert scales("ptq4dm-w4a8", louder, "rounding=gptq") == quiet
    of_all = scales("rtn-static-w4a8", statistics)
    loud = scales("rtn-static-w4a8", louder)
    for key in quiet:
        assert quiet[key] <= of_all[key] < loud[key]
