"""Methods on models with planted outlier channels: the published order of errors, and the choice by error."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import grid, run, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.architectures import InputGroup
from ditq.calibration import Statistics
from ditq.conversion import draft, plan_layers
from ditq.conversion.balance import rotate_of
from ditq.conversion.error import output_error
from ditq.conversion.scales import group_scale
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear
from ditq.numerics import Rotation, fake_quantize, rotate, sqnr_db, unrotate
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Balance
from ditq.recipe import load as load_recipe

TIMESTEPS = (950, 600, 250, 10)


@torch.no_grad()
def planted(architecture: str) -> nn.Module:
    """A tiny model whose normed inputs have a few channels far above the others, and varying ones by timestep.

    adaLN scales them: by the constant table of PixArt or the bias of DiT's modulation (static), and in
    part by the timestep embedding (dynamic). Consumers' weights of those channels are small, as in trained models.
    """
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(3)
    for block in model.transformer_blocks:
        for chunk in (1, 4):  # the scale rows of norm1 and of norm2 / norm3
            channels = torch.randperm(128, generator=generator)[:6]
            if architecture == "pixart":
                block.scale_shift_table[chunk, channels] = 25.0
            else:
                block.norm1.linear.bias[chunk * 128 + channels] = 25.0
            consumers = (
                [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v] if chunk == 1 else [block.ff.net[0].proj]
            )
            for linear in consumers:
                linear.weight[:, channels] *= 0.1
    return model


@pytest.fixture(scope="module", params=["pixart", "dit"])
def subject(request: pytest.FixtureRequest) -> tuple[str, Statistics]:
    name = request.param
    return name, tiny_statistics(planted(name), name, TIMESTEPS)


def layer_sqnr(subject: tuple[str, Statistics], recipe: str, *overrides: str) -> dict[str, float]:
    """SQNR in dB of the outputs of every norm-fed group, each layer given the inputs of the exact model."""
    name, statistics = subject
    model = planted(name)
    arch = architectures.load(name)
    groups = [g for g in arch.groups(model) if g.input.norm]
    exact: dict[str, tuple[Tensor, Tensor]] = {}
    for group in groups:
        x = statistics.groups[group.name].rows()
        exact[group.name] = (x, x @ group.linears[0].module.weight.detach().T)
    plan = ditq.quantize(model, recipe, statistics=statistics, overrides=list(overrides)).plan
    out = {}
    for group in groups:
        layer = model.get_submodule(group.name)
        assert isinstance(layer, QuantizedLinear)
        assert plan[group.name].weight is not None
        x, y = exact[group.name]
        out[group.name] = sqnr_db(y, layer(x) - layer.bias)
    return out


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
def test_order_of_the_methods_at_planted_outliers(bits: str, subject: tuple[str, Statistics]) -> None:
    static = mean(layer_sqnr(subject, f"rtn-static-{bits}"))
    token = mean(layer_sqnr(subject, f"rtn-{bits}"))
    smooth = mean(layer_sqnr(subject, f"smoothquant-{bits}"))
    rotate = mean(layer_sqnr(subject, f"quarot-{bits}"))
    vidit = mean(layer_sqnr(subject, f"viditq-{bits}", "balance.alpha=[0.3, 0.5, 0.7]"))
    assert static < token < smooth
    assert vidit >= max(smooth, rotate) - 0.1
    if bits == "w4a4":
        assert vidit > token + 3
        # At 8-bit activations the uniform random weights are what hurts, and rotation makes them normal.
        assert token < rotate


@pytest.mark.parametrize("groups", [16, 32])
def test_smaller_groups_are_better_than_channels(groups: int, subject: tuple[str, Statistics]) -> None:
    channels = mean(layer_sqnr(subject, "rtn-w4a8"))
    grouped = mean(
        layer_sqnr(
            subject, "rtn-w4a8", f"weights={{bits: 4, symmetric: false, granularity: group, group_size: {groups}}}"
        )
    )
    assert grouped > channels


@pytest.mark.parametrize("recipe", ["rtn-w{}a{}", "viditq-w{}a{}"])
def test_more_bits_are_better(recipe: str, subject: tuple[str, Statistics]) -> None:
    alpha = ("balance.alpha=0.5",) if recipe.startswith("viditq") else ()
    values = [mean(layer_sqnr(subject, recipe.format(w, a), *alpha)) for w, a in ((4, 4), (4, 8), (8, 8))]
    assert all(b > a + 1 for a, b in itertools.pairwise(values))


# ------------------------------------------------------------------------------------------ the choice


def error_of(
    group: InputGroup, layers: list[LayerPlan], statistics: Statistics, smooth: Smooth | None, rotate: Rotate | None
) -> float:
    seen = statistics.groups[group.name]
    scale = None if smooth is None else group_scale(smooth, group, seen, statistics.timesteps)
    return output_error(seen.rows(), group, layers, scale, rotate)


@pytest.mark.parametrize("bits", ["w4a8", "w4a4", "w6a6"])
def test_viditq_is_never_worse_than_the_methods_it_contains(bits: str, subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    recipe = load_recipe(f"viditq-{bits}").override(["balance.alpha=[0.2, 0.5, 0.8]"])
    drafts = {layer.name: layer for layer in draft(model, arch, recipe)}
    chosen = {layer.name: layer for layer in plan_layers(model, arch, recipe, statistics)}
    kinds = set()
    for group in arch.groups(model):
        layers = [drafts[linear.name] for linear in group.linears]
        width = layers[0].in_features
        best = error_of(group, layers, statistics, chosen[group.name].smooth, chosen[group.name].rotate)
        others = {
            "rtn": (None, None),
            "smoothquant": (Smooth(alpha=0.5), None),
            "quarot": (None, rotate_of(width, recipe.balance, 0)),
        }
        for method, (smooth, rotation) in others.items():
            assert best <= error_of(group, layers, statistics, smooth, rotation) * (1 + 1e-6), (group.name, method)
        kinds.add(chosen[group.name].balance)
    assert len(kinds) > 1  # one choice for all would not be a choice


@pytest.mark.parametrize(("width", "block", "chosen"), [(1152, 0, 64), (4608, 0, 256), (1152, 16, 16), (36, 0, 4)])
def test_regular_rotations_have_the_widest_block_or_that_of_the_recipe(width: int, block: int, chosen: int) -> None:
    rules = Balance(rotate=True, rotation="regular", block=block)
    assert rotate_of(width, rules, seed=5) == Rotate(kind="regular", block=chosen)


def test_a_regular_rotation_that_does_not_fit_says_what_does() -> None:
    with pytest.raises(UsageError, match=r"block=256 does not fit an input of 1152 channels; possible: 4, 16, 64, or"):
        rotate_of(1152, Balance(rotate=True, rotation="regular", block=256), seed=0)
    with pytest.raises(
        UsageError, match=r"in blocks of at least 4, does not fit.*30 channels; use balance.rotation=ha"
    ):
        rotate_of(30, Balance(rotate=True, rotation="regular"), seed=0)


def test_output_error_is_that_of_the_layers(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    recipe = load_recipe("quarot-w4a4")
    plans = {layer.name: layer for layer in plan_layers(model, arch, recipe, statistics)}
    for group in arch.groups(model)[:4]:
        layers = [plans[linear.name] for linear in group.linears]
        x = statistics.groups[group.name].rows()
        expected = 0.0
        for linear in group.linears:
            layer = QuantizedLinear.from_linear(linear.module, plans[linear.name])
            y = x @ linear.module.weight.detach().T
            bias = 0 if layer.bias is None else layer.bias
            expected += float(((layer(x) - bias - y).square().sum() / y.square().sum()).detach())
        error = output_error(x, group, layers, None, plans[group.name].rotate)
        assert error == pytest.approx(expected / len(layers), rel=1e-3)


def test_smoothquant_takes_the_best_of_its_alphas(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    recipe = load_recipe("smoothquant-w4a4").override(["balance.alpha=[0.1, 0.5, 0.9]"])
    plans = {layer.name: layer for layer in plan_layers(model, arch, recipe, statistics)}
    for group in arch.groups(model):
        layers = [plans[linear.name] for linear in group.linears]
        errors = {a: error_of(group, layers, statistics, Smooth(alpha=a), None) for a in (0.1, 0.5, 0.9)}
        smooth = plans[group.name].smooth
        assert smooth is not None
        assert smooth.alpha == min(errors, key=lambda a: errors[a])


def test_always_applies_both(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    recipe = load_recipe("viditq-w4a8").override(["balance.choose=always", "balance.alpha=0.5"])
    assert all(
        layer.smooth is not None and layer.rotate is not None
        for layer in plan_layers(model, arch, recipe, statistics)
        if layer.weight
    )


def test_linears_of_a_group_share_their_balance(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    plans = {layer.name: layer for layer in plan_layers(model, arch, load_recipe("viditq-w4a4"), statistics)}
    for group in arch.groups(model):
        assert len({(plans[x.name].smooth, plans[x.name].rotate) for x in group.linears}) == 1


def test_planning_does_not_change_the_model(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model = planted(name)
    before = run(model, name)
    plan_layers(model, architectures.load(name), load_recipe("viditq-w4a8"), statistics)
    assert torch.equal(run(model, name), before)


# ------------------------------------------------------------------------------------ balance is data


@pytest.mark.parametrize(
    ("recipe", "override", "smooth", "rotate"),
    [
        ("smoothquant-w4a8", "balance.rotate=true", True, True),
        ("smoothquant-w4a8", "balance.smooth=false", False, False),
        ("quarot-w4a8", "balance.smooth=true", True, True),
        ("quarot-w4a8", "balance.rotate=false", False, False),
        ("rtn-w4a8", "balance={smooth: true, rotate: true}", True, True),
        ("gptq-w4a8", "balance.rotate=true", False, True),
        ("qdit-w4a8", "balance.smooth=true", True, False),
        ("viditq-w4a16", "balance={smooth: true, rotate: true, alpha: 0.5}", True, True),
    ],
)
def test_every_family_takes_every_balance(
    recipe: str, override: str, smooth: bool, rotate: bool, subject: tuple[str, Statistics]
) -> None:
    name, statistics = subject
    wanted = load_recipe(recipe).override([override])
    layers = [x for x in plan_layers(planted(name), architectures.load(name), wanted, statistics) if x.weight]
    assert layers
    assert {(x.smooth is not None, x.rotate is not None) for x in layers} == {(smooth, rotate)}


@pytest.mark.parametrize("where", ["all", "foldable"])
def test_where_limits_the_balanced_inputs(where: str, subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    model, arch = planted(name), architectures.load(name)
    recipe = load_recipe("quarot-w4a8").override([f"balance.where={where}"])
    plans = {layer.name: layer for layer in plan_layers(model, arch, recipe, statistics)}
    for group in arch.groups(model):
        rotated = where == "all" or group.input.foldable is not None
        assert (plans[group.name].rotate is not None) == rotated


def test_a_block_that_does_not_fit_says_which_do(subject: tuple[str, Statistics]) -> None:
    name, statistics = subject
    recipe = load_recipe("quarot-w4a8").override(["balance.block=20"])
    with pytest.raises(UsageError, match="balance.block=20 does not fit an input of 128 channels; possible: 2, 4, 8"):
        plan_layers(planted(name), architectures.load(name), recipe, statistics)


def test_a_plan_with_weights_only_is_balanced_and_computes_what_it_says(subject: tuple[str, Statistics]) -> None:
    name, _ = subject
    model = planted(name)
    exact = {linear.name: linear.module.weight.detach().clone() for linear in architectures.load(name).linears(model)}
    plan = ditq.quantize(model, "quarot-w4a16").plan
    for layer in plan.quantized:
        assert layer.rotate is not None
        rotation = Rotation(layer.in_features, layer.rotate.block, layer.rotate.seed)
        rounded = fake_quantize(rotate(exact[layer.name], rotation), grid(4, symmetric=False))
        found = model.get_submodule(layer.name).weight
        assert sqnr_db(unrotate(rounded, rotation), found) > 30, layer.name
