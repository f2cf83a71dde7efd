"""Carrying out a plan: smoothing, 16-bit neighbours, timestep ranges, reproduction, and what is refused."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alphas, layer_plan, run, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.conversion import convert, draft, plan_layers
from ditq.errors import NothingQuantizedError, UsageError
from ditq.layers import QuantizedLinear, TimestepLinear
from ditq.numerics import sqnr_db
from ditq.plan import LayerPlan, Plan, Smooth
from ditq.recipe import load as load_recipe

NAMES = ("dit", "pixart")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def carry_out(model: nn.Module, name: str, layers: list[LayerPlan], statistics: Any = None) -> Any:
    arch = architectures.load(name)
    plan = Plan(
        method="rtn", recipe="mine", architecture=name, nominal_weight_bits=4, nominal_activation_bits=8,
        layers=tuple(layers),
    )  # fmt: skip
    return convert(model, arch, plan, statistics)


def drafted(name: str, recipe: str = "rtn-w4a8", *overrides: str) -> tuple[nn.Module, list[LayerPlan]]:
    model = tiny_model(name)
    return model, draft(model, architectures.load(name), load_recipe(recipe).override(list(overrides)))


# ------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize(
    ("recipe", "floor"),
    [
        ("rtn-w8a8", 32), ("smoothquant-w8a8", 32), ("quarot-w8a8", 32), ("viditq-w8a8", 32),
        ("viditq-w6a6", 22), ("viditq-w4a8", 14), ("viditq-w4a4", 9),
    ],
)  # fmt: skip
def test_outputs_stay_close(recipe: str, floor: float, name: str) -> None:
    model = tiny_model(name)
    exact = run(model, name)
    ditq.quantize(model, recipe, statistics=tiny_statistics(model, name), overrides=alphas(recipe))
    assert sqnr_db(exact, run(model, name)) > floor


@pytest.mark.parametrize("recipe", ["smoothquant-w8a8", "viditq-w4a8", "ptq4dit-w8a8"])
def test_nothing_but_the_quantized_layers_changes(recipe: str, name: str) -> None:
    """Norms, value projections' outputs and modulation stay those of the float model: adapters act on them."""
    model, original = tiny_model(name), tiny_model(name)
    plan = ditq.quantize(model, recipe, statistics=tiny_statistics(model, name), overrides=alphas(recipe)).plan
    assert not plan.folds
    assert any(layer.smooth for layer in plan)
    exact = original.to(getattr(torch, plan.storage_dtype)).float().state_dict()
    for key, value in model.named_parameters():
        assert torch.equal(value, exact[key]), key
    for layer in plan.quantized:
        module = model.get_submodule(layer.name)
        assert isinstance(module, QuantizedLinear)
        assert ("smooth_scale" in module._buffers) == (layer.smooth is not None)


@pytest.mark.parametrize("fold", ["true", "false"])
def test_fold_of_0_1_is_accepted_and_said_to_have_no_effect(fold: str, name: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        recipe = load_recipe("smoothquant-w8a8").override(f"balance.fold={fold}")
    assert any("balance.fold=true has no effect" in str(w.message) for w in seen) == (fold == "true")
    assert recipe == load_recipe("smoothquant-w8a8")


def test_plan_of_0_1_that_folds_is_carried_out_without(name: str) -> None:
    model, layers = drafted(name)
    statistics = tiny_statistics(model, name)
    exact = run(model, name)
    folded = Smooth(alpha=0.5, folded="norm")
    layers[:3] = [layer.model_copy(update={"smooth": folded}) for layer in layers[:3]]
    plan = carry_out(model, name, layers, statistics)
    assert plan[layers[0].name].smooth == Smooth(alpha=0.5)
    assert not plan.folds
    assert sqnr_db(exact, run(model, name)) > 14


def test_16_bit_linear_in_a_smoothed_group_still_gives_the_right_outputs(name: str) -> None:
    model = tiny_model(name)
    statistics = tiny_statistics(model, name)
    exact = run(model, name)
    plan = ditq.quantize(
        model, "smoothquant-w8a8", statistics=statistics, overrides=[r"keep_layers=['attn1\.to_k', 'attn1\.to_v']"]
    ).plan
    kept = plan["transformer_blocks.0.attn1.to_k"]
    assert kept.weight is None
    assert plan["transformer_blocks.0.attn1.to_q"].smooth is not None
    assert type(model.get_submodule(kept.name)) is nn.Linear
    assert sqnr_db(exact, run(model, name)) > 28


def test_weight_only_recipe(name: str) -> None:
    model = tiny_model(name)
    exact = run(model, name)
    plan = ditq.quantize(model, "rtn-w8a8", overrides=["activations=null"]).plan
    assert all(layer.activation is None for layer in plan.layers)
    assert sqnr_db(exact, run(model, name)) > 30


def test_modulation_can_be_quantized_by_weight_only(name: str) -> None:
    model = tiny_model(name)
    exact = run(model, name)
    plan = ditq.quantize(model, "rtn-w8a8", overrides=["keep=[embedder, final]"]).plan
    modulation = [layer for layer in plan.layers if layer.role == "modulation"]
    assert modulation
    assert all(layer.weight is not None and layer.activation is None for layer in modulation)
    assert sqnr_db(exact, run(model, name)) > 25


# ------------------------------------------------------------------------------- timesteps, generation 1


def test_timestep_aware_smoothing_end_to_end(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    statistics = tiny_statistics(model, name, (900, 10))
    exact = {t: run(model, name, timestep=torch.tensor([t, t])) for t in (900, 10)}
    plan = ditq.quantize(
        model, "smoothquant-w8a8", statistics=statistics, overrides=["balance.timesteps=[[0, 499], [500, 999]]"]
    ).plan
    layer = model.get_submodule("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, TimestepLinear)
    assert plan[layer.plan.name].timesteps == ((0, 499), (500, 999))
    assert not torch.equal(layer.ranges[0].smooth_scale, layer.ranges[1].smooth_scale)
    assert not torch.equal(layer.ranges[0].qweight, layer.ranges[1].qweight)
    for t, expected in exact.items():
        assert sqnr_db(expected, run(model, name, timestep=torch.tensor([t, t]))) > 28
        assert layer.current() is layer.ranges[t > 499]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for t in (900, 10, 500):
        timestep = torch.tensor([t, t])
        assert torch.equal(run(loaded, name, timestep=timestep), run(model, name, timestep=timestep))


# ------------------------------------------------------------------------------------------ reproduction


@pytest.mark.parametrize("recipe", ["smoothquant-w4a8", "quarot-w4a4", "viditq-w4a8", "rtn-static-w8a8"])
def test_plan_given_instead_of_a_recipe_reproduces_the_integers(recipe: str, name: str) -> None:
    first, second = tiny_model(name), tiny_model(name)
    statistics = tiny_statistics(first, name)
    plan = ditq.quantize(first, recipe, statistics=statistics, overrides=alphas(recipe)).plan
    again = ditq.quantize(second, plan, statistics=statistics).plan
    assert again == plan
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_same_seed_same_integers_another_seed_others(name: str) -> None:
    models = [tiny_model(name) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        ditq.quantize(model, "quarot-w4a8", seed=seed)
    a, b, c = (m.state_dict()["transformer_blocks.0.attn1.to_q.qweight"] for m in models)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_plan_remembers_what_balancing_did(name: str) -> None:
    model = tiny_model(name)
    plan = ditq.quantize(model, "quarot-w4a4", statistics=tiny_statistics(model, name)).plan
    for layer in plan.quantized:
        assert layer.incoherence is not None
        assert layer.incoherence.weight_before >= 1
        assert layer.incoherence.input_after is not None


# ----------------------------------------------------------------------------------------------- errors


def test_plan_of_a_missing_layer_is_refused_by_name(name: str) -> None:
    model, layers = drafted(name)
    with pytest.raises(UsageError, match=r"'nowhere\.proj'.*does not have"):
        carry_out(model, name, [*layers, layer_plan("nowhere.proj")])


def test_plan_that_says_nothing_about_a_layer_is_refused_by_name(name: str) -> None:
    model, layers = drafted(name)
    with pytest.raises(UsageError, match=f"does not contain layer {layers[2].name!r}"):
        carry_out(model, name, [layer for layer in layers if layer is not layers[2]])


@pytest.mark.parametrize("field", ["in_features", "out_features"])
def test_plan_of_another_size_is_refused_by_name(field: str, name: str) -> None:
    model, layers = drafted(name)
    layers[1] = layers[1].model_copy(update={field: 256})
    with pytest.raises(UsageError, match=f"256.*{layers[1].name!r}|{layers[1].name!r}.*128"):
        carry_out(model, name, layers)


def test_smoothing_without_statistics_is_refused(name: str) -> None:
    model, layers = drafted(name)
    layers[0] = layers[0].model_copy(update={"smooth": Smooth(alpha=0.5)})
    with pytest.raises(UsageError, match=f"{layers[0].name!r}.*calibration"):
        carry_out(model, name, layers)


def test_static_scales_without_statistics_are_refused(name: str) -> None:
    model, layers = drafted(name, "rtn-static-w4a8")
    with pytest.raises(UsageError, match="static activation scales.*calibration"):
        carry_out(model, name, layers)


def test_timesteps_without_statistics_are_refused(name: str) -> None:
    model, layers = drafted(name, "rtn-static-w4a8", "balance.timesteps=[[0, 499], [500, 999]]")
    with pytest.raises(UsageError, match="calibration"):
        carry_out(model, name, layers)


def test_different_smoothing_within_a_group_is_refused(name: str) -> None:
    model, layers = drafted(name)
    statistics = tiny_statistics(model, name)
    layers[0] = layers[0].model_copy(update={"smooth": Smooth(alpha=0.5)})
    layers[1] = layers[1].model_copy(update={"smooth": Smooth(alpha=0.7)})
    with pytest.raises(UsageError, match=f"share the input of {layers[0].name!r}"):
        carry_out(model, name, layers, statistics)


def test_refused_plan_leaves_the_model_as_it_was(name: str) -> None:
    model, layers = drafted(name, "rtn-static-w4a8")
    before = run(model, name)
    with pytest.raises(UsageError):
        carry_out(model, name, layers)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert torch.equal(run(model, name), before)


@pytest.mark.parametrize(
    "overrides", [["keep_layers=['.']"], ["keep=[self_attn, cross_attn, ffn, modulation, final, embedder]"]]
)
def test_nothing_quantized_is_an_error(overrides: list[str], name: str) -> None:
    with pytest.raises(NothingQuantizedError, match="16 bit"):
        ditq.quantize(tiny_model(name), "rtn-w4a8", overrides=overrides)


def test_plan_of_16_bit_only_is_an_error(name: str) -> None:
    model, layers = drafted(name)
    with pytest.raises(NothingQuantizedError):
        carry_out(model, name, [layer.model_copy(update={"weight": None, "activation": None}) for layer in layers])


def test_group_size_that_does_not_divide_names_the_layer_or_those_that_do(name: str) -> None:
    with pytest.raises(UsageError, match="group_size must divide the 128 columns, got 96; possible: 16, 32, 64, 128"):
        ditq.quantize(
            tiny_model(name), "rtn-w4a8", overrides=["weights={bits: 4, granularity: group, group_size: 96}"]
        )


def test_recipe_that_needs_calibration_says_so(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(UsageError, match="'viditq-w4a8' needs calibration"):
        plan_layers(model, architectures.load(name), load_recipe("viditq-w4a8"), None)


def test_linears_that_read_tensors_of_their_own_have_hessians_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of a joint attention share a scale, since values of both streams carry it, but not an input."""
    module = sys.modules["ditq.conversion.make"]
    seen: dict[str, Any] = {}
    original = module.round_weight

    def noted(weight: Tensor, plan: LayerPlan, hessian: Any) -> Any:
        seen[plan.name] = hessian
        return original(weight, plan, hessian)

    monkeypatch.setattr(module, "round_weight", noted)
    model = tiny_model("hunyuanvideo")
    overrides = ["rounding=gptq", "balance.alpha=0.5"]
    plan = ditq.quantize(
        model, "smoothquant-w4a8", statistics=tiny_statistics(model, "hunyuanvideo"), overrides=overrides
    ).plan
    attention = "transformer_blocks.0.attn"
    assert seen[f"{attention}.to_q"] is seen[f"{attention}.to_k"]
    assert seen[f"{attention}.to_out.0"] is not seen[f"{attention}.to_add_out"]
    assert plan[f"{attention}.to_out.0"].smooth == plan[f"{attention}.to_add_out"].smooth


def test_modulation_is_rounded_as_its_own_role_says(name: str) -> None:
    model = tiny_model(name)
    exact = run(model, name)
    eight = "{weights: {bits: 8, granularity: channel}, activations: {bits: 8, granularity: token, dynamic: true}}"
    plan = ditq.quantize(model, "rtn-w8a8", overrides=[f"roles.modulation={eight}", "keep=[embedder, final]"]).plan
    modulation = [layer for layer in plan.layers if layer.role == "modulation"]
    assert modulation
    assert all(layer.activation is not None and layer.activation.bits == 8 for layer in modulation)
    assert sqnr_db(exact, run(model, name)) > 30


def test_what_a_layer_outside_of_the_blocks_cannot_have_is_said(name: str) -> None:
    _, layers = drafted(name, "gptq-w4a8", "keep=[embedder, final]")
    modulation = [layer for layer in layers if layer.role == "modulation"]
    assert modulation
    for layer in modulation:
        assert (layer.rounding, layer.activation) == ("nearest", None)
        assert layer.reason == "outside of the blocks: not calibrated, cannot quantize its input or round by GPTQ"
