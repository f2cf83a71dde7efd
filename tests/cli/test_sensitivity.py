"""``ditq sensitivity`` on a bundled model: tables, files, JSON, and a second run that measures nothing."""

from __future__ import annotations

import json
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import videos
from console import ditq

from ditq.allocation.scores import Scores, mean_and_error

pytest.importorskip("ditq_bundled")

TINY = ["--pictures", 2, "--steps", 2, "--moments", 1]
WEIGHTS = ["--weights", 4, "--activations", "none", "--error", "prediction"]


@dataclass(frozen=True)
class Line:
    """What ``agreement`` returns for each choice."""

    text: str
    is_noise: bool

    def __str__(self) -> str:
        return self.text


@pytest.fixture(autouse=True)
def made_up_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts have no halves to compare; the verb passes on what it gets."""
    module = types.ModuleType("ditq.allocation.uncertainty")
    module.agreement = lambda scores, metric: [  # type: ignore[attr-defined]
        Line(f"{choice}: {metric} agrees", np.bool_(choice == "w4")) for choice in scores.choices
    ]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITQ_CACHE", str(cache))


def test_tables_files_and_a_second_run_that_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.common.out.width", 80)
    command = ["sensitivity", "bundled:emoji-class", *TINY, *WEIGHTS, "--out", tmp_path / "out"]
    status, out, err = ditq(capsys, *command)
    assert status == 0, err
    assert "sensitivity" in err  # the bar
    scores = Scores.load(tmp_path / "out" / "sensitivity-weights.json")
    assert (scores.choices, scores.unit, len(set(scores.prompts))) == (("w4",), "block", 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "sensitivity-weights.json"]
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("transformer_blocks")]
    assert rows == list(scores.genes)
    assert "weights, prediction error: w4: prediction agrees" in out
    assert f"report: {tmp_path / 'out' / 'report.html'}" in out
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Sensitivity of bundled:emoji-class" in page and "w4: prediction agrees" in page
    monkeypatch.setattr("ditq.allocation.sensitivity.outputs_of", lambda *_: pytest.fail("measured again"))
    again = ditq(capsys, *command)
    assert (again[0], again[1]) == (0, out)
    assert (
        json.loads(scores.model_dump_json())["values"]
        == json.loads((tmp_path / "out" / "sensitivity-weights.json").read_text())["values"]
    )


def test_json_has_means_errors_and_agreement_and_nothing_else_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sensitivity", "bundled:emoji-class", *TINY, "--weights", "4", "--activations", "4", "--unit", "role"]
    status, out, err = ditq(capsys, *command, "--out", tmp_path / "out", "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    parts = data["components"]["transformer"]
    assert list(parts) == ["weights", "activations"]
    for part, entry in parts.items():
        scores = Scores.load(data["files"][part])
        mean, error = mean_and_error(scores.harms())
        assert (entry["genes"], entry["choices"]) == (list(scores.genes), list(scores.choices))
        assert np.allclose(entry["metrics"]["prediction"]["harm"], mean)
        assert np.allclose(entry["metrics"]["prediction"]["standard_error"], error)
    assert parts["weights"]["agreement"]["prediction"] == [{"text": "w4: prediction agrees", "is_noise": True}]
    assert parts["activations"]["agreement"]["prediction"] == [{"text": "a4: prediction agrees", "is_noise": False}]
    assert Path(data["files"]["report"]).is_file()


def test_metrics_of_images_and_a_single_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.common.out.width", 80)
    (tmp_path / "prompts").write_text("3\n")
    command = ["sensitivity", "bundled:emoji-class", *TINY, *WEIGHTS, "--unit", "role", "--prompts",
               tmp_path / "prompts", "--metrics", "psnr_db, ssim", "--metrics", "latent_sqnr_db"]  # fmt: skip
    status, out, err = ditq(capsys, *command)
    assert status == 0, err
    for title in ("prediction error, % ↓", "PSNR, dB ↑", "SSIM ↑", "Latent SQNR, dB ↑"):
        assert f"weights: {title}" in out
    assert "one prompt: no standard error" in out
    title = "weights at w4: drop of each metric with one group quantized, %"
    assert out.count(title) == 1
    assert re.search(r"^quality ", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = ditq(capsys, *command, "--json")
    errors = json.loads(out)["components"]["transformer"]["weights"]["metrics"]["ssim"]["standard_error"]
    assert errors and {value for row in errors for value in row} == {None}
    assert json.loads(out)["files"] == {}
    groups = json.loads(out)["components"]["transformer"]["weights"]["decoupling"]
    assert (groups["name"], groups["metrics"]) == ("weights at w4", ["PSNR", "SSIM", "Latent SQNR"])
    assert len(groups["drops"]) == len(groups["groups"]) and {x for row in groups["errors"] for x in row} == {None}
    status, _, err = ditq(capsys, *command, "--quiet", "--out", tmp_path / "out")
    assert status == 0, err
    assert "<h3>Weights at w4</h3>" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_two_experts_get_files_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.common.out.width", 80)
    videos.wan_of_two_experts().save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts").write_text("a red cat\n")
    options = ["--prompts", tmp_path / "prompts", "--steps", 4, "--frames", 5, "--height", 16, "--width", 16,
               "--unit", "role", "--moments", 1]  # fmt: skip
    status, out, err = ditq(capsys, "sensitivity", tmp_path / "wan", *options, *WEIGHTS, "--out", tmp_path / "out")
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.html", "sensitivity-transformer-weights.json", "sensitivity-transformer_2-weights.json"
    ]  # fmt: skip
    assert "transformer_2, weights: prediction error" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "4,x"], "--weights must be comma-separated bits of 2 to 8"),
        (["--weights", "16"], "Bits of weights to measure must be 2 to 8, got 16"),
        (["--weights", "none", "--activations", ""], "Nothing to measure"),
        (["--unit", "model"], "Unknown unit 'model'"),
        (["--metrics", "beauty"], "Unknown metric 'beauty'"),
        (["--metrics", "fid"], "fid has one value for all images"),
        (["--storage", "study"], "storage= is the file of one study"),
        (["--recipe", "none-w4"], "none-w4"),
    ],
)
def test_wrong_usage(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    status, _, err = ditq(capsys, "sensitivity", "bundled:emoji-class", *TINY, "--quiet", "--out", out, *arguments)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditq.cli.sensitivity.open_pipeline", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("x")
    status, _, err = ditq(capsys, "sensitivity", "bundled:emoji-class", "--out", tmp_path / "file")
    assert (status, "--out must be a folder" in err) == (2, True)
    status, _, err = ditq(capsys, "sensitivity", "bundled:emoji-class", "--out", tmp_path / "file" / "out")
    assert (status, "Cannot write" in err) == (1, True)
