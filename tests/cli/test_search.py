"""``ditq search``, ``ditq quantize --plan`` and ``ditq inspect`` on a tiny pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import videos
from console import ditq
from helpers import tiny_dit

from ditq.cli.app import run
from ditq.plan import Plan

SPACE = ["--sizes", "16,32,64,128", "--budget", "uniform:32", "--pictures", "2", "--steps", "2", "--trials", "4"]
NUMBERS = ["--population", "3", "--top-k", "2", "--crossover", "1", "--mutation", "1"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_dit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plan(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    arguments = ["search", str(pipeline), "--recipe", "qdit-w4a8", "--out", str(file), "--quiet"]
    assert run([*arguments, *SPACE, *NUMBERS]) == 0
    return file


def test_a_searched_plan_is_carried_out_with_gptq_and_inspect_shows_its_groups(
    pipeline: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Plan.from_dict(json.loads(plan.read_text()))
    out = tmp_path / "quantized"
    quick = ["--set", "calibration.prompts=2", "--set", "calibration.steps=2", "--set", "calibration.rows=64"]
    status, _, err = ditq(capsys, "quantize", pipeline, "--plan", plan, "--out", out, "--quiet", *quick)
    assert status == 0, err
    layers = {layer["name"]: layer for layer in json.loads(ditq(capsys, "inspect", out, "--json")[1])["layers"]}
    groups = {name: layer["group_size"] for name, layer in layers.items() if layer["weight_bits"] == 4}
    assert groups == {
        layer.name: {"weights": layer.weight.group_size, "activations": layer.weight.group_size}
        for layer in expected.quantized
    }
    assert len({size["weights"] for size in groups.values()}) > 1
    assert any(layer["rounding"] == "gptq" for layer in layers.values())
    assert all(layer["group_size"]["weights"] is None for layer in layers.values() if layer["weight_bits"] == 16)
    monkeypatch.setattr("ditq.cli.common.out.width", 200)
    for option in ([], ["--roles"]):
        _, table, _ = ditq(capsys, "inspect", out, *option)
        assert all(f"group {size['weights']}" in table for size in groups.values())


def test_search_json_and_going_on(pipeline: Path, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.with_suffix(".search").is_file()
    before = plan.read_text()
    status, out, _ = ditq(
        capsys, "search", pipeline, "--recipe", "qdit-w4a8", "--out", plan, "--json", *SPACE, *NUMBERS
    )
    data = json.loads(out)
    assert status == 0
    assert (data["trials"], data["evaluated"]) == (4, 0)
    assert data["bit_operations"] <= data["budget"] * (1 + 1e-6)
    assert data["fitness"]["name"] == "prediction error, dB"
    assert plan.read_text() == before


def test_search_shows_the_best_so_far_and_what_comes_next(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    status, out, err = ditq(
        capsys, "search", pipeline, "--recipe", "rtn-w4a4", "--strategy", "uniform", "--out", file, *SPACE
    )
    assert status == 0
    assert "best " in err
    assert f"ditq quantize {pipeline} --plan {file}" in " ".join(out.split()).replace("- ", "-")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--sizes", "100", "--budget", "uniform:32"], 2, "100 divides no layer"),
        (["--sizes", "16,x"], 2, "--sizes must be comma-separated numbers"),
        (["--sizes", "16,32", "--budget", "1000"], 2, "No allocation meets the budget"),
        (["--strategy", "annealing"], 2, "Unknown strategy 'annealing'"),
        (["--fitness", "beauty"], 2, "Unknown fitness 'beauty'"),
        (["--fitness", "kid"], 2, "--real FOLDER"),
        (["--crossover", "40", "--mutation", "40"], 2, "population of 50"),
        (["--seed", "7", *SPACE, *NUMBERS], 2, "seed is 0 there, 7 here"),
    ],
)
def test_wrong_usage(
    arguments: list[str], status: int, words: str, pipeline: Path, plan: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = plan if "--seed" in arguments else tmp_path / "plan.json"
    before = plan.read_text()
    code, _, err = ditq(capsys, "search", pipeline, "--recipe", "qdit-w4a8", "--out", out, "--quiet", *arguments)
    assert code == status
    assert words in err
    assert err.count("\n") == 1
    assert plan.read_text() == before
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_file_that_is_none(
    pipeline: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, out = tmp_path / "plan.json", tmp_path / "out"
    assert "ditq search writes one" in ditq(capsys, "quantize", pipeline, "--plan", broken, "--out", out)[2]
    broken.write_text("no json")
    assert "is not JSON" in ditq(capsys, "quantize", pipeline, "--plan", broken, "--out", out)[2]
    broken.write_text(plan.read_text().replace('"group_size": ', '"group_size": -', 1))
    status, _, err = ditq(capsys, "quantize", pipeline, "--plan", broken, "--out", out)
    assert status == 1
    assert "group_size" in err
    status, _, err = ditq(capsys, "quantize", pipeline, "--plan", plan, "--set", "weights.bits=3", "--out", out)
    assert status == 2
    assert "weights.bits=3" in err
    assert not out.exists()


def test_two_experts_get_a_plan_file_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.common.out.width", 400)
    folder, plan, prompts = tmp_path / "wan", tmp_path / "plan.json", tmp_path / "prompts.txt"
    videos.wan_of_two_experts().save_pretrained(folder)
    prompts.write_text("a red cat\n")
    options = ["--recipe", "rtn-w4a4", "--out", plan, "--prompts", prompts, "--sizes", "16,32,64", "--pictures", 1,
               "--budget", "uniform:32", "--steps", 4, "--trials", 3, "--frames", 5, "--height", 16,
               "--width", 16]  # fmt: skip
    status, out, err = ditq(capsys, "search", folder, *options, *NUMBERS)
    assert status == 0, err
    second = tmp_path / "plan.transformer_2.json"
    assert f"the plan of transformer_2 is in {second}" in out
    status, out, _ = ditq(capsys, "search", folder, *options, *NUMBERS, "--json")
    data = json.loads(out)
    assert (data["out"], data["transformer_2"]["out"]) == (str(plan), str(second))
    assert (data["evaluated"], data["transformer_2"]["evaluated"]) == (0, 0)  # one storage holds both studies
    plans = {
        c: Plan.from_dict(json.loads(p.read_text())) for c, p in (("transformer", plan), ("transformer_2", second))
    }
    assert data["hash"] == plans["transformer"].hash()
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["plan.json", "plan.transformer_2.json"]
    assert ditq(capsys, "quantize", folder, "--plan", plan, "--out", tmp_path / "out", "--quiet")[0] == 0
    for component, expected in plans.items():
        config = json.loads((tmp_path / "out" / component / "config.json").read_text())["quantization_config"]
        groups = {layer["name"]: layer.get("weight", {}).get("group_size") for layer in config["layers"]}
        assert groups == {x.name: x.weight.group_size if x.weight else None for x in expected}
    status, out, _ = ditq(capsys, "inspect", tmp_path / "out")
    assert status == 0
    assert [line for line in out.splitlines() if line in ("transformer:", "transformer_2:")] == [
        "transformer:", "transformer_2:"
    ]  # fmt: skip
    shown = json.loads(ditq(capsys, "inspect", tmp_path / "out", "--json")[1])
    for data, expected in ((shown, plans["transformer"]), (shown["transformer_2"], plans["transformer_2"])):
        assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in expected]
        assert data["transformer_bytes"] > 0


def test_a_plan_that_cannot_be_written_is_refused_before_the_search(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.search.open_pipeline", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("x")
    storage = ["--storage", tmp_path / "storage"]
    status, _, err = ditq(capsys, "search", pipeline, "--out", tmp_path / "file" / "plan.json", *storage)
    assert (status, "Cannot write" in err) == (1, True)


def test_a_plan_that_keeps_every_layer_is_one_error(
    pipeline: Path, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(plan.read_text())
    kept = {"weight", "activation", "smooth", "rotate", "timesteps", "rounding", "clip", "sequential"}
    content["layers"] = [{k: v for k, v in layer.items() if k not in kept} for layer in content["layers"]]
    for recipe in (content["recipe"], "mine"):
        (tmp_path / "plan.json").write_text(json.dumps({**content, "recipe": recipe}))
        status, _, err = ditq(
            capsys, "quantize", pipeline, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"
        )
        assert "The plan keeps every layer in 16 bit" in " ".join(err.split())
        assert status in (1, 2)
