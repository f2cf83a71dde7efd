"""Real videos from a folder: all frames, at the size of the drawn ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics.real import videos_from_folder
from ditq.report.video import save_gif, save_mp4


def video(level: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((32, 48, 3), level + 20 * t, np.uint8)) for t in range(4)]


def test_gif_and_mp4_are_read_whole_and_resized(tmp_path: Path) -> None:
    save_gif(video(40), tmp_path / "a.gif")
    save_mp4(video(100), tmp_path / "b.mp4")
    (tmp_path / "notes.txt").write_text("no video")
    found = videos_from_folder(tmp_path, (16, 16))
    assert len(found) == 2
    for frames, level in zip(found.videos, (40, 100), strict=True):
        assert [frame.size for frame in frames] == [(16, 16)] * 4
        for t, frame in enumerate(frames):
            assert np.asarray(frame).mean() == pytest.approx(level + 20 * t, abs=6)


def test_folders_without_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of real videos"):
        videos_from_folder(tmp_path / "absent", (16, 16))
    save_gif(video(40), tmp_path / "a.gif")
    with pytest.raises(UsageError, match=r"at least 2 \(.gif, .mp4\), it has 1 video\."):
        videos_from_folder(tmp_path, (16, 16))
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="b.mp4 is not a readable video"):
        videos_from_folder(tmp_path, (16, 16))
