"""compare: any number of models, from paths or in memory, sampled once, reported as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import videos
from helpers import PROMPTS, tiny_pixart

import ditq
from ditq.components import plan_of, transformers
from ditq.errors import UsageError
from ditq.report.document import Report
from ditq.sampling import PictureCache

OPTIONS: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "batch_size": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline, and two quantized copies of it."""
    root = tmp_path_factory.mktemp("models")
    out = {"base": ditq.save(tiny_pixart(), root / "base")}
    for recipe in ("rtn-w8a8", "rtn-w4a4"):
        pipe = ditq.load(out["base"])
        ditq.quantize(pipe, recipe)
        out[recipe] = ditq.save(pipe, root / recipe)
    return out


def test_many_models_from_paths(folders: dict[str, Path], tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "pictures")
    models = [folders["rtn-w8a8"], folders["rtn-w4a4"]]
    found = ditq.compare(folders["base"], models, PROMPTS, cache=cache, explain=2, **OPTIONS)
    assert list(found.models) == ["rtn-w8a8", "rtn-w4a4"]
    scores = found.measurement.scores
    assert scores["rtn-w8a8"]["psnr_db"].mean > scores["rtn-w4a4"]["psnr_db"].mean + 5
    (psnr,) = [d for d in found.measurement.differences if d.metric == "psnr_db"]
    assert (psnr.a, psnr.b, psnr.verdict) == ("rtn-w8a8", "rtn-w4a4", "better")
    assert len(list(cache.folder.rglob("*.safetensors"))) == 3 * len(PROMPTS)
    report = found.report(command="ditq compare")
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert report.reference.name == "base"
    for model in report.models:
        assert model.layer_errors is not None
        assert len(model.layer_errors.sqnr_db) == sum(layer["weight_bits"] < 16 for layer in model.layers)
        assert model.step_time is not None
        assert model.transformer_bytes < report.reference.transformer_bytes
        assert model.latent_sqnr_by_step is not None
        assert len(model.latent_sqnr_by_step.mean) == report.sampler["steps"] == 2
    assert report.sampler["width"] == 16
    assert "reproduce" in report.summary[0]
    assert len(report.summary) == 3


def test_stable_json_of_one_model_and_of_many(folders: dict[str, Path]) -> None:
    one = ditq.compare(folders["base"], folders["rtn-w8a8"], PROMPTS, **OPTIONS).as_dict()
    many = ditq.compare(folders["base"], [folders["rtn-w8a8"], folders["rtn-w4a4"]], PROMPTS, **OPTIONS).as_dict()
    assert json.loads(json.dumps(many))["models"].keys() == {"rtn-w8a8", "rtn-w4a4"}
    for metric in ("psnr_db", "ssim", "latent_sqnr_db"):
        assert one[metric] == many[metric] == many["models"]["rtn-w8a8"][metric]
        assert set(one[metric]) == {"mean", "ci95", "n", "higher_is_better"}


def test_second_comparison_draws_nothing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PictureCache(tmp_path / "pictures")
    first = ditq.compare(folders["base"], folders["rtn-w4a4"], PROMPTS, cache=cache, **OPTIONS)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn twice")

    import diffusers

    monkeypatch.setattr(diffusers.PixArtTransformer2DModel, "forward", refuse)
    second = ditq.compare(folders["base"], folders["rtn-w4a4"], PROMPTS, cache=cache, **OPTIONS)
    assert first.values == second.values


def test_summary_claims_nothing_between_equals(folders: dict[str, Path]) -> None:
    found = ditq.compare(folders["base"], {"a": folders["rtn-w8a8"], "b": folders["rtn-w8a8"]}, PROMPTS, **OPTIONS)
    assert {d.verdict for d in found.measurement.differences} == {"same"}
    assert "b is not measurably further" in found.report().summary[0]


def test_bundled_reference_brings_its_network_and_its_artwork() -> None:
    prompts = ["a noto style emoji of a red apple", "a fluent style emoji of a panda", "a noto style emoji of an owl"]
    found = ditq.compare(
        "bundled:emoji-t2i", "bundled:emoji-t2i", prompts, steps=2, metrics=["concept_score", "feature_distance"]
    )
    score = found.metrics["concept_score"]
    assert (score.network, score.verdict) == ("emoji-classifier", "same")  # type: ignore[attr-defined]
    assert found.real is not None
    assert len(found.real) > 500


@pytest.mark.parametrize(
    ("models", "complaint"),
    [([], "nothing to compare"), (["x/m", "x/m"], "same name")],
)
def test_wrong_lists_are_refused(models: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ditq.compare(tiny_pixart(), models, PROMPTS)


def test_folders_of_one_name_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    twin = tmp_path / "rtn-w8a8"
    twin.symlink_to(folders["rtn-w4a4"])
    found = ditq.compare(folders["base"], [folders["rtn-w8a8"], twin], PROMPTS[:2], **OPTIONS)
    assert list(found.models) == [str(folders["rtn-w8a8"]), str(twin)]


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "no prompts"), ("cat", "got the string 'cat'"), (["a cat", " "], "Prompt 2 of 2")]
)
def test_empty_prompts_and_single_strings_are_refused(folders: dict[str, Path], prompts: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ditq.compare(folders["base"], folders["rtn-w8a8"], prompts, **OPTIONS)


# ------------------------------------------------------------------------------------ two transformers

WAN: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2, "arguments": videos.PIPELINES["wan"][1]}


@pytest.fixture(scope="module")
def experts() -> Any:
    """A comparison with a pipeline whose two experts have other bits, and that pipeline."""
    pipe = videos.wan_of_two_experts()
    for component, recipe in (("transformer", "rtn-w8a8"), ("transformer_2", "rtn-w4a8")):
        ditq.quantize(pipe, recipe, component=component)
    return ditq.compare(videos.wan_of_two_experts(), pipe, PROMPTS[:2], explain=2, **WAN), pipe


def test_both_experts_are_counted_and_explained(experts: Any) -> None:
    found, pipe = experts
    subject = found.models["quantized"]
    plans = {name: plan_of(model) for name, model in transformers(pipe).items()}
    assert subject.plans == plans
    assert subject.transformer_bytes == sum(plan.memory()[0] for plan in plans.values())
    assert found.reference.transformer_bytes == sum(plan.memory()[1] for plan in plans.values())
    (report,) = found.report().models
    names = [layer.name for layer in plans["transformer"].quantized]
    both = [*names, *(f"transformer_2.{layer.name}" for layer in plans["transformer_2"].quantized)]
    assert report.layer_errors.layers == both
    assert [layer["name"] for layer in report.layers if layer["weight_bits"] < 16] == both
    assert report.recipe == "rtn-w8a8, rtn-w4a8"
    assert report.average_bits == pytest.approx(sum(plan.average_bits for plan in plans.values()) / 2)  # of one size
    assert report.step_time.ratio_to_reference > 0
    assert Report.model_validate_json(found.report().model_dump_json()).models == [report]


def test_layers_of_an_expert_have_errors_at_its_own_timesteps(experts: Any) -> None:
    found, _ = experts
    errors = found.models["quantized"].errors
    high = [t >= 600 for t in errors.timesteps]
    assert (len(high), sum(high)) == (4, 2)
    for name, row in zip(errors.layers, errors.sqnr_db, strict=True):
        assert [value is not None for value in row] == [h is not name.startswith("transformer_2.") for h in high]
    first, second = (
        [v for n, row in zip(errors.layers, errors.sqnr_db, strict=True) for v in row
         if v is not None and n.startswith("transformer_2.") is of_second]
        for of_second in (False, True)
    )  # fmt: skip
    assert sum(first) / len(first) > sum(second) / len(second) + 6  # 8 bits against 4


def test_an_expert_in_16_bit_counts_as_such() -> None:
    pipe = videos.wan_of_two_experts()
    plan = ditq.quantize(pipe, "rtn-w4a8", component="transformer_2").plan
    found = ditq.compare(videos.wan_of_two_experts(), pipe, PROMPTS[:1], explain=1, **WAN)
    subject = found.models["quantized"]
    assert subject.plan == plan
    assert subject.transformer_bytes == plan.memory()[0] + plan.memory()[1]
    (report,) = found.report().models
    assert report.average_bits == pytest.approx((plan.average_bits + 16) / 2)
    assert all(name.startswith("transformer_2.") for name in report.layer_errors.layers)
    assert len(report.layer_errors.layers) == len(plan.quantized)


def test_two_pairs_give_means_without_intervals_and_no_verdict(folders: dict[str, Path]) -> None:
    models = [folders["rtn-w8a8"], folders["rtn-w4a4"]]
    found = ditq.compare(folders["base"], models, PROMPTS[:2], metrics=["psnr_db"], **OPTIONS)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["psnr_db"]["ci95"] is None
    assert data["psnr_db"]["n"] == 2
    assert [(d["verdict"], d["difference"]["ci95"]) for d in data["differences"]] == [(None, None)]
    report = found.report()
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert report.models[0].latent_sqnr_by_step is not None
    assert report.models[0].latent_sqnr_by_step.ci95 == []
    assert "measurabl" not in " ".join(report.summary)
