"""Bits by sensitivity scores: what is asked for, budgets that hold for the resulting plans, and saved results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import videos
from helpers import CLASSES, PROMPTS, QUICK, draw, tiny_dit, tiny_pixart

import ditq
from ditq import api
from ditq.allocation import Bits, SearchResult, bits
from ditq.allocation.costs import bit_operations
from ditq.allocation.uncertainty import Agreement
from ditq.components import plan_of
from ditq.errors import UsageError
from ditq.plan import LayerPlan, Plan

SMALL: dict[str, Any] = {"unit": "role", "steps": 4, "guidance_scale": 3.0, "moments": 2, "batch_size": 4}
WAN: dict[str, Any] = {"unit": "role", "steps": 4, "moments": 1, "arguments": videos.PIPELINES["wan"][1]}


def search(pipe: Any = None, recipe: str = "rtn-w4a8", **options: Any) -> SearchResult:
    return ditq.search(pipe or tiny_dit(), recipe, CLASSES, **{**SMALL, **options})


def in_blocks(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan if layer.role.startswith(("self_attn.", "cross_attn.", "ffn."))]


def averages(plans: Sequence[Plan], bits_of: Callable[[LayerPlan], float]) -> float:
    layers = [layer for plan in plans for layer in in_blocks(plan)]
    return sum(bits_of(layer) * layer.parameters for layer in layers) / sum(layer.parameters for layer in layers)


# ------------------------------------------------------------------------------------- the request


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy": "evolution"}, "Unknown strategy 'evolution'.*decoupled, error, greedy"),
        ({"weights": ()}, r"Pass widths to choose from: weights=\[8, 4, 3\]"),
        ({"weights": (9, 4)}, "Bits of weights must be 2 to 8, or 16 .*; got 9"),
        ({"unit": "model"}, "layer, block or role, got 'model'"),
        ({"segments": 0}, r"Segments of the trajectory \(at least 1\)"),
        ({"segments": 2}, "their own activations: pass activations="),
        ({"metrics": {"content": "ssim"}}, "metrics have no effect with strategy 'error'"),
        ({"strategy": "decoupled", "metrics": {"colour": "ssim"}}, "Unknown group of roles 'colour'"),
        ({"strategy": "decoupled", "unit": "block"}, "roles of several groups: use unit 'layer' or 'role'"),
        (
            {"strategy": "decoupled", "metrics": {"content": "ssim"}, "activations": (8,), "segments": 2},
            "pass metrics or segments, not both",
        ),
        ({"budget": ("activations:6",)}, "Bits of weights need a budget of their own: pass budget=5GB or weights:4"),
        ({"activations": (8, 4)}, "Bits of activations need a budget of their own: pass budget=activations:6"),
        ({"budget": ("weights:4", "activations:6")}, "'activations:6' limits nothing that is chosen .weights."),
        ({"budget": ("weights:4", "weights:5")}, "Two budgets limit the same cost"),
        ({"budget": ("weights:0",)}, "more than 0, got 'weights:0'"),
        ({"budget": ("uniform:128",)}, "'uniform:128' is one of group sizes"),
        ({"budget": ("4 bits",)}, "A budget must be .* got '4 bits'"),
    ],
)
def test_wrong_requests(fields: dict[str, Any], words: str) -> None:
    defaults: dict[str, Any] = {"budget": ("weights:4",), "weights": (8, 4)}
    with pytest.raises(UsageError, match=words):
        Bits(**{**defaults, **fields})


def test_every_part_has_its_budgets_and_bit_operations_limit_the_last_one() -> None:
    both = Bits(("5GB", "weights:4", "activations:6", 1e12), (8, 4), (8, 4))
    assert both.parts == ("weights", "activations")
    assert both.budgets("weights") == ("5GB", "weights:4")
    assert both.budgets("activations") == ("activations:6", 1e12)
    assert Bits((1e12,), (8, 4)).budgets("weights") == (1e12,)
    assert Bits(("5GB", 1e12), (8, 4), (8, 4)).budgets("activations") == (1e12,)


def test_choices_of_segments_are_of_activations_only() -> None:
    request = Bits(("weights:4", "activations:6"), (8, 4), (8, 6), unit="role", segments=2)
    steps = [900.0, 600.0, 300.0, 0.0]
    assert request.choices("weights", steps).segments == ()
    choices = request.choices("activations", steps)
    assert (choices.unit, choices.activations, len(choices.segments)) == ("role", (8, 6), 2)
    assert request.choices("activations", ()).segments == ()  # before the timesteps are known


# ------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("strategy", ["error", "greedy", "decoupled"])
def test_the_plan_is_within_the_average_bits_and_uses_them(strategy: str) -> None:
    pipe = tiny_dit()
    result = search(
        pipe, weights=[8, 4, 3], activations=[8, 6, 4], budget=["weights:4.4", "activations:6"], strategy=strategy
    )
    weights = averages([result.plan], lambda layer: layer.weight_bits)
    inputs = averages([result.plan], lambda layer: layer.activation_bits)  # all layers read as many tokens
    assert 4 <= weights <= 4.4 + 1e-9 and 5 <= inputs <= 6 + 1e-9
    assert (result.costs["weights"], result.costs["activations"]) == pytest.approx((weights, inputs))
    assert result.costs["bytes"] == result.plan.memory()[0]
    assert result.strategy == strategy
    assert len({layer.weight_bits for layer in in_blocks(result.plan)}) > 1
    assert [(x.gene, x.choice[0]) for x in result.chosen] == [
        (role, part) for part in "wa" for role in dict.fromkeys(layer.role for layer in in_blocks(result.plan))
    ]
    for one in result.chosen:
        layers = [layer for layer in in_blocks(result.plan) if layer.role == one.gene]
        widths = {layer.weight_bits if one.choice[0] == "w" else layer.activation_bits for layer in layers}
        assert widths == {int(one.choice[1:])}
        assert one.parameters == sum(layer.parameters for layer in layers)
        assert 0 <= one.error <= one.cheapest
    assert f"weights: {weights:.6g} of 4.4 bits on average" in result.notes
    fresh = tiny_dit()
    api.quantize(fresh, result.plan)
    assert torch.equal(draw(pipe), draw(fresh))


def test_the_plan_is_within_bytes_and_bit_operations() -> None:
    full = tiny_dit()
    lowest = api.quantize(full, "rtn-w4a8").plan.memory()[0]
    limit = lowest + 40_000
    result = search(weights=[8, 4], budget=f"{limit / 1000}KB")
    assert lowest < result.plan.memory()[0] <= limit
    assert f"weights: {result.plan.memory()[0] / 1e6:.2f} of {limit / 1e6:.2f} MB" in result.notes
    result = search(weights=[8, 4], activations=[8, 4], budget=["weights:5", 1.5e9])
    rows = 2 * 4 * 16  # halves of the guidance, steps, tokens
    own = sum(bit_operations(layer, rows) for layer in in_blocks(result.plan))
    assert own == pytest.approx(result.bit_operations)
    assert 0.8 * 1.5e9 < own <= 1.5e9


def test_an_infeasible_budget_says_which_one_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "measure_sensitivity", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(
        UsageError, match=r"budget of 2 average bits of the searched weights.*\(w3\) take 3, 1 more\. Raise the budget"
    ):
        search(weights=[4, 3], budget="weights:2")
    with pytest.raises(UsageError, match=r"budget of 60000 bytes of the transformer as stored.*\(w4\) take .*e\+06"):
        search(weights=[8, 4], budget="60KB")
    with pytest.raises(UsageError, match=r"budget of 3\.5 average bits of the searched layers' inputs.*take 4, 0\.5"):
        search(weights=[8, 4], activations=[8, 4], budget=["weights:6", "activations:3.5"])


def test_scores_that_are_noise_rank_nothing_and_the_notes_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Agreement("all widths", 0.1, -0.5, 0.6, 0.4, 6, 4)
    monkeypatch.setattr(bits, "agreement", lambda *_: [noise])
    result = search(weights=[8, 4], budget="weights:6")
    assert "weights: " + str(noise) + "; all count alike, by their size" in result.notes
    assert "the scores are noise" in result.summary()
    assert averages([result.plan], lambda layer: layer.weight_bits) <= 6 + 1e-9
    per_weight = {x.choice: x.error / x.parameters for x in result.chosen}
    assert len(per_weight) == 2
    assert [x.error / x.parameters for x in result.chosen] == pytest.approx(
        [per_weight[x.choice] for x in result.chosen]
    )
    alike = Agreement("all widths", 0.9, 0.7, 1.0, 0.01, 6, 4)
    monkeypatch.setattr(bits, "agreement", lambda *_: [alike])
    assert f"weights: {alike}" in search(weights=[8, 4], budget="weights:6").notes


def test_metrics_of_groups_decide_within_them() -> None:
    options = {**SMALL, "steps": 2, "moments": 1}
    result = ditq.search(
        tiny_pixart(), "rtn-w4a8", PROMPTS, weights=[8, 4], budget="weights:6", strategy="decoupled",
        metrics={"content": "psnr_db"}, **options,
    )  # fmt: skip
    text = "\n".join(result.notes)
    assert "weights: content: " in text and "weights: quality: " in text
    assert averages([result.plan], lambda layer: layer.weight_bits) <= 6 + 1e-9


def test_what_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "plan_layers", lambda *_, **__: pytest.fail("too late"))
    monkeypatch.setattr(bits, "measure_sensitivity", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UsageError, match="those of one transformer: name it, e.g. component='transformer'"):
        ditq.search(
            videos.wan_of_two_experts(), "rtn-w4a8", PROMPTS, weights=[8, 4], budget="weights:6", strategy="decoupled"
        )
    with pytest.raises(UsageError, match="by segments=; leave diffusion_step_policy out"):
        search(activations=[8, 4], budget="activations:6", overrides=["diffusion_step_policy={first_steps: 1}"])


def test_bits_of_weights_with_a_step_policy() -> None:
    result = ditq.search(
        tiny_pixart(), "rtn-w4a4", PROMPTS, weights=[8, 4], budget="weights:6", steps=4, moments=1, unit="role",
        overrides=["diffusion_step_policy={first_steps: 1}"],
    )  # fmt: skip
    assert {layer.weight_bits for layer in result.plan.quantized} == {4, 8}
    assert all(layer.steps and layer.activation_bits == 8 for layer in result.plan.quantized)
    assert len(result.plan.trajectory or ()) == 4
    assert 4 < result.costs["activations"] < 8


# ------------------------------------------------------------------------------------- two transformers


def test_two_transformers_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bits.measure_sensitivity

    def scaled(*args: Any, component: str, **options: Any) -> Any:
        """The second transformer suffers a million times less."""
        scores = measure(*args, component=component, **options)
        if component == "transformer":
            return scores
        values = {
            name: tuple(tuple(tuple(1e-6 * x for x in rows) for rows in gene) for gene in of_metric)
            for name, of_metric in scores.values.items()
        }
        return scores.model_copy(update={"values": values})

    monkeypatch.setattr(bits, "measure_sensitivity", scaled)
    result = ditq.search(videos.wan_of_two_experts(), "rtn-w4a8", PROMPTS, weights=[8, 4], budget="weights:6", **WAN)
    assert list(result.plans) == ["transformer", "transformer_2"]
    first, second = (averages([plan], lambda layer: layer.weight_bits) for plan in result.plans.values())
    assert (first, second) == (8, 4)  # equal sizes: the first takes all that there is
    assert averages(list(result.plans.values()), lambda layer: layer.weight_bits) == 6
    assert any(note.startswith("weights of transformer_2: ") for note in result.notes)
    assert result.notes == result.others[0].notes
    assert {x.choice for x in result.others[0].chosen} == {"w4"}


def test_both_transformers_together_fit_into_the_bytes() -> None:
    pipe = videos.wan_of_two_experts()
    limit = 1_500_000
    result = ditq.search(pipe, "rtn-w4a8", PROMPTS, weights=[8, 4], budget=f"{limit}B", **WAN)
    sizes = [plan.memory()[0] for plan in result.plans.values()]
    assert limit - 40_000 < sum(sizes) <= limit
    fresh = videos.wan_of_two_experts()
    for name, plan in result.plans.items():
        api.quantize(fresh, plan, component=name)
        assert plan_of(getattr(fresh, name)) == plan_of(getattr(pipe, name))


# ------------------------------------------------------------------------------------- saved results


def test_layers_kept_in_16_bit_are_saved_and_loaded_with_gptq(tmp_path: Path) -> None:
    result = search(recipe="qdit-w4a8", weights=[16, 8, 4], budget="weights:9", overrides=QUICK, steps=2, moments=1)
    kept = [layer for layer in in_blocks(result.plan) if layer.weight is None]
    assert kept and all(layer.reason == "kept in 16 bit by the search" for layer in kept)
    assert all(layer.activation is None for layer in kept)  # nothing of a kept layer is quantized
    assert averages([result.plan], lambda layer: layer.weight_bits) <= 9 + 1e-9
    quantized = [layer for layer in in_blocks(result.plan) if layer.weight is not None]
    assert quantized and all(layer.rounding == "gptq" for layer in quantized)
    fresh = tiny_dit()
    quick = ditq.recipe.Calibration(prompts=2, steps=2, batch_size=2, rows=64)
    done = api.quantize(fresh, result.plan, prompts=CLASSES, calibration=quick)
    assert [layer.weight for layer in done.plan] == [layer.weight for layer in result.plan]
    loaded = ditq.load(ditq.save(fresh, tmp_path / "out"))
    assert plan_of(loaded.transformer) == done.plan
    assert torch.equal(draw(loaded), draw(fresh))


def test_segments_are_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    result = search(activations=[8, 6, 4], segments=2, budget="activations:6")
    changing = [layer for layer in in_blocks(result.plan) if layer.steps]
    assert changing and result.plan.follows_timesteps
    trajectory = result.plan.trajectory
    assert trajectory is not None and len(trajectory) == 4
    inputs = averages([result.plan], lambda layer: layer.average_activation_bits(trajectory))
    assert 5.5 < inputs <= 6 + 1e-9
    assert result.costs["activations"] == pytest.approx(inputs)
    segments = list(dict.fromkeys(x.segment for x in result.chosen))
    assert len(segments) == 2 and all(x.gene.endswith(f", {x.segment}") for x in result.chosen)
    by_gene = {x.gene: int(x.choice[1:]) for x in result.chosen}
    for layer in changing:
        widths = [layer.activation_at(time) for time in (trajectory[0], trajectory[-1])]
        assert [grid and grid.bits for grid in widths] == [by_gene[f"{layer.role}, {s}"] for s in segments]
    pipe = tiny_dit()
    api.quantize(pipe, result.plan)
    loaded = ditq.load(ditq.save(pipe, tmp_path / "out"))
    assert plan_of(loaded.transformer) == plan_of(pipe.transformer)
    assert [layer.steps for layer in plan_of(loaded.transformer)] == [layer.steps for layer in result.plan]
    assert torch.equal(draw(loaded, steps=4), draw(pipe, steps=4))
