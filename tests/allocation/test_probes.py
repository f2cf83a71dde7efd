"""One layer quantized alone: rounded inputs and rounded weights against models that are changed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import alphas, grid, layer_plan, run, tiny_model, tiny_statistics, token_format
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ditq import architectures
from ditq.allocation.choices import Choices
from ditq.allocation.probes import InputProbes, RoundedInput, WeightProbes
from ditq.allocation.space import Space
from ditq.conversion import plan_layers
from ditq.conversion.rollback import restored_on_error
from ditq.conversion.storage import round_to_storage
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, Rotation, fake_quantize, rotation_matrix
from ditq.plan import Rotate, Smooth
from ditq.recipe import load

ARCH = architectures.load("dit")
LAYER = "transformer_blocks.1.ff.net.0.proj"


def relative_error(y: Tensor, expected: Tensor) -> float:
    y, expected = y.double(), expected.double()
    return float((y - expected).norm() / expected.norm())


# ------------------------------------------------------------------------------------ RoundedInput


def rounded(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Each group of x [..., G, g] on its own grid, in float64."""
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True) / top
        return (x / scale).round().clamp(-top - 1, top) * scale
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("balance", ["none", "smooth", "rotate", "smooth and rotate"])
def test_rounded_input_is_its_formula(balance: str, group: int | None, symmetric: bool, bits: int) -> None:
    k, n = 64, 24
    linear = nn.Linear(k, n)
    scale = torch.rand(k) + 0.5 if "smooth" in balance else None
    plan = layer_plan(
        k=k, n=n, activation=token_format(bits, "group" if group else "token", symmetric, group),
        smooth=None if scale is None else Smooth(alpha=0.5),
        rotate=Rotate(block=32, seed=3) if "rotate" in balance else None,
    )  # fmt: skip
    x = torch.randn(2, 5, k) * (1 + 3 * torch.rand(k))
    s = torch.ones(k).double() if scale is None else scale.double()
    r = rotation_matrix(Rotation(k, 32, 3)).double() if plan.rotate else torch.eye(k).double()
    inputs = (x.double() / s @ r).reshape(2, 5, -1, group or k)
    weight = linear.weight.detach().double() * s @ r
    bias = linear.bias.detach().double()
    y = RoundedInput(linear, plan, scale)(x)
    assert (y.shape, y.dtype) == ((2, 5, n), torch.float32)
    # float32 moves a few inputs over a rounding boundary, so the products are not equal to the last digit.
    own = relative_error(y, rounded(inputs, bits, symmetric).reshape(2, 5, k) @ weight.T + bias)
    rounding = relative_error(y, linear(x).detach())
    assert own < 0.01 * rounding
    assert rounding > 1e-3


def test_rounded_input_keeps_dtype_and_parameters_of_the_linear() -> None:
    linear = nn.Linear(32, 24, bias=False).to(torch.bfloat16)
    layer = RoundedInput(linear, layer_plan(bias=False), None)
    assert layer(torch.randn(4, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight is linear.weight
    assert layer.bias is None


# ------------------------------------------------------------------------------------ in a model


def probes_of(kind: type[Any], recipe: str = "rtn-w4a8", unit: Any = "layer") -> tuple[nn.Module, Any]:
    model = tiny_model("dit")
    loaded = load(recipe).override(alphas(recipe))
    statistics = tiny_statistics(model, "dit") if loaded.needs_calibration else None
    layers = plan_layers(model, ARCH, loaded, statistics)
    part = "weights" if kind is WeightProbes else "activations"
    choices = Choices(**{part: (16, 4)}, unit=unit)
    quantized = [layer for layer in layers if layer.weight]
    rows = {layer.name: 1.0 for layer in quantized}
    space = Space.of(quantized, rows, choices=choices, budget=float("inf"), check=False)
    return model, kind(model, ARCH, layers, space, statistics, loaded, 0)


def put(probes: Any, *genes: str) -> None:
    """Quantizes these genes; the others stay in 16 bit."""
    space = probes.space
    assert set(genes) <= {gene.name for gene in space.genes}
    probes.put(tuple(c[gene.name in genes] for gene, c in zip(space.genes, space.choices, strict=True)))


@torch.no_grad()
def sixteen_bit() -> nn.Module:
    """The float model as it would be stored."""
    model = tiny_model("dit")
    round_to_storage(model)
    return model


@pytest.mark.parametrize("recipe", ["rtn-w4a8", "viditq-w4a8", "qdit-w4a8"])
@pytest.mark.parametrize("kind", [WeightProbes, InputProbes])
def test_without_a_probe_the_model_is_the_16_bit_one(kind: type[Any], recipe: str) -> None:
    model, probes = probes_of(kind, recipe)
    put(probes)
    expected = run(sixteen_bit(), "dit")
    assert torch.equal(run(model, "dit"), expected)
    put(probes, LAYER)
    assert not torch.equal(run(model, "dit"), expected)
    put(probes)
    assert torch.equal(run(model, "dit"), expected)


def test_weight_probes_round_a_weight_and_leave_its_input() -> None:
    model, probes = probes_of(WeightProbes)
    put(probes, LAYER)
    fresh = sixteen_bit()
    linear = fresh.get_submodule(LAYER)
    x = torch.randn(7, linear.in_features)
    weight = fake_quantize(linear.weight.detach(), Grid(bits=4, symmetric=False, granularity="channel"))
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, QuantizedLinear)
    with torch.no_grad():
        assert relative_error(layer(x), F.linear(x, weight, linear.bias)) < 1e-6
        rounded_too = F.linear(fake_quantize(x, token_format(8)), weight, linear.bias)
        assert relative_error(layer(x), rounded_too) > 1e-3
    linear.weight.data = weight
    assert relative_error(run(model, "dit"), run(fresh, "dit")) < 1e-6


def test_input_probes_round_an_input_and_leave_its_weight() -> None:
    model, probes = probes_of(InputProbes)
    put(probes, LAYER)
    fresh = sixteen_bit()
    before = run(fresh, "dit")
    four = grid(4).model_copy(update={"granularity": "token", "dynamic": True})

    def round_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (fake_quantize(args[0].flatten(0, -2), four).reshape(args[0].shape),)

    fresh.get_submodule(LAYER).register_forward_pre_hook(round_input)
    expected = run(fresh, "dit")
    assert relative_error(run(model, "dit"), expected) < 1e-6
    assert relative_error(before, expected) > 1e-3


@pytest.mark.parametrize(("kind", "probe"), [(WeightProbes, QuantizedLinear), (InputProbes, RoundedInput)])
@pytest.mark.parametrize("unit", ["layer", "block", "role"])
def test_exactly_the_layers_of_the_gene_change(unit: str, kind: type[Any], probe: type[nn.Module]) -> None:
    model, probes = probes_of(kind, unit=unit)
    gene = probes.space.genes[-1]
    put(probes, gene.name)
    changed = {name for name, module in model.named_modules() if isinstance(module, (QuantizedLinear, RoundedInput))}
    assert changed == {layer.name for layer in gene.layers}
    assert all(isinstance(model.get_submodule(name), probe) for name in changed)
    assert len(changed) == {"layer": 1, "block": 6, "role": 2}[unit]
    for name in changed:
        plan = model.get_submodule(name).plan
        assert (plan.activation is None) == (kind is WeightProbes)


@pytest.mark.parametrize("kind", [WeightProbes, InputProbes])
@pytest.mark.parametrize(("recipe", "balance"), [("smoothquant-w4a8", "smooth"), ("quarot-w4a4", "rotate")])
def test_probes_are_balanced_as_the_recipe_asks(recipe: str, balance: str, kind: type[Any]) -> None:
    model, probes = probes_of(kind, recipe)
    put(probes, LAYER)
    layer = model.get_submodule(LAYER)
    assert getattr(layer.plan, balance) is not None
    if balance == "smooth":
        assert torch.equal(layer.smooth_scale, probes.scales[LAYER])


def test_weight_probes_are_rounded_as_the_recipe_asks() -> None:
    model, probes = probes_of(WeightProbes, "qdit-w4a8")
    put(probes, LAYER)
    layer = model.get_submodule(LAYER)
    assert layer.plan.rounding == "gptq"
    nearest = fake_quantize(sixteen_bit().get_submodule(LAYER).weight.detach(), layer.plan.weight)
    assert not torch.allclose(layer.weight, nearest)


@pytest.mark.parametrize("kind", [WeightProbes, InputProbes])
def test_the_model_is_as_before_when_its_state_is_restored(kind: type[Any]) -> None:
    model = tiny_model("dit")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, output = dict(model.named_modules()), run(model, "dit")
    recipe = load("viditq-w4a8").override(alphas("viditq-w4a8"))
    statistics = tiny_statistics(model, "dit")
    with restored_on_error(model, always=True):
        layers = plan_layers(model, ARCH, recipe, statistics)
        choices = Choices(**{"weights" if kind is WeightProbes else "activations": (16, 4)})
        quantized = [layer for layer in layers if layer.weight]
        rows = {layer.name: 1.0 for layer in quantized}
        space = Space.of(quantized, rows, choices=choices, budget=float("inf"), check=False)
        probes = kind(model, ARCH, layers, space, statistics, recipe, 0)
        probes.put(space.coarsest)
        assert not torch.equal(run(model, "dit"), output)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert dict(model.named_modules()) == modules
    assert torch.equal(run(model, "dit"), output)
