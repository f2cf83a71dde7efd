"""The verbs on tiny complete pipelines: quantize, save, load, compare."""

from __future__ import annotations

import os
import pydoc
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import videos
from helpers import (
    CLASSES,
    CONDITIONS,
    PIPELINES,
    PROMPTS,
    QUICK,
    alphas,
    draw,
    example_inputs,
    run,
    tiny_dit,
    tiny_model,
    tiny_pixart,
)

import ditq
from ditq.calibration import calibrate
from ditq.checkpoint.folder import read_plan, read_plans
from ditq.digests import of_tensor
from ditq.errors import CheckpointError, DitqError, UsageError
from ditq.files import new_folder
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db
from ditq.recipe import Calibration


@pytest.fixture(params=PIPELINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_front_door_is_a_table_of_contents() -> None:
    document = str(ditq.__doc__)
    for name in dir(ditq):
        assert getattr(ditq, name) is not None
        if name not in ("__version__", "TensorFormat"):  # the latter is an older name of Grid
            assert name in document.partition("Verbs:")[2], name
    assert len(pydoc.render_doc(ditq).splitlines()) < 120


# ------------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize("recipe", ["viditq-w4a8", "smoothquant-w8a8", "rtn-static-w8a8", "quarot-w6a6"])
def test_quantized_pipeline_saved_and_reloaded_generates_the_same_image(
    recipe: str, name: str, tmp_path: Path
) -> None:
    pipe = PIPELINES[name]()
    exact = draw(pipe)
    overrides = [*QUICK, *alphas(recipe)]
    result = ditq.quantize(pipe, recipe, prompts=CONDITIONS[name], overrides=overrides)
    assert result.model is pipe.transformer
    assert result.plan.recipe == recipe
    before = draw(pipe)
    assert not torch.equal(before, exact)
    assert sqnr_db(exact, before) > 18
    out = ditq.save(pipe, tmp_path / "out")
    assert left_over(tmp_path) == ["out"]
    for load in (diffusers.DiffusionPipeline.from_pretrained, ditq.load):
        loaded = load(out)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert torch.equal(draw(loaded), before)
    assert read_plan(out) == result.plan


def test_result_says_what_was_done(name: str) -> None:
    pipe = PIPELINES[name]()
    stages: list[tuple[str, int, int]] = []
    result = ditq.quantize(
        pipe, "smoothquant-w4a8", prompts=CONDITIONS[name], overrides=QUICK, progress=lambda *s: stages.append(s)
    )
    assert set(result.seconds) == {"calibrate", "quantize"}
    assert "torch" in result.engine
    assert "cpu" in result.engine
    summary = result.summary()
    for part in ("smoothquant-w4a8", "attn1.to_q", "smooth 0.5", "final", "torch on cpu"):
        assert part in summary
    assert dict.fromkeys(stage for stage, _, _ in stages) == {"calibrate": None, "balance": None, "quantize": None}
    for stage in ("calibrate", "balance", "quantize"):
        done, total = [(d, t) for s, d, t in stages if s == stage][-1]
        assert done == total


def test_two_quantizations_are_bit_identical(name: str) -> None:
    states = []
    for _ in range(2):
        pipe = PIPELINES[name]()
        ditq.quantize(pipe, "viditq-w4a8", prompts=CONDITIONS[name], overrides=[*QUICK, "balance.alpha=0.5"], seed=3)
        states.append(pipe.transformer.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_bare_transformer_with_a_calibration_callable(name: str) -> None:
    model = tiny_model(name)
    exact = run(model, name)
    calls = []

    def calibrate(transformer: Any) -> None:
        for seed in range(2):
            calls.append(seed)
            transformer(**example_inputs(name, seed))

    ditq.quantize(model, "smoothquant-w8a8", calibrate_with=calibrate)
    assert calls == [0, 1]
    assert sqnr_db(exact, run(model, name)) > 28


def test_plan_of_a_pipeline_is_carried_out_on_another(name: str) -> None:
    first, second = PIPELINES[name](), PIPELINES[name]()
    plan = ditq.quantize(first, "quarot-w4a8").plan
    assert ditq.quantize(second, plan).plan.layers == plan.layers
    assert torch.equal(draw(first), draw(second))


def test_nan_weight_is_refused_by_name_before_anything_is_changed(name: str) -> None:
    for value in (float("nan"), float("inf")):
        pipe = PIPELINES[name]()
        with torch.no_grad():
            pipe.transformer.transformer_blocks[1].ff.net[2].weight[3, 5] = value
        with pytest.raises(DitqError, match=r"'transformer_blocks\.1\.ff\.net\.2\.weight'.*NaN or Inf"):
            ditq.quantize(pipe, "rtn-w8a8")
        assert not any(isinstance(m, QuantizedLinear) for m in pipe.transformer.modules())


def test_quantizing_twice_is_refused(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name]()
    ditq.quantize(pipe, "rtn-w8a8")
    with pytest.raises(UsageError, match="quantized already"):
        ditq.quantize(pipe, "rtn-w4a8")
    ditq.save(pipe, tmp_path / "out")
    with pytest.raises(UsageError, match="quantized already"):
        ditq.quantize(ditq.load(tmp_path / "out"), "rtn-w4a8")


@pytest.mark.parametrize("prompts", [[], ["", "  "]], ids=["none", "blank"])
def test_empty_prompts_are_refused(prompts: list[str]) -> None:
    with pytest.raises(UsageError, match="no calibration prompts"):
        ditq.quantize(tiny_pixart(), "viditq-w4a8", prompts=prompts)


def test_missing_prompts_say_what_to_pass() -> None:
    with pytest.raises(UsageError, match=r"'viditq-w4a8' needs calibration: pass prompts=\[...\]\."):
        ditq.quantize(tiny_pixart(), "viditq-w4a8")
    with pytest.raises(UsageError, match="calibrate_with=function"):
        ditq.quantize(tiny_model("dit"), "viditq-w4a8")


@pytest.mark.parametrize(
    ("pipe", "recipe", "kwargs", "complaint"),
    [
        (tiny_dit, "rtn-x8a8", {}, "Unknown recipe"),
        (tiny_dit, "rtn-w8a8", {"overrides": ["weights.bits=1"]}, "weights.bits"),
        (tiny_dit, "rtn-w8a8", {"architecture": "unet"}, "Unknown architecture"),
        (tiny_dit, "rtn-w8a8", {"architecture": "pixart"}, "pixart.*does not have"),
        (object, "rtn-w8a8", {}, "got object"),
        (lambda: torch.nn.Linear(3, 3), "rtn-w8a8", {}, "architecture of Linear"),
    ],
    ids=["recipe", "override", "architecture", "wrong-architecture", "no-pipeline", "unknown-class"],
)
def test_wrong_requests_are_usage_errors(pipe: Any, recipe: str, kwargs: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ditq.quantize(pipe(), recipe, **kwargs)


def test_formats_that_do_not_fit_are_refused_before_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.api.calibrate", lambda *args, **kwargs: pytest.fail("calibrated first"))
    wrong = [*QUICK, "fit_groups=false", "weights.group_size=96", "activations.group_size=96"]
    with pytest.raises(UsageError, match="group_size must divide the 128 columns, got 96"):
        ditq.quantize(tiny_dit(), "qdit-w4a8", prompts=["3"], overrides=wrong)


def test_overriding_a_plan_is_refused() -> None:
    plan = ditq.quantize(tiny_dit(), "rtn-w8a8").plan
    with pytest.raises(UsageError, match="overrides change recipes only"):
        ditq.quantize(tiny_dit(), plan, overrides=["seed=1"])


IDLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "calibration-with-recipe": (tiny_dit, {"calibration": Calibration(steps=2)}, "overrides=.*calibration.steps"),
    "calibrate_with-with-pipeline": (tiny_dit, {"calibrate_with": print}, "bare transformer"),
    "prompts-with-transformer": (lambda: tiny_model("dit"), {"prompts": ["3"]}, "calibrate_with=function"),
    "statistics-and-prompts": (tiny_dit, {"statistics": object(), "prompts": ["3"]}, "without prompts"),
    "statistics-and-function": (
        lambda: tiny_model("dit"),
        {"statistics": object(), "calibrate_with": print},
        "without prompts, calibrate_with",
    ),
    "cache-without-calibration": (tiny_dit, {"cache": Path("cache"), "recipe": "rtn-w8a8"}, "Leave them out"),
    "resume-with-statistics": (tiny_dit, {"resume": True, "statistics": object()}, "Leave them out"),
    "resume-with-function": (lambda: tiny_model("dit"), {"resume": True, "calibrate_with": print}, "Leave them out"),
    "component-with-transformer": (lambda: tiny_model("dit"), {"component": "transformer"}, "Leave component out"),
    "prompts-as-one-string": (tiny_dit, {"prompts": "3"}, r"pass prompts=\['3'\]"),
}


@pytest.mark.parametrize("case", IDLE)
def test_arguments_without_effect_are_refused_and_the_model_is_left_alone(case: str) -> None:
    make, arguments, complaint = IDLE[case]
    pipe = make()
    model = getattr(pipe, "transformer", pipe)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(UsageError, match=complaint):
        ditq.quantize(pipe, arguments.pop("recipe", "smoothquant-w8a8"), **arguments)
    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_seed_of_a_plan_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ditq.quantize(tiny_dit(), "smoothquant-w8a8", prompts=CLASSES, overrides=QUICK, seed=3).plan
    assert plan.seed == 3
    with pytest.raises(UsageError, match=r"its own seed \(3\); leave out seed=0"):
        ditq.quantize(tiny_dit(), plan, prompts=CLASSES, seed=0)
    seeds = []

    def noted(*args: Any, seed: int, **kwargs: Any) -> Any:
        seeds.append(seed)
        return calibrate(*args, seed=seed, **kwargs)

    monkeypatch.setattr("ditq.api.calibrate", noted)
    settings = Calibration(steps=2, prompts=2, batch_size=2, rows=64)
    again = ditq.quantize(tiny_dit(), plan, prompts=CLASSES, calibration=settings).plan
    assert seeds == [3]
    assert again == plan


def test_failure_while_calibrating_leaves_the_model_as_it_was() -> None:
    model = tiny_model("dit").train()

    def fail(_: Any) -> None:
        assert not model.training
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        ditq.quantize(model, "smoothquant-w8a8", calibrate_with=fail)
    assert model.training
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_one_override_may_be_a_string() -> None:
    plans = [ditq.quantize(tiny_dit(), "rtn-w8a8", overrides=x).plan for x in ("clip=mse", ["clip=mse"])]
    assert plans[0] == plans[1]
    assert {layer.clip for layer in plans[0].quantized} == {"mse"}


# ---------------------------------------------------------------------------------------- save, load


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_load_reads_every_tensor_once(sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_dit()
    ditq.quantize(pipe, "rtn-w8a8")
    out = ditq.save(pipe, tmp_path / "out")
    if sharded:
        shutil.rmtree(out / "transformer")
        pipe.transformer.save_pretrained(out / "transformer", max_shard_size="200KB")
        assert len(list((out / "transformer").glob("*.safetensors"))) > 2
    hashed: list[int] = []
    monkeypatch.setattr("ditq.digests.of_tensor", lambda t: hashed.append(t.numel()) or of_tensor(t))
    ditq.load(out)
    assert len(hashed) == len(pipe.transformer.state_dict())
    diffusers.DiffusionPipeline.from_pretrained(out)  # checks by itself, also after ditq.load
    assert len(hashed) == 2 * len(pipe.transformer.state_dict())


def test_load_checks_both_transformers_before_it_loads_anything(tmp_path: Path) -> None:
    pipe = videos.wan_of_two_experts()
    for component in ("transformer", "transformer_2"):
        ditq.quantize(pipe, "rtn-w8a8", component=component)
    out = ditq.save(pipe, tmp_path / "out")
    assert read_plans(out) == {c: getattr(pipe, c).hf_quantizer.plan for c in ("transformer", "transformer_2")}
    (out / "vae" / "config.json").unlink()  # what diffusers would complain about first
    file = next((out / "transformer_2").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="transformer_2.*does not match its checksum"):
        ditq.load(out)


def test_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        ditq.save(tiny_dit(), out)
    assert (left_over(tmp_path), left_over(out)) == (["out"], ["precious"])


def test_overwrite_replaces_the_folder(tmp_path: Path) -> None:
    ditq.save(tiny_dit(), tmp_path / "out")
    (tmp_path / "out" / "old").write_text("x")
    ditq.save(tiny_dit(), tmp_path / "out", overwrite=True)
    assert "old" not in left_over(tmp_path / "out")
    assert left_over(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_failure_inside_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_dit()
    write = type(pipe.vae).save_pretrained

    def fail(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        raise error

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", fail)
    expected = DitqError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left.*Nothing was left" if expected is DitqError else None):
        ditq.save(pipe, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists() or left_over(tmp_path / "deep") == []


def test_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("x")
        raise RuntimeError
    assert (left_over(tmp_path), left_over(out)) == (["out"], ["precious"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent_is_a_ditq_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(DitqError, match=r"Cannot write .*Permission denied"):
            ditq.save(tiny_dit(), tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def test_denied_permission_is_a_ditq_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    with pytest.raises(DitqError, match=r"Cannot write .*Permission denied"):
        ditq.save(tiny_dit(), tmp_path / "out")
    assert left_over(tmp_path) == []


def test_parent_that_is_a_file_is_a_ditq_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitqError, match="Cannot write"):
        ditq.save(tiny_dit(), tmp_path / "file" / "out")
    assert left_over(tmp_path) == ["file"]


def test_untouched_components_are_copied_from_the_source(tmp_path: Path) -> None:
    source = ditq.save(tiny_pixart(), tmp_path / "source")
    (source / "vae" / "note.txt").write_text("kept")
    pipe = ditq.load(source)
    ditq.quantize(pipe, "rtn-w8a8")
    out = ditq.save(pipe, tmp_path / "out", source=source)
    for component in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for path in (source / component).iterdir():
            assert (out / component / path.name).read_bytes() == path.read_bytes()
    assert read_plan(out) is not None
    assert read_plan(source) is None


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("./nowhere", "no pipeline at"),
        ("bundled:none-such", "none-such"),
        ("just-a-name", "pass a folder, a hub id"),
    ],
)
def test_loading_from_nowhere_is_a_usage_error(path: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ditq.load(path)


def test_loading_a_folder_that_is_no_pipeline_is_a_usage_error(tmp_path: Path) -> None:
    out = ditq.save(tiny_dit(), tmp_path / "out")
    with pytest.raises(UsageError, match=r"no model_index\.json"):
        ditq.load(out / "transformer")


def test_loading_a_16_bit_pipeline(tmp_path: Path, name: str) -> None:
    pipe = PIPELINES[name]()
    out = ditq.save(pipe, tmp_path / "out")
    loaded = ditq.load(out, dtype=torch.bfloat16)
    assert next(loaded.transformer.parameters()).dtype == torch.bfloat16


def test_damaged_16_bit_pipeline_is_a_checkpoint_error(tmp_path: Path) -> None:
    out = ditq.save(tiny_dit(), tmp_path / "out")
    file = next((out / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        ditq.load(out)


# ------------------------------------------------------------------------------------------- compare


def test_compare_returns_paired_values(name: str) -> None:
    reference, other = PIPELINES[name](), PIPELINES[name]()
    ditq.quantize(other, "rtn-w4a8")
    seen: list[tuple[str, int, int]] = []
    comparison = ditq.compare(
        reference, other, CONDITIONS[name], steps=2, guidance_scale=3.0, batch_size=3, seed=2,
        progress=lambda *s: seen.append(s),
    )  # fmt: skip
    assert set(comparison.values) == {"psnr_db", "ssim", "latent_sqnr_db"}
    for metric, values in comparison.values.items():
        assert len(values) == 4
        assert comparison.metrics[metric].mean == pytest.approx(sum(values) / 4)
    for i in range(4):
        z, q = comparison.reference.samples.latents[i], comparison.other.latents[i]
        assert comparison.values["latent_sqnr_db"][i] == pytest.approx(sqnr_db(z, q), abs=1e-6)
    assert [s for s in seen if s[1] == s[2]] == [("reference", 4, 4), ("quantized", 4, 4), ("metrics", 3, 3)]
    data = comparison.as_dict()
    assert (data["pairs"], data["seed"], data["prompts"]) == (4, 2, CONDITIONS[name])
    for metric in comparison.values:
        assert set(data[metric]) == {"mean", "ci95", "n", "higher_is_better"}


def test_compare_of_a_pipeline_with_itself_is_perfect() -> None:
    pipe = tiny_dit()
    comparison = ditq.compare(pipe, pipe, ["1", "2"], steps=2)
    assert comparison.values["psnr_db"] == [100.0, 100.0]
    assert comparison.values["latent_sqnr_db"] == [100.0, 100.0]
    assert comparison.values["ssim"] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_more_bits_are_closer() -> None:
    reference = tiny_pixart()
    samples = ditq.compare(reference, reference, PROMPTS, steps=2, guidance_scale=3.0).reference.samples
    psnr = []
    for recipe in ("rtn-w4a4", "rtn-w6a6", "rtn-w8a8"):
        pipe = tiny_pixart()
        ditq.quantize(pipe, recipe)
        comparison = ditq.compare(samples, pipe, PROMPTS, steps=2, guidance_scale=3.0)
        psnr.append(comparison.metrics["latent_sqnr_db"].mean)
    assert psnr[0] + 3 < psnr[1]
    assert psnr[1] + 3 < psnr[2]


def test_samples_of_other_prompts_are_refused() -> None:
    pipe = tiny_dit()
    a = ditq.compare(pipe, pipe, ["1", "2"], steps=2).reference.samples
    b = ditq.compare(pipe, pipe, ["1", "3"], steps=2).reference.samples
    with pytest.raises(UsageError, match="same prompts and seeds"):
        ditq.compare(a, b)
    with pytest.raises(UsageError, match="needs prompts"):
        ditq.compare(a, pipe)
