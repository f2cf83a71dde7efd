"""``ditq search``, ``ditq quantize --plan`` and ``ditq inspect`` on tiny pipelines and a bundled one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import videos
from console import ditq
from helpers import tiny_dit

from ditq.allocation import Evolution
from ditq.cli.app import run
from ditq.errors import UsageError
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
        (["--weight-bits", "8,x"], 2, "--weight-bits must be comma-separated bits"),
        (["--weight-bits", "8,4"], 2, "Bits of weights need a budget of their own"),
        (["--activation-bits", "9", "--budget", "activations:6"], 2, "Bits of activations must be 2 to 8, or 16"),
        (["--budget", "weights:4", "--sizes", "32", "--weight-bits", "4"], 2, "or sizes, not both"),
        (["--budget", "weights:4", "--trials", "499"], 2, "--trials has no effect with --strategy error"),
        (["--budget", "weights:4", "--storage", "file"], 2, "--storage has no effect with --strategy error"),
        (
            ["--budget", "5GB", "--strategy", "greedy", "--population", "51"], 2,
            "--population has no effect with --strategy greedy",
        ),
        (["--budget", "5GB", "--top-k", "9"], 2, "--top-k has no effect"),
        (["--budget", "5GB", "--mutation-probability", "0.2"], 2, "--mutation-probability has no effect"),
        (["--segments", "2"], 2, "segments has no effect with strategy 'evolution'"),
        (["--budget", "weights:4", "--segments", "2"], 2, "have their own activations"),
        (["--unit", "role"], 2, "unit has no effect in a search of group sizes"),
        (["--budget", "weights:4", "--metric", "content"], 2, "--metric must be GROUP=NAME"),
        (["--metric", "content=ssim", "--metric", "content=lpips"], 2, "two metrics for the group 'content'"),
        (["--budget", "weights:4", "--metric", "content=ssim"], 2, "metrics have no effect with strategy 'error'"),
        (
            ["--budget", "weights:4", "--strategy", "decoupled", "--metric", "content=beauty"], 2,
            "Unknown metric 'beauty'",
        ),
        (["--strategy", "error"], 2, "Strategy 'error' chooses bits"),
    ],
)  # fmt: skip
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


BITS = ["--pictures", "2", "--steps", "2", "--moments", "2", "--unit", "role"]


def test_bits_are_shown_by_role_and_carried_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ditq_bundled")
    monkeypatch.setattr("ditq.cli.common.out.width", 80)
    file = tmp_path / "plan.json"
    command = [
        "search", "bundled:emoji-class", "--recipe", "rtn-w4a8", "--weight-bits", "8,4,3", "--activation-bits", "8,4",
        "--segments", "2", "--budget", "16MB", "--budget", "activations:6", "--out", file, *BITS,
    ]  # fmt: skip
    status, out, err = ditq(capsys, *command)
    assert status == 0, err
    plan = Plan.from_dict(json.loads(file.read_text()))
    assert plan.memory()[0] <= 16e6
    assert plan.follows_timesteps
    assert not file.with_suffix(".search").exists()  # the study of the sensitivity is in the cache
    tables, _, lines = out.rpartition("\n\n")
    assert "weights: bits by role" in tables and "activations: bits by role" in tables
    assert max(map(len, tables.splitlines())) <= 80
    assert lines.startswith(f"{plan.memory()[0] / 1e6:.2f} MB, ")
    assert "too few to compare halves of the prompts" in lines
    assert f"weights: {plan.memory()[0] / 1e6:.2f} of 16.00 MB" in lines
    assert f"saved to {file}; next: ditq quantize bundled:emoji-class --plan {file}" in lines
    monkeypatch.setattr("ditq.allocation.sensitivity.outputs_of", lambda *_: pytest.fail("measured again"))
    status, out, err = ditq(capsys, *command, "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert (data["hash"], data["budget"]) == (plan.hash(), ["16MB", "activations:6"])
    assert data["transformer_bytes"] == plan.memory()[0]
    assert not {"trials", "group_sizes"} & set(data)
    weights = {row["name"]: int(next(iter(row["bits"]))) for row in data["choices"]["weights"]["rows"]}
    for layer in plan.quantized:
        assert data["bits"][layer.name]["weight_bits"] == weights[layer.role]
    assert {row["timesteps"] for row in data["choices"]["activations"]["rows"]} == {"t > 749", "t < 749"}
    assert data["notes"] == [line for line in lines.splitlines() if line.startswith(("weights: ", "activations: "))]
    assert (
        ditq(capsys, "quantize", "bundled:emoji-class", "--plan", file, "--out", tmp_path / "out", "--quiet")[0] == 0
    )
    layers = {x["name"]: x for x in json.loads(ditq(capsys, "inspect", tmp_path / "out", "--json")[1])["layers"]}
    assert {name: layers[name]["weight_bits"] for name in data["bits"]} == {
        name: bits["weight_bits"] for name, bits in data["bits"].items()
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"strategy": Evolution(), "budget": None, "steps": 10, "moments": 1, "pictures": 128, "trials": 500}),
        (
            ["--budget", "weights:4", "--budget", "activations:6"],
            {"strategy": None, "budget": ["weights:4", "activations:6"], "steps": 20, "moments": 4, "pictures": 32},
        ),
        (
            ["--budget", "weights:4", "--strategy", "decoupled", "--metric", "content=ssim", "--unit", "role"],
            {"strategy": "decoupled", "metrics": {"content": "ssim"}, "unit": "role", "steps": 20, "moments": 4},
        ),
        (
            ["--weight-bits", "8,4", "--budget", "weights:5", "--strategy", "evolution", "--population", "60"],
            {"strategy": Evolution(60), "weights": [8, 4], "steps": 20, "moments": 1, "pictures": 128, "trials": 500},
        ),
        (
            ["--budget", "5GB", "--steps", "3", "--moments", "2", "--pictures", "5", "--activation-bits", "8,6",
             "--segments", "2", "--budget", "activations:7", "--weight-bits", "8"],
            {"weights": [8], "activations": [8, 6], "segments": 2, "steps": 3, "moments": 2, "pictures": 5},
        ),
    ],
)  # fmt: skip
def test_defaults_depend_on_what_is_searched(
    arguments: list[str], expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("ditq_bundled")
    seen: dict[str, Any] = {}

    def search(pipe: Any, recipe: str, prompts: list[str], **options: Any) -> None:
        seen.update(options, pictures=len(prompts))
        raise UsageError("seen")

    monkeypatch.setattr("ditq.api.search", search)
    status, _, err = ditq(capsys, "search", "bundled:emoji-class", "--out", tmp_path / "plan.json", *arguments)
    assert (status, "seen" in err) == (2, True)
    assert {name: seen[name] for name in expected} == expected
    by_scores = not isinstance(expected.get("strategy"), Evolution)
    assert ("trials" in seen, "storage" in seen, "on_trial" in seen) == (not by_scores,) * 3


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
