"""VBench's part is played by a stand-in package in a process of its own, ImageReward's by a module."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditq.errors import DitqError, UsageError
from ditq.metrics.adapters import vbench
from ditq.metrics.adapters.image_reward import ImageReward
from ditq.metrics.networks import MissingWeights

cv2 = pytest.importorskip("cv2")

# Takes what VBench 0.1.5 takes and writes what it writes. Its values are a video's first red level and, as
# "dynamic degree", whether its frame rate is 8: they depend on the files alone. It goes through the folder backwards.
STAND_IN = """
import json, os, cv2

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output = output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input", mode
        fault = os.environ.get("FAULT", "")
        if fault == "raise":
            raise RuntimeError("no weights of dino_vitb16")
        results = {}
        for dimension in dimension_list:
            rows = []
            for file in sorted(os.listdir(videos_path), reverse=True):
                video = cv2.VideoCapture(os.path.join(videos_path, file))
                value = float(video.read()[1][0, 0, 2]) / 255
                if dimension == "imaging_quality":
                    value *= 100
                if dimension == "dynamic_degree":
                    value = video.get(cv2.CAP_PROP_FPS) == 8
                rows.append({"video_path": os.path.join(videos_path, file), "video_results": value})
            mean = sum(r["video_results"] for r in rows) / len(rows)
            results[dimension] = [mean / 100 if dimension == "imaging_quality" else mean, rows]
        if fault != "silent":
            json.dump(results, open(os.path.join(self.output, name + "_eval_results.json"), "w"))
"""
STAND_IN_TORCH = """
def device(name): return name
class cuda:
    is_available = staticmethod(lambda: False)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose Python finds the stand-ins first."""
    (tmp_path / "vbench").mkdir()
    (tmp_path / "vbench" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "torch.py").write_text(STAND_IN_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("DITQ_VBENCH_PYTHON", sys.executable)


def clips(*reds: int) -> list[list[Image.Image]]:
    return [[Image.new("RGB", (32, 16), (red, i, 200)) for i in range(4)] for red in reds]


@pytest.mark.usefixtures("environment")
def test_every_dimension_comes_back_in_the_order_of_the_videos_from_0_to_1() -> None:
    results = vbench.evaluate(clips(51, 255, 102), fps=8)
    assert list(results) == list(vbench.DIMENSIONS)
    for dimension, result in results.items():
        expected = [1, 1, 1] if dimension == "dynamic_degree" else [0.2, 1, 0.4]
        assert result.values == pytest.approx(expected)
        assert result.mean == pytest.approx(np.mean(expected))


@pytest.mark.usefixtures("environment")
def test_the_frame_rate_reaches_vbench() -> None:
    assert vbench.evaluate(clips(51), 24, ["dynamic_degree"])["dynamic_degree"].values == [0]


@pytest.mark.usefixtures("environment")
def test_a_failed_run_shows_the_end_of_what_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "raise")
    with pytest.raises(DitqError, match=r"(?s)status 1.*no weights of dino_vitb16"):
        vbench.evaluate(clips(51), 8, ["subject_consistency"])


@pytest.mark.usefixtures("environment")
def test_a_run_without_a_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "silent")
    with pytest.raises(DitqError, match=r"wrote no ditq_eval_results.json.*0\.1\.5"):
        vbench.evaluate(clips(51), 8, ["subject_consistency"])


def test_an_environment_without_vbench_is_an_error() -> None:
    with pytest.raises(DitqError, match="No module named 'vbench'"):
        vbench.evaluate(clips(51), 8, ["subject_consistency"], python=sys.executable)


def test_no_environment_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITQ_VBENCH_PYTHON", raising=False)
    with pytest.raises(MissingWeights, match=r"pip install vbench.*DITQ_VBENCH_PYTHON"):
        vbench.evaluate(clips(51), 8)
    with pytest.raises(MissingWeights, match="no-such-python"):
        vbench.evaluate(clips(51), 8, python="no-such-python")


@pytest.mark.usefixtures("environment")
def test_requests_that_vbench_cannot_serve_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'scene'.*imaging_quality.*own prompts"):
        vbench.evaluate(clips(51), 8, ["scene"])
    with pytest.raises(UsageError, match="no videos"):
        vbench.evaluate([], 8)
    for sizes in ([(33, 16)], [(32, 16), (16, 16)]):
        with pytest.raises(UsageError, match="even sides"):
            vbench.evaluate([[Image.new("RGB", size) for size in sizes]], 8)


def test_videos_are_written_without_loss(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    vbench.write_video(tmp_path / "clip.mp4", [Image.fromarray(frame) for frame in frames], 12.5)
    video = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 12.5
    read = []
    while (frame := video.read()[1]) is not None:
        read.append(frame[..., ::-1])
    np.testing.assert_array_equal(read, frames)


ROW = {"video_path": "somewhere/a.mp4", "video_results": 0.5}


@pytest.mark.parametrize(
    "results",
    [
        {},
        [],
        {"motion_smoothness": 0.5},
        {"motion_smoothness": [0.5, []]},
        {"motion_smoothness": [0.5, [{**ROW, "video_path": "b.mp4"}]]},
        {"motion_smoothness": [0.5, [{**ROW, "video_results": "high"}]]},
        {"motion_smoothness": [0.5, [{**ROW, "video_results": float("nan")}]]},
        {"motion_smoothness": [None, [ROW]]},
    ],
    ids=json.dumps,
)
def test_results_of_another_form_are_refused(results: Any) -> None:
    with pytest.raises(DitqError, match=r"motion_smoothness is not what version 0\.1\.5 writes"):
        vbench.parse(results, ["a.mp4"], ["motion_smoothness"])


def test_results_of_vbenchs_form_are_read() -> None:
    parsed = vbench.parse({"motion_smoothness": [0.5, [ROW]]}, ["a.mp4"], ["motion_smoothness"])
    assert parsed == {"motion_smoothness": vbench.Dimension([0.5], 0.5)}


# ------------------------------------------------------------------------------------------- ImageReward

STAND_IN_REWARD = """
class Model:
    def __init__(self, *given): self.given = given
    def score(self, prompt, image): return image.getpixel((0, 0))[0] / 100 - len(prompt)

def load(name, device, med_config):
    if "offline" in open(med_config).read():
        raise OSError("Can't load tokenizer for 'bert-base-uncased'")
    return Model(name, device, med_config)
"""


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in package, and an empty folder that DITQ_WEIGHTS names."""
    (tmp_path / "ImageReward.py").write_text(STAND_IN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DITQ_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delitem(sys.modules, "ImageReward", raising=False)
    return tmp_path


def weights(folder: Path, config: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "ImageReward.pt").touch()
    (folder / "med_config.json").write_text(config)
    return folder


@pytest.mark.parametrize("place", ["weights", "home/.cache/ImageReward"])
def test_image_reward_scores_pictures_and_videos_with_the_files_it_finds(reward: Path, place: str) -> None:
    folder = weights(reward / place)
    network = ImageReward()
    assert network.model.given == (str(folder / "ImageReward.pt"), "cpu", str(folder / "med_config.json"))
    frames = clips(50)[0]
    assert network.score(frames[0], "ab") == pytest.approx(0.5 - 2)
    assert network.score([frames[0], Image.new("RGB", (8, 8), (150, 0, 0))], "ab") == pytest.approx(1 - 2)


def test_missing_weights_of_image_reward_name_files_places_and_the_variable(reward: Path) -> None:
    weights(reward / "weights")
    (reward / "weights" / "med_config.json").unlink()
    with pytest.raises(MissingWeights, match=r"med_config\.json.*weights.*\.cache.ImageReward.*DITQ_WEIGHTS"):
        ImageReward()


def test_the_missing_package_of_image_reward_is_named(reward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(reward / "weights")
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MissingWeights, match="pip install image-reward"):
        ImageReward()


def test_a_missing_vocabulary_of_image_reward_is_missing_weights(reward: Path) -> None:
    weights(reward / "weights", config='{"offline": true}')
    with pytest.raises(MissingWeights, match="bert-base-uncased"):
        ImageReward()
