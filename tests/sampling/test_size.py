"""Arguments of each pipeline for the number of frames and the size."""

from __future__ import annotations

from typing import Any

import pytest
import videos
from helpers import PROMPTS, tiny_dit, tiny_pixart

from ditq import architectures
from ditq.errors import UsageError
from ditq.sampling import Sampling, draws_videos, sample, size_arguments


def test_video_pipelines_are_recognized() -> None:
    assert not draws_videos(tiny_pixart())
    assert not draws_videos(tiny_dit())
    assert all(draws_videos(make()) for make, _ in videos.PIPELINES.values())


@pytest.mark.parametrize(
    ("make", "frames", "others"),
    [
        (videos.latte, 3, [2, 4]), (videos.stdit, None, [99]), (videos.latte_class, None, [99]),
        (videos.wan, 9, [8, 10]), (videos.ltx, 9, [8, 12]),
        (videos.cogvideox, 9, [8]), (videos.mochi, 7, [6, 8]),
    ],
)  # fmt: skip
def test_impossible_frame_counts_are_refused_before_sampling(make: Any, frames: int | None, others: list[int]) -> None:
    pipe = make()
    for wrong in others:
        with pytest.raises(UsageError, match=f"--frames {wrong}"):
            size_arguments(pipe, frames=wrong)
    if frames is not None:
        assert frames in size_arguments(pipe, frames=frames).values()


def test_nearest_numbers_of_frames_are_named() -> None:
    with pytest.raises(UsageError, match="nearest are 5 and 9"):
        size_arguments(videos.wan(), frames=6)
    with pytest.raises(UsageError, match="trained; got"):
        size_arguments(videos.latte(), frames=16)


def test_allegro_has_no_frame_before_the_others() -> None:
    assert size_arguments(videos.allegro(), frames=8) == {"num_frames": 8}
    with pytest.raises(UsageError, match="nearest are 8 and 12"):
        size_arguments(videos.allegro(), frames=9)


def test_images_have_no_frames_and_some_models_one_size() -> None:
    with pytest.raises(UsageError, match="PixArtAlphaPipeline generates images"):
        size_arguments(tiny_pixart(), frames=8)
    with pytest.raises(UsageError, match="leave out --height"):
        size_arguments(tiny_dit(), height=32)
    assert size_arguments(tiny_pixart(), height=24, width=16) == {"height": 24, "width": 16}


@pytest.mark.parametrize("name", ["wan", "ltx", "mochi", "cogvideox"])
def test_videos_come_out_as_asked(name: str) -> None:
    make, arguments = videos.PIPELINES[name]
    pipe = make()
    frames = arguments.get("num_frames", 9)
    requested = {**arguments, **size_arguments(pipe, frames=frames)}
    samples = sample(
        pipe, architectures.load(name), PROMPTS[:1], Sampling(steps=2, guidance_scale=3.0, arguments=requested)
    )
    assert len(samples.images[0]) == frames
