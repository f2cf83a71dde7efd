"""Branches from singular values: the algebra, refinement, every balance and rounding, files, LoRA on top, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layer_plan, run, tiny_model, tiny_statistics, token_format, weight_format
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.allocation.choices import Choices
from ditq.conversion import branch as module
from ditq.conversion import convert, draft
from ditq.conversion.branch import refined, split
from ditq.conversion.error import output_error
from ditq.conversion.hessians import InputHessian
from ditq.conversion.make import make_layer
from ditq.conversion.scales import balanced
from ditq.errors import UsageError
from ditq.layers import Clock, QuantizedLinear, TimestepLinear
from ditq.numerics import Grid, Quantized, add_inputs, dequantize, fake_quantize, sqnr_db, unpack
from ditq.plan import Branch, Gptq, LayerPlan, Rotate, Smooth
from ditq.recipe import load as load_recipe

K, N, RANK = 64, 48, 8
BRANCH = Branch(rank=RANK, svd=RANK)
ROTATIONS = [None, Rotate(block=64, seed=3), Rotate(kind="regular", block=16)]
GROUPS = {
    "weight": weight_format(4, "group", symmetric=True, group=16),
    "activation": token_format(4, "group", group=16),
}


@torch.no_grad()
def linear(seed: int = 0) -> nn.Linear:
    """A layer whose weight has a few large singular values and a column of outliers."""
    torch.manual_seed(seed)
    layer = nn.Linear(K, N)
    layer.weight.add_(0.5 * torch.randn(N, 4) @ torch.randn(4, K))
    layer.weight[:, 5] *= 6
    return layer


def inputs(rows: int = 200) -> Tensor:
    torch.manual_seed(11)
    x = torch.randn(rows, K) @ torch.randn(K, K) / 8
    x[:, 9] *= 8
    return x


def made(plan: LayerPlan, layer: nn.Linear, scale: Tensor | None = None, hessian: InputHessian | None = None) -> Any:
    return make_layer(plan, layer, None, scale, None, hessian, Clock())


# --------------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("rotate", ROTATIONS, ids=str)
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_branch_and_residual_are_the_weight(rotate: Rotate | None, smooth: bool, dtype: Any) -> None:
    scale = torch.rand(K) + 0.3 if smooth else None
    raw, x = linear().weight.detach(), inputs()
    weight = balanced(raw, scale, rotate, weight=True)
    down, up, residual = split(weight, Branch(rank=RANK, svd=RANK, dtype=dtype), scale, rotate)
    assert (down.shape, up.shape) == ((RANK, K), (N, RANK))
    assert down.dtype == up.dtype == getattr(torch, dtype)
    # In bf16 too: the residual holds what the stored factors lack.
    y = x @ down.float().T @ up.float().T + balanced(x, scale, rotate, weight=False) @ residual.T
    torch.testing.assert_close(y, x @ raw.T, rtol=1e-4, atol=1e-3)
    best = torch.linalg.svdvals(weight)[RANK:].square().sum()
    assert float(residual.square().sum()) == pytest.approx(float(best), rel=2e-2 if dtype == "bfloat16" else 2e-3)


@pytest.mark.parametrize("rotate", ROTATIONS, ids=str)
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_layer_with_a_branch_is_closer(rotate: Rotate | None, smooth: bool, rounding: Any) -> None:
    """Of any balance and rounding; and what it computes is the branch plus the rounded residual."""
    scale = torch.rand(K) + 0.3 if smooth else None
    layer, x = linear(), inputs()
    exact = layer(x).detach()
    fields = {**GROUPS, "activation": token_format(), "smooth": Smooth(alpha=0.5) if smooth else None,
              "rotate": rotate, "rounding": rounding, "gptq": Gptq() if rounding == "gptq" else None}  # fmt: skip
    hessian = None
    if rounding == "gptq":
        hessian = InputHessian(torch.zeros(K, K))
        add_inputs(hessian.matrix, balanced(x, scale, rotate, weight=False))
    without = made(layer_plan(k=K, n=N, **fields), layer, scale, hessian)[1](x)
    plan, quantized = made(layer_plan(k=K, n=N, branch=BRANCH, **fields), layer, scale, hessian)
    y = quantized(x)
    assert sqnr_db(exact, y) > sqnr_db(exact, without) + 1
    assert plan.rounding == rounding
    assert (plan.rounding_gain or 0) > (0 if rounding == "gptq" else -1)
    # The integers stand for the residual, and the weight that adapters see is whole.
    integers = balanced(quantized._rounded_weight(), scale, rotate, weight=True)
    down, up, residual = split(balanced(layer.weight.detach(), scale, rotate, weight=True), BRANCH, scale, rotate)
    assert torch.equal(quantized.branch_down, down)
    assert torch.equal(quantized.branch_up, up)
    assert sqnr_db(residual, integers) > 12
    assert sqnr_db(layer.weight.detach(), quantized.float_weight()) > 15


def test_output_error_is_that_of_the_layer() -> None:
    """The error by which the balance is chosen counts the branch."""
    model = tiny_model("pixart")
    arch = architectures.load("pixart")
    statistics = tiny_statistics(model, "pixart")
    group = arch.groups(model)[0]
    recipe = load_recipe("svdquant-w4a4").override(["branch.rank=8", "branch.iterations=0"])
    plans = {layer.name: layer for layer in draft(model, arch, recipe)}
    x = statistics.groups[group.name].rows()
    scale = torch.rand(x.shape[1]) + 0.5
    layers = [plans[one.name].model_copy(update={"smooth": Smooth(alpha=0.5)}) for one in group.linears]
    expected = 0.0
    for one, plan in zip(group.linears, layers, strict=True):
        y = x @ one.module.weight.detach().T
        bias = one.module.bias.detach()
        expected += float((made(plan, one.module, scale)[1](x) - bias - y).square().sum() / y.square().sum())
    found = output_error(x, group, layers, scale, None)
    assert found == pytest.approx(expected / len(layers), rel=1e-3)
    without = [plan.model_copy(update={"branch": None}) for plan in layers]
    assert found < 0.9 * output_error(x, group, without, scale, None)


# ------------------------------------------------------------------------------------------ refinement


def error_of(residual: Tensor, plan: LayerPlan, x: Tensor) -> float:
    assert plan.weight is not None
    assert plan.activation is not None
    return float(
        torch.dist(x @ residual.T, fake_quantize(x, plan.activation) @ fake_quantize(residual, plan.weight).T)
    )


def test_refinement_lowers_the_output_error_and_stops_at_the_first_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = linear().weight.detach(), inputs()
    plan = layer_plan(k=K, n=N, **{**GROUPS, "weight": weight_format(3, "group", symmetric=True, group=16)})
    tried: list[Tensor] = []
    original = module.split

    def noted(*args: Any, **kwargs: Any) -> Any:
        tried.append(original(*args, **kwargs))
        return tried[-1]

    monkeypatch.setattr(module, "split", noted)
    errors = []
    for iterations in (0, 1, 100):
        tried.clear()
        of = plan.model_copy(update={"branch": Branch(rank=RANK, svd=RANK, iterations=iterations)})
        errors.append(error_of(refined(weight, of, None, x, None).residual, plan, x))
        steps = [error_of(one.residual, plan, x) for one in tried]
        assert errors[-1] == min(steps)
        assert len(steps) <= iterations + 1
        if iterations == 100:
            assert len(steps) < 100
            assert steps == [*sorted(steps[:-1], reverse=True), steps[-1]]
            assert steps[-1] >= steps[-2]
    assert errors[2] <= errors[1] < errors[0]


def test_refinement_without_inputs_lowers_the_error_of_the_weight() -> None:
    weight = linear().weight.detach()
    plan = layer_plan(k=K, n=N, **{**GROUPS, "activation": None}, branch=Branch(rank=RANK, svd=RANK, iterations=9))
    assert plan.weight is not None
    errors = []
    for iterations in (0, 9):
        of = plan.model_copy(update={"branch": Branch(rank=RANK, svd=RANK, iterations=iterations)})
        residual = refined(weight, of, None, None, None).residual
        errors.append(float(torch.dist(residual, fake_quantize(residual, plan.weight))))
    assert errors[1] < errors[0]


def test_static_scales_count_in_the_refinement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        module, "fake_quantize", lambda x, grid, scale=None: seen.append(scale) or fake_quantize(x, grid, scale=scale)
    )
    static = torch.full((1, 1), 0.1)
    plan = layer_plan(
        k=K, n=N, activation=Grid(bits=8, granularity="tensor"), branch=Branch(rank=RANK, svd=RANK, iterations=1)
    )
    refined(linear().weight.detach(), plan, None, inputs(), static)
    assert len(seen) == 1
    assert seen[0] is static


# -------------------------------------------------------------------------------------- whole models

FEW = ["balance.alpha=[0.3, 0.6]", "branch.rank=8", "branch.iterations=3"]


def quantized(name: str, recipe: str, *overrides: str) -> tuple[nn.Module, Any]:
    model = tiny_model(name)
    statistics = tiny_statistics(model, name, (900, 10))
    return model, ditq.quantize(model, recipe, statistics=statistics, overrides=list(overrides)).plan


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_better_than_without_a_branch_saved_and_reproduced(name: str, tmp_path: Path) -> None:
    model, plan = quantized(name, "svdquant-w4a4", *FEW, "branch.rank=32")  # random weights need many
    exact = run(tiny_model(name), name)
    plain, without = quantized(name, "svdquant-w4a4", FEW[0], "branch=null")
    assert sqnr_db(exact, run(model, name)) > sqnr_db(exact, run(plain, name)) + 0.5
    branches = {layer.branch for layer in plan.quantized}
    assert branches == {Branch(rank=32, svd=32, iterations=3)}
    assert all("branch of rank 32" in layer.balance for layer in plan.quantized)
    added = sum(32 * (layer.in_features + layer.out_features) for layer in plan.quantized)
    total = sum(layer.parameters for layer in plan) + plan.other_parameters
    assert plan.average_bits - without.average_bits == pytest.approx(16 * added / total)
    assert plan.memory()[0] - without.memory()[0] == 2 * added
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, name), run(model, name))
    second = tiny_model(name)
    assert ditq.quantize(second, plan, statistics=tiny_statistics(second, name, (900, 10))).plan == plan
    a, b = model.state_dict(), second.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_gptq_rounds_the_residual() -> None:
    exact = run(tiny_model("pixart"), "pixart")
    model, plan = quantized("pixart", "svdquant-w3a8", *FEW, "rounding=gptq")
    nearest, _ = quantized("pixart", "svdquant-w3a8", *FEW)
    assert sum(layer.rounding == "gptq" for layer in plan.quantized) > len(plan.quantized) / 2
    assert sqnr_db(exact, run(model, "pixart")) > sqnr_db(exact, run(nearest, "pixart"))


def test_any_recipe_takes_a_branch_without_calibration() -> None:
    exact = run(tiny_model("dit"), "dit")
    outcomes = []
    for overrides in ([], ["branch.rank=48"]):
        model = tiny_model("dit")
        ditq.quantize(model, "quarot-w4a8", overrides=["balance.rotation=regular", *overrides])
        outcomes.append(sqnr_db(exact, run(model, "dit")))
    assert outcomes[1] > outcomes[0] + 0.5


def test_every_timestep_range_has_a_branch_of_its_own(tmp_path: Path) -> None:
    model, plan = quantized(
        "pixart", "svdquant-w4a8", *FEW, "balance.choose=always", "balance.alpha=0.5",
        "balance.timesteps=[[0, 499], [500, 999]]",
    )  # fmt: skip
    layer = model.get_submodule("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, TimestepLinear)
    first, second = layer.ranges
    assert not torch.equal(first.branch_down, second.branch_down)
    one = plan["transformer_blocks.0.attn1.to_q"]
    assert one.branch_parameters == 2 * 8 * (one.in_features + one.out_features)
    exact = run(tiny_model("pixart"), "pixart", timestep=torch.tensor([10, 10]))
    assert sqnr_db(exact, run(model, "pixart", timestep=torch.tensor([10, 10]))) > 14
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(again, "pixart"), run(model, "pixart"))


def test_a_small_layer_has_a_branch_of_its_own_size_and_a_kept_one_has_none() -> None:
    _, plan = quantized("dit", "svdquant-w4a4", *FEW[:1], "branch.rank=4096", "branch.iterations=0")
    for layer in plan.quantized:
        assert layer.branch is not None
        assert layer.branch.rank == layer.branch.svd == min(layer.in_features, layer.out_features)
    assert plan.kept
    assert all(layer.branch is None for layer in plan.kept)


def test_layers_outside_of_the_blocks_refine_by_their_weight() -> None:
    model, plan = quantized("dit", "svdquant-w4a8", *FEW, "keep=[embedder, final]")
    modulation = [layer for layer in plan.quantized if layer.role == "modulation"]
    assert modulation
    assert all(layer.branch is not None and layer.activation is None for layer in modulation)
    assert all("branch_down" in model.get_submodule(layer.name)._buffers for layer in modulation)


def test_a_lora_grows_the_branch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = quantized("pixart", "svdquant-w4a8", *FEW)
    before, name = run(model, "pixart"), "transformer_blocks.0.attn1.to_q"
    down = model.get_submodule(name).branch_down
    config = peft.LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    wanted = run(model, "pixart")
    ditq.fuse_lora(model)
    fused = run(model, "pixart")
    assert sqnr_db(wanted, fused) > 40
    assert sqnr_db(wanted, before) < 30
    layer, grown = model.get_submodule(name), model.hf_quantizer.plan[name]
    assert grown.branch == layer.plan.branch == Branch(rank=12, svd=8, iterations=3)
    assert torch.equal(layer.branch_down[:8], down)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), "pixart"), fused)
    with pytest.raises(UsageError, match="a LoRA was fused into it"):
        convert(tiny_model("pixart"), architectures.load("pixart"), model.hf_quantizer.plan, None)


# --------------------------------------------------------------------------------------- what is refused


def test_refinement_without_calibration_is_refused() -> None:
    with pytest.raises(UsageError, match="needs calibration"):
        ditq.quantize(tiny_model("dit"), "rtn-w4a8", overrides=["branch.iterations=2"])
    _, plan = quantized("dit", "rtn-w4a8", "branch.rank=8", "branch.iterations=2")
    assert plan.needs_calibration
    with pytest.raises(UsageError, match="plan needs calibration"):
        ditq.quantize(tiny_model("dit"), plan)
    with pytest.raises(UsageError, match="refines its branch on its inputs: calibration of its input is needed"):
        convert(tiny_model("dit"), architectures.load("dit"), plan, None)


def test_a_branch_without_its_numbers_is_refused() -> None:
    plan = layer_plan(k=K, n=N, branch=BRANCH)
    with pytest.raises(ValueError, match="pass branch="):
        QuantizedLinear.from_linear(linear(), plan)


def test_a_search_refuses_branches() -> None:
    with pytest.raises(UsageError, match=r"'layer' has a low-rank branch.*branch=null"):
        Choices(weights=(4, 8)).genes([layer_plan(branch=BRANCH)])


def test_integers_are_of_the_residual_not_of_the_weight() -> None:
    _, layer = made(layer_plan(k=K, n=N, branch=BRANCH), linear())
    values = dequantize_layer(layer)
    assert sqnr_db(split(linear().weight.detach(), BRANCH, None, None).residual, values) > 12
    assert sqnr_db(linear().weight.detach(), values) < 6


def dequantize_layer(layer: QuantizedLinear) -> Tensor:
    weight = layer.quantized_weight
    codes = unpack(weight.packed, weight.format.bits, weight.columns)
    return dequantize(Quantized(codes, weight.scale, weight.zero_point, weight.format))
