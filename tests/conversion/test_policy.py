"""Step policies: ranges of timesteps with more bits, in plans, files and pipelines."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from helpers import draw, layer_plan, normal_weights, tiny_model, tiny_pixart, token_format, weight_format

import ditq
from ditq import recipe as recipes
from ditq.conversion.finest import drop_steps, without_steps
from ditq.conversion.policy import with_policy
from ditq.errors import UsageError
from ditq.layers import QuantizedLinear, SteppedLinear
from ditq.plan import ALWAYS, Plan

DOWN = [900.0, 700.0, 500.0, 300.0, 100.0]
UP = [0.1, 0.3, 0.5, 0.7, 0.9]
POLICY = "diffusion_step_policy={first_steps: 1, last_steps: 2}"


def recipe(*overrides: str, name: str = "rtn-w4a4") -> recipes.Recipe:
    return recipes.load(name).override(overrides)


LAYER = layer_plan(weight=weight_format(4), activation=token_format(4))


@pytest.mark.parametrize(("trajectory", "begin", "end"), [(DOWN, 400, 800), (UP, 0.2, 0.6)])
def test_middle_steps_keep_the_bits_of_the_recipe(trajectory: list[float], begin: float, end: float) -> None:
    [layer] = with_policy([LAYER], recipe(POLICY), trajectory)
    assert layer.activation == token_format(8) and layer.weight == LAYER.weight
    assert layer.steps is not None and [step.activation for step in layer.steps] == [token_format(4)]
    assert (layer.steps[0].begin, layer.steps[0].end) == pytest.approx((begin, end))
    bits = [layer.activation_at(time).bits for time in trajectory]  # type: ignore[union-attr]
    assert bits == [8, 4, 4, 8, 8]
    assert layer.average_activation_bits(trajectory) == pytest.approx((3 * 8 + 2 * 4) / 5)


def test_first_steps_alone_and_16_bit() -> None:
    [layer] = with_policy([LAYER], recipe("diffusion_step_policy={first_steps: 2}", "step_activations=16"), DOWN)
    assert layer.activation is None and layer.steps is not None
    assert [layer.activation_at(time) for time in DOWN] == [None, None, *[token_format(4)] * 3]
    assert layer.steps[0].begin == -ALWAYS


def test_weights_by_step_are_further_copies_and_are_counted() -> None:
    [layer] = with_policy([LAYER], recipe("diffusion_step_policy={first_steps: 2}", "step_weights=8"), DOWN)
    assert layer.weight_bits == 8 and [grid.bits for grid in layer.range_weights or ()] == [4, 8]
    assert layer.average_weight_bits(DOWN) == pytest.approx((2 * 8 + 3 * 4) / 5)
    alone = [layer.in_range(i).stored_bytes() for i in range(2)]
    assert layer.stored_bytes() == sum(alone) and alone[1] > alone[0]


def test_steps_of_eight_bits_have_uniform_levels() -> None:
    """There are normal ones up to 6 bits."""
    fields = {"activation": token_format(4, levels="normal"), "weight": normal_weights()}
    [layer] = with_policy([LAYER.model_copy(update=fields)], recipe("diffusion_step_policy={first_steps: 2}"), DOWN)
    assert [layer.activation_at(time) for time in DOWN] == [*[token_format(8)] * 2, *[fields["activation"]] * 3]
    weights = recipe("diffusion_step_policy={first_steps: 2}", "step_weights=8")
    [layer] = with_policy([LAYER.model_copy(update=fields)], weights, DOWN)
    assert [grid.levels for grid in layer.range_weights or ()] == ["normal", "uniform"]


@pytest.mark.parametrize(
    ("overrides", "trajectory", "message"),
    [
        ([POLICY], [], "pass a pipeline"),
        ([POLICY], DOWN[:3], "1 first and 2 last steps, and the run has 3"),
        ([POLICY, "step_activations=4"], DOWN, "no layer of W4A4 gets more bits by step_activations=4"),
        (["diffusion_step_policy={first_steps: 1}", "step_weights=3"], DOWN, "by step_weights=3"),
    ],
)
def test_policies_without_effect_are_refused(overrides: list[str], trajectory: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_policy([LAYER], recipe(*overrides), trajectory)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step_activations=8"], "it needs diffusion_step_policy"),
        (["diffusion_step_policy={}"], "first_steps or last_steps of at least 1"),
        (["diffusion_step_policy={type: every_n, first_steps: 1}"], "first_last_n"),
        ([POLICY, "step_activations=12"], "2 to 8, or 16"),
        ([POLICY, "step_activations=8", "step_weights=8"], "cannot be combined"),
        ([POLICY, "step_weights=8", "rounding=gptq"], "cannot be combined with rounding=gptq"),
    ],
)
def test_wrong_policies_are_refused_by_the_recipe(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe(*overrides)


def test_a_transformer_alone_has_no_steps_to_count() -> None:
    with pytest.raises(UsageError, match="pass a pipeline"):
        ditq.quantize(tiny_model("pixart"), recipe(POLICY))


@pytest.mark.parametrize(
    "overrides", [[POLICY, "calibration.steps=5"], [POLICY, "calibration.steps=5", "step_weights=6"]]
)
def test_quantized_pipeline_loads_the_same(overrides: list[str], tmp_path: Path) -> None:
    pipe = tiny_pixart()
    plan = ditq.quantize(pipe, "rtn-w4a4", overrides=overrides).plan
    assert len(plan.trajectory or ()) == 5 and plan.follows_timesteps
    assert Plan.from_dict(plan.model_dump(mode="json")) == plan
    expected = draw(pipe, steps=5)
    pipe.save_pretrained(tmp_path / "out")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert again.transformer.config.quantization_config.plan == plan
    assert torch.equal(draw(again, steps=5), expected)


def test_policy_lies_between_both_widths() -> None:
    def error(*overrides: str, name: str = "rtn-w8a3") -> float:
        pipe = tiny_pixart()
        before = draw(pipe, steps=6)
        ditq.quantize(pipe, name, overrides=overrides)
        return float((draw(pipe, steps=6) - before).square().mean())

    policy = error("diffusion_step_policy={first_steps: 3, last_steps: 2}", "calibration.steps=6")
    assert error(name="rtn-w8a8") < policy < error()


def test_gptq_rounds_with_the_grids_of_each_call() -> None:
    pipe = tiny_pixart()
    overrides = [POLICY, "calibration.steps=4", "rounding=gptq", "calibration.prompts=2", "calibration.calls=2"]
    plan = ditq.quantize(pipe, "rtn-w4a4", prompts=["a cat", "a dog"], overrides=overrides).plan
    assert any(layer.rounding == "gptq" and layer.steps for layer in plan.quantized)


def test_steps_can_be_dropped_for_the_finest_grid() -> None:
    pipe = tiny_pixart()
    plan = ditq.quantize(pipe, "rtn-w4a4", overrides=[POLICY, "calibration.steps=5"]).plan
    changed = drop_steps(pipe.transformer)
    layers = [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert changed == sum(layer.steps is not None for layer in plan) and not any(
        type(m) is SteppedLinear for m in layers
    )
    flat = without_steps(plan)
    assert {m.plan.name: m.plan.activation for m in layers} == {x.name: x.activation for x in flat.quantized}
    twin = tiny_pixart()
    ditq.quantize(twin, "rtn-w4a8")
    assert torch.equal(draw(pipe, steps=5), draw(twin, steps=5))
