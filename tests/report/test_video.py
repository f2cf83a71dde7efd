"""Videos as files: what is read back is what was drawn, side by side means the same frame everywhere."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditq.errors import DitqError
from ditq.report.video import (
    MissingOpenCV,
    overview,
    save_gif,
    save_mp4,
    save_side_by_side,
    side_by_side,
    stills,
)


def video(red: int = 200, frames: int = 5, size: tuple[int, int] = (32, 20)) -> list[Image.Image]:
    """A square that moves three pixels a frame over a still ground."""
    out = []
    for t in range(frames):
        pixels = np.full((size[1], size[0], 3), 230, np.uint8)
        pixels[6:12, 3 * t + 2 : 3 * t + 8] = (red, 40, 40)
        out.append(Image.fromarray(pixels))
    return out


def test_gif_gives_every_frame_back(tmp_path: Path) -> None:
    save_gif(video(), tmp_path / "a.gif", fps=4)
    with Image.open(tmp_path / "a.gif") as read:
        assert (read.n_frames, read.info["duration"], read.info["loop"]) == (5, 250, 0)
        for t, frame in enumerate(video()):
            read.seek(t)
            assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(frame))


@pytest.mark.parametrize("size", [(32, 20), (33, 21)], ids=["even", "odd"])
def test_mp4_gives_every_frame_back_closely(size: tuple[int, int], tmp_path: Path) -> None:
    import cv2

    frames = video(size=size)
    save_mp4(frames, tmp_path / "a.mp4", fps=4)
    read = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert read.get(cv2.CAP_PROP_FPS) == pytest.approx(4)
    for frame in frames:
        more, pixels = read.read()
        assert more
        factor = pixels.shape[1] // size[0]
        assert pixels.shape[1] >= 256
        small = pixels[: size[1] * factor : factor, : size[0] * factor : factor, ::-1]
        error = small.astype(int) - np.asarray(frame).astype(int)
        assert np.abs(error).mean() < 3  # another frame, or swapped colours, is off by more than 5
    assert not read.read()[0]


def test_mp4_without_opencv_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cv2":
            raise ImportError("No module named 'cv2'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingOpenCV, match=r"ditq\[metrics\]"):
        save_mp4(video(), tmp_path / "a.mp4")
    notes = save_side_by_side({"16 bit": [video()]}, ["a square"], tmp_path)
    assert len(notes) == 1
    assert "ditq[metrics]" in notes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"side-by-side.gif"}


def test_mp4_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DitqError, match="cannot write"):
        save_mp4(video(), tmp_path / "absent" / "a.mp4")


def test_side_by_side_shows_the_same_moment_of_all() -> None:
    models = {"16 bit": [video(200), video(120)], "quantized": [video(90), video(60)]}
    frames = side_by_side(models, ["one", "two"], zoom=1)
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        pixels = np.asarray(frame)
        for red in (200, 120, 90, 60):
            columns = np.flatnonzero((pixels == (red, 40, 40)).all(-1).any(0))
            assert len(columns) == 6, "the whole square, once"
            assert (columns[0] - np.flatnonzero((np.asarray(frames[0]) == (red, 40, 40)).all(-1).any(0))[0]) == 3 * t


def test_stills_hold_first_and_last_frame_and_stay_small() -> None:
    frames = video(frames=20, size=(64, 40))
    assert stills(frames, 8)[0].tobytes() == frames[0].tobytes()
    assert stills(frames, 8)[-1].tobytes() == frames[-1].tobytes()
    assert len(stills(frames, 8)) == 8
    assert len(stills(frames[:3], 8)) == 3
    assert {x.size for x in stills(video(size=(640, 400)))} == {(160, 100)}


def test_overview_of_videos_has_a_row_for_each_video_and_model() -> None:
    models = {"16 bit": [video(200), video(120)], "quantized": [video(90), video(60)]}
    pixels = np.asarray(overview(models, ["one", "two"]))
    for red in (200, 120, 90, 60):
        assert (np.abs(pixels.astype(int) - (red, 40, 40)).max(-1) < 12).any()
    pictures = {name: [row[0][0]] for name, row in models.items()}
    assert overview(pictures, ["one"]).width < overview(models, ["one", "two"]).width
