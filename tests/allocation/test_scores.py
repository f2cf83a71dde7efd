"""Harms from values of every kind, and the file of scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ditq.allocation.scores import PREDICTION, Scores, mean_and_error
from ditq.errors import CheckpointError, UsageError

KINDS: dict[str, Any] = {
    PREDICTION: {"kind": "error", "higher_is_better": False, "title": "prediction error"},
    "psnr_db": {"kind": "decibel", "higher_is_better": True, "title": "PSNR"},
    "ssim": {"kind": "paired", "higher_is_better": True, "title": "SSIM"},
    "lpips": {"kind": "paired", "higher_is_better": False, "title": "LPIPS"},
    "clip_score": {"kind": "own", "higher_is_better": True, "title": "CLIP score"},
    "warping_error": {"kind": "own", "higher_is_better": False, "title": "warping error"},
    "latent_mse": {"kind": "error", "higher_is_better": False, "title": "latent error"},
}

# Two genes at two widths and two prompts; prompt 0 was called at 900 and 100, prompt 1 at 500 twice and at 100.
DATA: dict[str, Any] = {
    "part": "weights", "unit": "block", "genes": ["b.0", "b.1"], "roles": [["q", "k"], ["q"]],
    "parameters": [10, 20], "choices": ["w8", "w4"], "metrics": KINDS,
    "values": {
        PREDICTION: [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], [[0] * 5, [2, 2, 4, 4, 4]]],
        "psnr_db": [[[10, 20], [30, 0]]] * 2,
        "ssim": [[[0.5, 1], [0.25, 0]]] * 2,
        "lpips": [[[0.5, 1], [0.25, 0]]] * 2,
        "clip_score": [[[20, 30], [10, 40]]] * 2,
        "warping_error": [[[2, 3], [1, 4]]] * 2,
        "latent_mse": [[[0.5, 1], [0.25, 0]]] * 2,
    },
    "reference": {"clip_score": [20, 20], "warping_error": [1, 3]},
    "prompts": [0, 0, 1, 1, 1], "timesteps": [100, 900, 100, 500, 500], "steps": [900, 500, 100],
    "rows": {"b.0.q": 4, "b.0.k": 4, "b.1.q": 8}, "info": {"seed": 3},
}  # fmt: skip


def scores(**changes: Any) -> Scores:
    return Scores.model_validate({**DATA, **changes})


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("psnr_db", [[0.1, 0.01], [0.001, 1]]),
        ("ssim", [[-0.5, -1], [-0.25, 0]]),
        ("lpips", [[0.5, 1], [0.25, 0]]),
        ("latent_mse", [[0.5, 1], [0.25, 0]]),
        ("clip_score", [[0, -0.5], [0.5, -1]]),  # the drop relative to the mean of the reference, 20
        ("warping_error", [[0.5, 0], [0, 0.5]]),  # mean 2
        (PREDICTION, [[1.5, 4], [6.5, 9]]),
    ],
)
def test_harms_of_every_kind(metric: str, expected: list[list[float]]) -> None:
    harms = scores().harms(metric)
    assert harms.shape == (2, 2, 2)
    assert harms[0] == pytest.approx(np.array(expected))


def test_a_worse_image_has_a_larger_harm() -> None:
    worse = {"psnr_db": -1, "ssim": -0.1, "lpips": 0.1, "latent_mse": 0.1, "clip_score": -1, "warping_error": 1}
    assert {PREDICTION, *worse} == set(KINDS)
    for metric, change in worse.items():
        values = (np.array(DATA["values"][metric], float) + change).tolist()
        changed = scores(values={**DATA["values"], metric: values})
        assert (changed.harms(metric) > scores().harms(metric)).all(), metric


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (None, [1.5, 4]),
        ((0, 1000), [1.5, 4]),
        ((1000, 0), [1.5, 4]),
        ((100, 100), [1, 3]),
        ((500, 100), [1, 4]),
        ((400, 900), [2, 4.5]),
        ((900, 901), [2, np.nan]),
        ((200, 300), [np.nan, np.nan]),
    ],
)
def test_prediction_between_timesteps(between: tuple[float, float] | None, expected: list[float]) -> None:
    harms = scores().harms(between=between)
    np.testing.assert_array_equal(harms[0, 0], expected)
    np.testing.assert_array_equal(np.isnan(harms), np.broadcast_to(np.isnan(expected), (2, 2, 2)))


def test_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"Unknown metric of these scores 'fid'.*clip_score.*ssim"):
        scores().harms("fid")
    with pytest.raises(UsageError, match="Only 'prediction' is known by timestep, not 'ssim'"):
        scores().harms("ssim", (0, 10))


def test_mean_and_standard_error_leave_out_nan() -> None:
    harms = np.array([[1.0, 2.0, 6.0, np.nan], [4.0, 4.0, 4.0, 4.0]])
    mean, error = mean_and_error(harms)
    assert mean == pytest.approx([3, 4])
    assert error == pytest.approx([np.std([1, 2, 6], ddof=1) / np.sqrt(3), 0])
    mean, error = mean_and_error(np.array([[2.0]]))
    assert mean == [2]
    assert np.isnan(error).all()  # one prompt has no spread


@pytest.mark.filterwarnings("error")  # numpy's for empty slices and no degrees of freedom
def test_genes_with_one_value_or_none_have_no_error_and_cause_no_warning() -> None:
    nan = np.nan
    mean, error = mean_and_error(np.array([[nan, nan, nan], [nan, 4.0, nan], [1.0, nan, 3.0], [1.0, 2.0, 6.0]]))
    assert np.isnan(mean[0]) and mean[1:] == pytest.approx([4, 2, 3])
    assert np.isnan(error[:2]).all()
    assert error[2:] == pytest.approx([np.std([1, 3], ddof=1) / np.sqrt(2), np.std([1, 2, 6], ddof=1) / np.sqrt(3)])
    mean, error = mean_and_error(np.empty((2, 0)))
    assert np.isnan(mean).all() and np.isnan(error).all()


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = scores().save(tmp_path / "scores.json")
    assert Scores.load(path) == scores()
    assert Scores.load(str(path)).harms() == pytest.approx(scores().harms())
    first = path.read_bytes()
    scores(info={}).save(path)
    assert Scores.load(path).info == {}
    assert scores().save(path).read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"part": "biases"}, "part must be 'weights' or 'activations', got 'biases'"),
        ({"unit": None}, "unit must be"),
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"colour": 1}, "colour is not a field"),
        ({"genes": ["b.0"]}, "genes, roles and parameters, or prompts and timesteps, differ in length"),
        ({"timesteps": [1, 2]}, "differ in length"),
        ({"metrics": {PREDICTION: KINDS[PREDICTION]}}, "is not described"),
        ({"values": {PREDICTION: [[[1] * 5, [1] * 5]]}}, r"'prediction' must be \(2, 2, 5\), got \[\(1, 2, 5\)\]"),
        ({"values": {PREDICTION: [[[1] * 5], [[1] * 5]]}}, r"must be \(2, 2, 5\), got \[\(2, 1, 5\)\]"),
        ({"values": {PREDICTION: [[[1] * 5, [1] * 4]] * 2}}, r"must be \(2, 2, 5\)"),
        ({"values": {"ssim": [[[1] * 3, [1] * 3]] * 2}}, r"'ssim' must be \(2, 2, 2\), got \[\(2, 2, 3\)\]"),
        ({"reference": {"clip_score": [1, 2]}}, "the reference of 'warping_error' must have 2 values"),
        ({"reference": {"clip_score": [1], "warping_error": [1, 2]}}, "reference of 'clip_score' must have 2"),
        ({"metrics": {**KINDS, "ssim": {**KINDS["ssim"], "kind": "better"}}}, "metrics.ssim.kind must be"),
    ],
)
def test_a_file_with_a_wrong_field_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({**DATA, **changes}))
    with pytest.raises(CheckpointError, match=words) as error:
        Scores.load(path)
    assert str(error.value).startswith(f"{path} holds no sensitivity scores: ")


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"part": ', "NaN", "\x00"])
def test_a_file_that_is_no_scores_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"scores\.json"):
        Scores.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        Scores.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Scores.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_are_finite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        scores(values={PREDICTION: [[[value] * 5, [1] * 5]] * 2})
