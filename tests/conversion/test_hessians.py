"""GPTQ and groups on whole transformers: whose inputs are used, what is gained, files, and what is refused."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CLASSES,
    QUICK,
    example_inputs,
    layer_plan,
    run,
    tiny_dit,
    tiny_model,
    tiny_statistics,
    weight_format,
)
from torch import Tensor, nn

import ditq
from ditq import architectures, numerics
from ditq.calibration import Statistics
from ditq.conversion import hessians as method
from ditq.conversion import quantize_model
from ditq.conversion.hessians import InputHessian
from ditq.conversion.rounding import round_weight
from ditq.conversion.scales import balanced, group_scale
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear
from ditq.layers.quantized_linear import nearest
from ditq.numerics import Quantized, add_inputs, dequantize, output_errors, sqnr_db, unpack
from ditq.plan import Gptq, Plan
from ditq.recipe import load as load_recipe

NAMES = ("dit", "pixart")  # norms modulated by a linear and by a table; text or none
TIMES = (900, 700, 400, 10)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def small_model(name: str) -> nn.Module:
    """64 and 256 inputs a layer, since GPTQ takes one step for each."""
    return tiny_model(name, attention_head_dim=16, **({"cross_attention_dim": 64} if name == "pixart" else {}))


def quantized(name: str, recipe: str, *overrides: str) -> tuple[nn.Module, Plan, Statistics]:
    model = small_model(name)
    statistics = tiny_statistics(model, name, TIMES)
    return model, ditq.quantize(model, recipe, statistics=statistics, overrides=overrides).plan, statistics


LARGER_DOWN = (
    "roles={ffn.down: {weights: {bits: 4, granularity: group, group_size: 64}, "
    "activations: {bits: 4, granularity: group, group_size: 64, dynamic: true}}}"
)


def groups_of_32(*more: str) -> tuple[str, ...]:
    return ("weights.group_size=32", "activations.group_size=32", *more)


# ------------------------------------------------------------------------------------ whose inputs

BALANCES = {
    "none": ("gptq-w3a8",),
    "smooth": ("smoothquant-w4a8", "rounding=gptq"),
    "rotated": ("quarot-w4a4", "rounding=gptq", "gptq.order=activation"),
    "both": ("viditq-w4a8", "rounding=gptq", "balance.choose=always", "balance.alpha=0.5"),
    "groups": ("qdit-w4a8", *groups_of_32()),
    "static": ("rtn-static-w4a8", "rounding=gptq"),
}


@pytest.mark.parametrize("balance", BALANCES)
def test_hessians_are_those_of_balanced_inputs_from_quantized_blocks(balance: str, name: str) -> None:
    """The gain in the plan is found again: running the finished model gives the first linears of every block the
    very inputs that they were calibrated on, and what GPTQ compares is the error on those.
    """
    recipe, *overrides = BALANCES[balance]
    model, plan, statistics = quantized(name, recipe, *overrides)
    arch, storage = architectures.load(name), getattr(torch, plan.storage_dtype)
    original = small_model(name)
    first = [g for g in arch.groups(original) if g.input.norm and g.input.shift[:1] == (0,)]
    assert len(first) == 2
    scales = {}
    for group in first:
        if smooth := plan[group.name].smooth:
            scales[group.name] = group_scale(smooth, group, statistics.groups[group.name], statistics.timesteps)
    for p in original.parameters():
        p.data = p.to(storage).float()
    seen: dict[str, list[Tensor]] = {group.name: [] for group in first}
    for group in first:
        layer = model.get_submodule(group.name)
        layer.register_forward_pre_hook(lambda _, args, into=seen[group.name]: into.append(args[0].detach()))
    with torch.no_grad():
        for call in statistics.calls:
            model(**call, return_dict=False)
    for group in first:
        for linear in group.linears:
            layer, made = model.get_submodule(linear.name), plan[linear.name]
            assert isinstance(layer, QuantizedLinear)
            weight = balanced(linear.module.weight.detach(), scales.get(group.name), made.rotate, weight=True)
            hessian = torch.zeros(made.in_features, made.in_features, dtype=torch.float64)
            for x in seen[group.name]:
                add_inputs(hessian, layer.balance(x).reshape(-1, made.in_features))
            gain = 10 * math.log10(error(weight, nearest(weight, made), hessian) / error_of(layer, weight, hessian))
            assert made.rounding == "gptq"
            assert made.rounding_gain is not None
            assert gain > 0.5
            assert made.rounding_gain == pytest.approx(gain, abs=0.01)


def error(weight: Tensor, q: Quantized, hessian: Tensor) -> float:
    return float(output_errors(weight - dequantize(q), hessian).sum())


def error_of(layer: QuantizedLinear, weight: Tensor, hessian: Tensor) -> float:
    held = layer.quantized_weight
    codes = unpack(held.packed, held.format.bits, held.columns)
    return error(weight, Quantized(codes, held.scale, held.zero_point, held.format), hessian)


@pytest.mark.parametrize("balance", ["none", "smooth", "groups"])
def test_every_layer_gains_and_so_does_the_model(balance: str, name: str) -> None:
    recipe, *overrides = BALANCES[balance]
    outputs = {}
    for rounding in ("nearest", "gptq"):
        model, plan, statistics = quantized(name, recipe, *overrides, f"rounding={rounding}")
        assert {layer.rounding for layer in plan.quantized} == {rounding}
        assert all((layer.rounding_gain or 0) > 0 for layer in plan.quantized) == (rounding == "gptq")
        outputs[rounding] = [call_output(model, call) for call in statistics.calls]
    model = small_model(name)
    exact = [call_output(model, call) for call in statistics.calls]
    before, after = (sqnr_db(torch.cat(exact), torch.cat(outputs[r])) for r in ("nearest", "gptq"))
    assert after > before + 1


@torch.no_grad()
def call_output(model: nn.Module, call: dict[str, Any]) -> Tensor:
    return model(**call, return_dict=False)[0]


# ------------------------------------------------------------------------------- files, reproduction


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("qdit-w4a8", groups_of_32()),
        ("qdit-w4a4", groups_of_32(LARGER_DOWN)),
        ("rtn-w4a8", ("weights={bits: 4, symmetric: false, granularity: group, group_size: 64}",
                      "activations={bits: 8, granularity: group, group_size: 32}")),
        ("gptq-w4a4", ()),
    ],
    ids=["groups", "sizes-by-role", "static-groups", "channels"],
)  # fmt: skip
def test_saved_plan_and_integers_give_identical_outputs_through_diffusers(
    recipe: str, overrides: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    model, plan, statistics = quantized(name, recipe, *overrides)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert torch.equal(run(loaded, name), run(model, name))
    assert Plan.model_validate_json(plan.to_json()) == plan
    stored = sum(
        b.numel() * b.element_size() for m in loaded.modules() if isinstance(m, QuantizedLinear) for b in m.buffers()
    )
    expected = sum(layer.stored_bytes() - 2 * layer.out_features * layer.bias for layer in plan.quantized)
    assert stored == expected
    again = small_model(name)
    assert ditq.quantize(again, plan, statistics=statistics).plan == plan
    assert torch.equal(run(again, name), run(model, name))


def test_group_formats_reach_every_layer_and_differ_by_role(name: str) -> None:
    _, plan, _ = quantized(name, "qdit-w4a8", *groups_of_32(LARGER_DOWN))
    for layer in plan.quantized:
        size = 64 if layer.role == "ffn.down" else 32
        assert layer.weight is not None
        assert layer.activation is not None
        assert (layer.weight.group_size, layer.activation.group_size, layer.activation.dynamic) == (size, size, True)


# ------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_grouped_layer_computes_what_its_formats_say(kind: str, symmetric: bool) -> None:
    """Against fake quantization in floats, group by group."""
    if kind == "static" and not symmetric:
        pytest.skip("static scales are symmetric")
    x, linear = torch.randn(7, 64) * torch.rand(64).mul(4).exp(), nn.Linear(64, 24)
    wanted = {
        "bits": 8,
        "granularity": "group",
        "group_size": 16,
        "symmetric": symmetric,
        "dynamic": kind == "dynamic",
    }
    plan = layer_plan(k=64, weight=weight_format(4, "group", symmetric, 16), activation=wanted)
    scale = None
    if kind == "static":
        scale = x.abs().reshape(7, 4, 16).amax((0, 2))[None] / 127
        x = torch.cat([x, 2 * x[:1]])  # saturates
    layer = QuantizedLinear.from_linear(linear, plan, input_scale=scale)
    expected = linear.bias.detach().double().expand(len(x), -1).clone()
    for group in range(4):
        columns = slice(16 * group, 16 * group + 16)
        part = x[:, columns].double()
        if scale is not None:
            rounded = (part / scale[0, group]).round().clamp(-127, 127) * scale[0, group]
        elif symmetric:
            step = part.abs().amax(1, keepdim=True) / 127
            rounded = (part / step).round() * step
        else:
            low, high = part.amin(1, keepdim=True).clamp_max(0), part.amax(1, keepdim=True).clamp_min(0)
            step = (high - low) / 255
            zero = (-low / step).round()
            rounded = (((part / step).round() + zero).clamp(0, 255) - zero) * step
        expected += rounded @ layer.weight[:, columns].double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=2e-3 * float(expected.abs().max()))


def test_static_groups_are_calibrated_per_group(name: str) -> None:
    model, plan, statistics = quantized(name, "rtn-w4a8", "activations={bits: 8, granularity: group, group_size: 32}")
    for group in architectures.load(name).groups(small_model(name)):
        layer = model.get_submodule(group.name)
        assert isinstance(layer, QuantizedLinear)
        largest = statistics.groups[group.name].absmax.amax((0, 1)).reshape(1, -1, 32).amax(-1)
        torch.testing.assert_close(layer.input_scale, largest / 127)
    exact = run(small_model(name), name)
    tensor, *_ = quantized(name, "rtn-static-w4a8")
    assert sqnr_db(exact, run(model, name)) > sqnr_db(exact, run(tensor, name)) - 0.5


@pytest.mark.parametrize(("asked", "got"), [(128, 96), (96, 96), (100, 96), (64, 48), (40, 32)])
def test_group_size_that_does_not_divide_is_refused_or_fitted(asked: int, got: int) -> None:
    # 3 heads of 32: layers of 96 and 384 inputs.
    def quantize(*overrides: str) -> Plan:
        model = tiny_model("dit", num_attention_heads=3)
        sizes = [f"{tensor}.group_size={asked}" for tensor in ("weights", "activations")]
        return ditq.quantize(model, "qdit-w4a8", overrides=[*sizes, "rounding=nearest", *overrides]).plan

    sizes = {
        layer.role: layer.weight.group_size for layer in quantize().quantized if layer.weight and layer.activation
    }
    assert sizes["self_attn.q"] == got
    assert 384 % (sizes["ffn.down"] or 0) == 0
    if got == asked and 384 % asked == 0:
        quantize("fit_groups=false")
    else:
        with pytest.raises(UsageError, match=rf"group_size must divide the \d+ columns, got {asked}.*fit_groups"):
            quantize("fit_groups=false")


# ------------------------------------------------------------------------------------- what is refused


def test_layer_that_gptq_cannot_improve_is_rounded_to_nearest_and_says_so() -> None:
    plan = layer_plan(k=32, n=8, rounding="gptq", gptq=Gptq())
    made, q = round_weight(torch.randn(8, 32), plan, InputHessian(torch.eye(32)))
    assert (made.rounding, made.gptq, made.rounding_gain) == ("nearest", None, None)
    assert "GPTQ did not lower" in made.reason
    assert q.codes.shape == (8, 32)


def test_layers_outside_the_stacks_are_rounded_to_nearest(name: str) -> None:
    _, plan, _ = quantized(name, "gptq-w4a8", "keep=[embedder, final]")
    modulation = [layer for layer in plan.quantized if layer.role == "modulation"]
    assert modulation
    assert all(layer.rounding == "nearest" and layer.activation is None for layer in modulation)


def test_gptq_without_kept_calls_is_refused_before_anything_changes(name: str) -> None:
    model = small_model(name)
    statistics = tiny_statistics(model, name)
    before = run(model, name)
    with pytest.raises(UsageError, match="needs calibration: pass prompts"):
        ditq.quantize(model, "gptq-w4a8")
    statistics.calls = []
    with pytest.raises(UsageError, match="calls of the transformer are needed"):
        ditq.quantize(model, "gptq-w4a8", statistics=statistics)
    assert torch.equal(run(model, name), before)


def test_timestep_ranges_and_gptq_do_not_go_together(name: str) -> None:
    model = small_model(name)
    with pytest.raises((UsageError, ValueError), match="cannot be combined"):
        ditq.quantize(
            model, "smoothquant-w4a8", statistics=tiny_statistics(model, name),
            overrides=["rounding=gptq", "balance.timesteps=[[0, 499], [500, 999]]"],
        )  # fmt: skip


@pytest.mark.parametrize("family", architectures.names())
def test_bare_transformer_is_calibrated_by_a_function(family: str) -> None:
    model = tiny_model(family)

    def run_it(m: nn.Module) -> None:
        for i in range(len(TIMES)):
            run(m, family, seed=i)

    plan = ditq.quantize(model, "gptq-w4a8", calibrate_with=run_it).plan
    assert any(layer.rounding == "gptq" for layer in plan.quantized)
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, QuantizedLinear))


@pytest.mark.parametrize("family", ["pixart", "stdit3", "mochi", "hunyuanvideo"])
def test_what_padded_text_holds_changes_no_weight(family: str) -> None:
    """It never reaches an image, so neither maxima nor Hessians count it, in streams of text and of both kinds."""
    forward = architectures.load(family).forward
    assert forward.text and forward.text_mask
    weights = []
    for held in (0.1, 30.0):
        model = tiny_model(family)

        def run_it(m: nn.Module, held: float = held) -> None:
            for seed in range(2):
                inputs = example_inputs(family, seed=seed)
                mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
                inputs[forward.text_mask] = mask.to(inputs[forward.text_mask].dtype)
                inputs[forward.text][mask == 0] *= held
                with torch.no_grad():
                    m(**inputs)

        ditq.quantize(model, "smoothquant-w4a8", calibrate_with=run_it, overrides=["rounding=gptq"])
        weights.append({n: m.qweight for n, m in model.named_modules() if isinstance(m, QuantizedLinear)})
    first, second = weights
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# ---------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 blocks, Hessians of one exist at a time, and float weights of no block that is done."""
    hessians: weakref.WeakSet[InputHessian] = weakref.WeakSet()
    most = [0]

    class Counted(InputHessian):
        def __init__(self, matrix: Tensor) -> None:
            super().__init__(matrix)
            hessians.add(self)
            most[0] = max(most[0], len(hessians))

    monkeypatch.setattr(method, "InputHessian", Counted)
    model = tiny_model("dit", num_layers=5)
    statistics = tiny_statistics(model, "dit", TIMES)
    weights = weakref.WeakSet(module for module in model.transformer_blocks.modules() if isinstance(module, nn.Linear))
    kept = sum("norm1" in name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    left: list[int] = []
    # As while loading; ditq.quantize keeps them until it returns, to put them back if it fails.
    quantize_model(
        model, architectures.load("dit"), load_recipe("gptq-w4a8"), statistics,
        progress=lambda stage, done, total: left.append(len(weights)) if stage == "quantize" else None,
    )  # fmt: skip
    assert most == [4]  # q, k and v share theirs
    assert len(left) == 5 * 6
    for done, floats in enumerate(left):
        finished = done // 6  # blocks
        assert floats <= kept + 6 * (5 - finished) + 1  # the last linear is in the caller's hands
    gc.collect()
    assert len(weights) == kept


def test_layers_of_one_input_share_the_factor_of_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        method, "inverse_factor", lambda *args: calls.append(args[0].shape) or numerics.inverse_factor(*args)
    )
    quantized("dit", "gptq-w4a8")
    assert len(calls) == 2 * 4  # of two blocks: attention, its output, up, down


def test_plan_calibrated_as_its_recipe_repeats_the_integers() -> None:
    first, second = tiny_dit(), tiny_dit()
    recipe = load_recipe("gptq-w4a8").override(list(QUICK))
    plan = ditq.quantize(first, recipe, prompts=CLASSES).plan
    again = ditq.quantize(second, plan, prompts=CLASSES, calibration=recipe.calibration).plan
    assert again == plan
    a, b = first.transformer.state_dict(), second.transformer.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
