"""Videos as files that play anywhere: GIF and MP4; models side by side in one animation; frames on a sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditq.errors import DitqError
from ditq.report.sheet import sheet

Video = Sequence[Image.Image]

FRAMES_PER_SECOND = 8  # of videos whose sampler names no rate
CODECS = ("vp09", "mp4v")  # VP9 plays in browsers; some builds of OpenCV cannot write it
SMALL = 256  # pixels of the longer side
COLUMNS = 6  # prompts in an animation of several models
STILLS, STILL_WIDTH = 8, 160  # frames of a video on a sheet, at most; pixels


class MissingOpenCV(DitqError):  # noqa: N818
    """MP4 is written by OpenCV, which is not installed."""


def save_gif(frames: Video, path: Path, fps: float = FRAMES_PER_SECOND) -> None:
    """An animation that repeats itself; all frames share 256 colours, so that still parts stay still."""
    palette = _stacked(frames).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    first, *rest = [f.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def save_mp4(frames: Video, path: Path, fps: float = FRAMES_PER_SECOND) -> None:
    """An MP4 file, VP9 or else MPEG-4; an odd side gets one more row of pixels, as colour needs pairs.

    OpenCV gives a bit to a pixel, which small videos look poor with: below :data:`SMALL` pixels they are enlarged by a
    whole factor, as they are.

    Raises:
        MissingOpenCV: see :func:`check_mp4`.
        DitqError: this OpenCV has none of the codecs, or the file cannot be written.
    """
    cv2 = check_mp4()
    pixels = np.stack([np.asarray(frame.convert("RGB"))[..., ::-1] for frame in frames])  # [T, H, W, BGR]
    factor = -(-SMALL // max(pixels.shape[1:3]))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    _, height, width, _ = pixels.shape
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        for codec in CODECS:
            writer = cv2.VideoWriter(
                str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), fps, pixels.shape[2:0:-1]
            )
            if writer.isOpened():
                for frame in pixels:
                    writer.write(np.ascontiguousarray(frame))
                writer.release()
                return
    finally:
        cv2.utils.logging.setLogLevel(before)
    raise DitqError(f"OpenCV cannot write {path}: the folder is read-only, or it has no codec of {', '.join(CODECS)}.")


def check_mp4() -> Any:
    """OpenCV.

    Raises:
        MissingOpenCV: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingOpenCV(
            f"Writing MP4 needs OpenCV (cv2), which is not installed ({error}). Install the extra: "
            "pip install 'ditq[metrics]'. GIF needs nothing."
        ) from error
    return cv2


def side_by_side(videos: Mapping[str, Sequence[Video]], captions: Sequence[str] = (), zoom: int = 0) -> Video:
    """One video of many: a row for each model, a column for each prompt, all at the same frame."""
    frames = len(next(iter(videos.values()))[0])
    return [
        sheet([(name, [video[t] for video in row]) for name, row in videos.items()], captions, zoom)
        for t in range(frames)
    ]


def save_side_by_side(
    videos: Mapping[str, Sequence[Video]], prompts: Sequence[str], folder: Path, fps: float = FRAMES_PER_SECOND
) -> list[str]:
    """``side-by-side.gif`` and, where OpenCV is, ``side-by-side.mp4`` of the first prompts. Returns what is amiss."""
    frames = side_by_side({name: row[:COLUMNS] for name, row in videos.items()}, prompts[:COLUMNS])
    save_gif(frames, folder / "side-by-side.gif", fps)
    try:
        save_mp4(frames, folder / "side-by-side.mp4", fps)
    except MissingOpenCV as error:
        return [f"There is no side-by-side.mp4. {error}"]
    return []


def overview(pictures: Mapping[str, Sequence[Any]], prompts: Sequence[str]) -> Image.Image:
    """One sheet: the first images, a row for each model; or frames of the first videos, a row for each and model."""
    if isinstance(next(iter(pictures.values()))[0], Image.Image):
        return sheet([(name, row[:12]) for name, row in pictures.items()], prompts[:12])
    return sheet([
        (f"{prompt}: {name}", stills(row[i])) for i, prompt in enumerate(prompts[:4]) for name, row in pictures.items()
    ])  # fmt: skip


def stills(video: Video, count: int = STILLS) -> Video:
    """Frames spread evenly over a video, the first and the last among them, none wider than :data:`STILL_WIDTH`."""
    chosen = [video[i] for i in np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)]
    width, height = video[0].size
    if width <= STILL_WIDTH:
        return chosen
    return [frame.resize((STILL_WIDTH, round(height * STILL_WIDTH / width))) for frame in chosen]


def _stacked(frames: Video) -> Image.Image:
    """All frames in one image, from which a common palette can be taken."""
    return Image.fromarray(np.concatenate([np.asarray(frame.convert("RGB")) for frame in frames]))
