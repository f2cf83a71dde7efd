"""The search on a tiny pipeline: a fresh pipeline with the resulting plan generates the same images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import videos
from helpers import CLASSES, PROMPTS, draw, tiny_dit, tiny_pixart, tiny_statistics

import ditq
from ditq import api, architectures
from ditq.allocation import LATENT, Evolution, Fitness, SearchResult, latent_error_db
from ditq.allocation.search import NOISE_OFFSET
from ditq.components import plan_of, transformers
from ditq.errors import DitqError, UsageError
from ditq.sampling import Sampling, sample

SMALL = Evolution(population=3, top_k=2, crossover=1, mutation=1)
GROUPS = (16, 32, 64, 128)


def search(pipe: Any = None, recipe: str = "rtn-w4a4", **options: Any) -> SearchResult:
    defaults: dict[str, Any] = {
        "strategy": SMALL, "trials": 5, "sizes": GROUPS, "budget": "uniform:32", "steps": 2, "guidance_scale": 3.0
    }  # fmt: skip
    return ditq.search(pipe or tiny_dit(), recipe, CLASSES[:2], **{**defaults, **options})


def test_the_plan_on_a_fresh_pipeline_generates_the_images_of_the_candidate() -> None:
    pipe = tiny_dit()
    result = search(pipe, fitness=LATENT)
    sizes = {layer.weight.group_size for layer in result.plan.quantized}
    assert len(sizes) > 1
    assert all(layer.activation.group_size == layer.weight.group_size for layer in result.plan.quantized)
    assert result.bit_operations <= result.budget * (1 + 1e-6)
    assert result.fitness == min(value for _, value in result.scored)
    fresh = tiny_dit()
    done = api.quantize(fresh, result.plan)
    assert [x.weight for x in done.plan] == [x.weight for x in result.plan]
    assert torch.equal(draw(pipe), draw(fresh))


def test_fitness_of_latents_measured_again_from_the_outside() -> None:
    result = search(fitness=LATENT)
    fresh = tiny_dit()
    api.quantize(fresh, result.plan)
    settings: dict[str, Any] = {"seed": NOISE_OFFSET, "steps": 2, "guidance_scale": 3.0}
    arch = architectures.load("dit")
    reference, drawn = (sample(p, arch, CLASSES[:2], Sampling(**settings)) for p in (tiny_dit(), fresh))
    assert latent_error_db(reference, drawn) == pytest.approx(result.fitness, abs=1e-6)


def test_prediction_error_is_measured_on_the_inputs_of_the_16_bit_model() -> None:
    result = search(moments=2)  # all there are
    calls: list[Any] = []
    pipe, fresh = tiny_dit(), tiny_dit()
    pipe.transformer.register_forward_hook(lambda m, a, k, out: calls.append((a, k, out[0])), with_kwargs=True)
    sample(pipe, architectures.load("dit"), CLASSES[:2], Sampling(seed=NOISE_OFFSET, steps=2, guidance_scale=3.0))
    api.quantize(fresh, result.plan)
    errors = []
    with torch.no_grad():
        for args, kwargs, expected in calls:
            for a, b in zip(expected.double(), fresh.transformer(*args, **kwargs)[0].double(), strict=True):
                errors.append(10 * math.log10((b - a).square().sum() / a.square().sum()))
    assert len(errors) == 2 * 2 * 2  # steps, images, halves of the guidance
    assert result.fitness == pytest.approx(sum(errors) / len(errors), abs=1e-6)


def test_searches_repeat_themselves_by_seed() -> None:
    assert search().scored == search().scored
    assert search().scored != search(seed=1).scored


def test_bit_operations_are_those_of_one_image() -> None:
    # 16 tokens (an 8 x 8 latent in patches of 2), both halves of the guidance, 2 steps; 2 blocks of width 128.
    uniform = search(strategy="uniform", budget="uniform:64", sizes=(64, 128))
    assert uniform.genome == (64,) * 12
    products = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    assert uniform.bit_operations == 16 * 2 * 2 * products * (4 * 4 + 32 / 64)


@pytest.mark.parametrize(("strategy", "count"), [("random", 5), ("uniform", 3), ("program", 1)])
def test_rivals_search_the_same_space(strategy: str, count: int) -> None:
    options = {"calibration": CLASSES, "overrides": ["calibration.steps=2", "calibration.rows=64"]}
    result = search(strategy=strategy, **(options if strategy == "program" else {}))
    assert len(result.scored) == count
    assert result.strategy == strategy
    assert result.bit_operations <= result.budget * (1 + 1e-6)


CALIBRATED: dict[str, Any] = {
    "calibration": CLASSES, "overrides": ["calibration.prompts=2", "calibration.steps=2", "calibration.rows=64"]
}  # fmt: skip


def test_candidates_may_be_rounded_to_nearest_and_the_final_plan_by_gptq() -> None:
    result = search(recipe="qdit-w4a8", rounding="nearest")  # GPTQ needs calibration, but the search does not
    assert {layer.rounding for layer in result.plan.quantized} == {"gptq"}
    assert {layer.rounding for layer in result.candidate.quantized} == {"nearest"}
    assert result.plan.needs_calibration
    assert not result.candidate.needs_calibration


def test_candidates_are_rounded_as_the_recipe_asks() -> None:
    result, nearest = (
        search(recipe="qdit-w3a8", rounding=rounding, strategy="uniform", **CALIBRATED)
        for rounding in ("recipe", "nearest")
    )
    assert {layer.rounding for layer in result.candidate.quantized} == {"gptq"}
    assert len(result.scored) == len(nearest.scored) > 1
    assert all(a[0] == b[0] and a[1] < b[1] for a, b in zip(result.scored, nearest.scored, strict=True))
    with pytest.raises(UsageError, match="needs calibration"):
        search(recipe="qdit-w4a8")


@pytest.mark.parametrize("moments", [1, 2, 3])
def test_moments_of_every_image(moments: int) -> None:
    seen: list[list[int]] = []

    def count(reference: Any, outputs: Any) -> float:
        seen.append([len(rows) for rows in outputs])
        return 0.0

    search(fitness=Fitness("count", count, "outputs"), moments=moments, steps=3, trials=1, batch_size=1)
    assert sum(seen[0]) == 2 * moments * 2  # images, moments, halves of the guidance
    assert len(seen[0]) <= 3  # images of one timestep are merged


def test_a_text_model_with_balance() -> None:
    pipe = tiny_pixart()
    result = ditq.search(
        pipe, "smoothquant-w4a8", ["a red cat"], strategy=SMALL, trials=3, sizes=(16, 32, 64), budget="uniform:32",
        steps=2, calibration=["a small house"], overrides=["calibration.steps=2", "calibration.rows=64"],
    )  # fmt: skip
    assert all(layer.smooth for layer in result.plan.quantized)


def test_latent_error_is_minus_the_sqnr_that_compare_reports() -> None:
    arch = architectures.load("dit")
    quantized = tiny_dit()
    api.quantize(quantized, "rtn-w4a8")
    reference, drawn = (sample(p, arch, CLASSES, Sampling(steps=2)) for p in (tiny_dit(), quantized))
    compared = ditq.compare(reference, drawn, metrics=["latent_sqnr_db"]).metrics["latent_sqnr_db"]
    assert latent_error_db(reference, drawn) == pytest.approx(-compared.mean, abs=1e-4)
    drawn.trajectory[0, -1, 0, 0, 0] = float("nan")
    assert latent_error_db(reference, drawn) == math.inf


def test_candidates_that_all_draw_nan_are_an_error() -> None:
    with pytest.raises(DitqError, match="All 5 candidates generate NaN"):
        search(fitness=Fitness("nan", lambda reference, candidate: math.nan))


def test_usage_errors() -> None:
    with pytest.raises(
        UsageError, match="Unknown strategy 'annealing'.*error, evolution, greedy, program, random, uniform"
    ):
        search(strategy="annealing")
    with pytest.raises(UsageError, match="at least 1 trial"):
        search(trials=0)
    with pytest.raises(UsageError, match="got moments=0"):
        search(moments=0)
    with pytest.raises(UsageError, match="Unknown rounding of candidates 'gptq'.*nearest, recipe"):
        search(rounding="gptq")
    with pytest.raises(UsageError, match="needs calibration"):
        search(strategy="program")
    with pytest.raises(UsageError, match="nothing to search"):
        search(sizes=None, budget="uniform:128")
    quantized = tiny_dit()
    api.quantize(quantized, "rtn-w4a8")
    with pytest.raises(UsageError, match="quantized already"):
        search(quantized)


# ------------------------------------------------------------------------------------ two transformers

WAN: dict[str, Any] = {
    "strategy": SMALL, "trials": 3, "sizes": (16, 32, 64), "budget": "uniform:32", "steps": 4,
    "arguments": videos.PIPELINES["wan"][1],
}  # fmt: skip


def test_both_experts_are_searched_one_after_the_other() -> None:
    pipe = videos.wan_of_two_experts()
    result = ditq.search(pipe, "rtn-w4a4", PROMPTS[:1], **WAN)
    assert list(result.plans) == ["transformer", "transformer_2"]
    assert result.plan == result.plans["transformer"]
    assert [plan_of(model) for model in transformers(pipe).values()] == [result.candidate, result.others[0].candidate]
    assert len({layer.weight.group_size for plan in result.plans.values() for layer in plan.quantized}) > 1
    assert result.summary().startswith("transformer:\nevolution: ")
    assert "\ntransformer_2:\nevolution: " in result.summary()
    fresh = videos.wan_of_two_experts()
    for component, plan in result.plans.items():
        api.quantize(fresh, plan, component=component)
    sampling = Sampling(steps=2, arguments=WAN["arguments"])
    a, b = (sample(p, architectures.load("wan"), PROMPTS[:1], sampling).latents for p in (pipe, fresh))
    assert torch.equal(a, b)


def test_one_of_two_experts_is_searched_on_its_own_timesteps() -> None:
    pipe = videos.wan_of_two_experts()
    seen: list[int] = []

    def count(reference: Any, outputs: Any) -> float:
        seen.append(sum(len(rows) for rows in outputs))
        return 0.0

    options = {**WAN, "trials": 1, "fitness": Fitness("count", count, "outputs"), "moments": 4}
    result = ditq.search(pipe, "rtn-w4a4", PROMPTS[:1], component="transformer_2", **options)
    assert result.plans == {"transformer_2": result.plan}
    assert seen == [2 * 2]  # of the 4 steps the second half, both conditions
    assert plan_of(pipe.transformer) is None
    with pytest.raises(UsageError, match="does not have a transformer_3; it has transformer, transformer_2"):
        ditq.search(videos.wan_of_two_experts(), "rtn-w4a4", PROMPTS[:1], component="transformer_3", **WAN)
    with pytest.raises(DitqError, match="transformer_2 is not called"):
        ditq.search(
            videos.wan_of_two_experts(), "rtn-w4a4", PROMPTS[:1], component="transformer_2", **{**WAN, "steps": 1}
        )


def test_statistics_of_one_transformer_do_not_serve_two() -> None:
    pipe = videos.wan_of_two_experts()
    statistics = tiny_statistics(pipe.transformer, "wan")
    with pytest.raises(UsageError, match="component="):
        ditq.search(pipe, "smoothquant-w4a8", PROMPTS[:1], statistics=statistics, **WAN)


def test_a_study_belongs_to_its_scheduler_and_its_prompts(tmp_path: Path) -> None:
    storage = tmp_path / "s.search"
    search(storage=storage, strategy="uniform")
    assert search(storage=storage, strategy="uniform").evaluated == 0
    other = tiny_dit()
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.03)
    with pytest.raises(UsageError, match="model and code"):
        search(other, storage=storage, strategy="uniform")


@pytest.mark.parametrize(("prompts", "words"), [([" "], "Prompt 1 of 1 is empty"), ("7", "got the string '7'")])
def test_empty_prompts_and_single_strings_are_refused(prompts: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ditq.search(tiny_dit(), "rtn-w4a4", prompts)
