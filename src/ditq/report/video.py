"""Video files: GIF and MP4, an animation of all models side by side, and sheets of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ditq.errors import DitqError
from ditq.report.sheet import sheet

Video = Sequence[Image.Image]

FRAMES_PER_SECOND = 8  # for videos whose sampler does not name a rate
CODECS = ("vp09", "mp4v")  # VP9 plays in browsers; some builds of OpenCV cannot write it
SMALL = 256  # pixels of the longer side below which MP4 frames are enlarged
COLUMNS = 6  # prompts in an animation of several models
STILLS, STILL_WIDTH = 8, 160  # largest number of frames of a video on a sheet; their largest width in pixels


class MissingOpenCV(DitqError):  # noqa: N818
    """Writing MP4 needs OpenCV, which is not installed."""


def save_gif(frames: Video, path: Path, fps: float = FRAMES_PER_SECOND) -> None:
    """Writes a GIF that repeats. All frames share one palette of 256 colours, so that still parts do not flicker."""
    palette = _stacked(frames).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    first, *others = [f.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def save_mp4(frames: Video, path: Path, fps: float = FRAMES_PER_SECOND) -> None:
    """Writes an MP4 file with VP9, or with MPEG-4 where VP9 is not available.

    An odd side is padded by one row of pixels, because colours are stored for pairs of pixels. OpenCV spends about one
    bit on a pixel, which is too little for small videos. Videos smaller than :data:`SMALL` pixels are therefore
    enlarged by a whole factor, without smoothing.

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
    previous_level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
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
        cv2.utils.logging.setLogLevel(previous_level)
    raise DitqError(
        f"OpenCV cannot write {path}: the folder is read-only, or OpenCV has none of the codecs {', '.join(CODECS)}."
    )


def check_mp4() -> Any:
    """Imports OpenCV, which writes MP4.

    Raises:
        MissingOpenCV: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingOpenCV(
            f"Writing MP4 needs OpenCV (cv2), which is not installed ({error}). Install the extra: "
            "pip install 'ditq[metrics]'. GIF works without it."
        ) from error
    return cv2


def side_by_side(videos: Mapping[str, Sequence[Video]], captions: Sequence[str] = (), zoom: int = 0) -> Video:
    """Many videos in one: a row for each model, a column for each prompt, all at the same frame."""
    frames = len(next(iter(videos.values()))[0])
    return [
        sheet([(name, [video[t] for video in row]) for name, row in videos.items()], captions, zoom)
        for t in range(frames)
    ]


def save_side_by_side(
    videos: Mapping[str, Sequence[Video]], prompts: Sequence[str], folder: Path, fps: float = FRAMES_PER_SECOND
) -> list[str]:
    """Writes ``side-by-side.gif`` and, if OpenCV is installed, ``side-by-side.mp4`` of the first prompts.

    Returns:
        Notes for the user on files that could not be written.
    """
    frames = side_by_side({name: row[:COLUMNS] for name, row in videos.items()}, prompts[:COLUMNS])
    save_gif(frames, folder / "side-by-side.gif", fps)
    try:
        save_mp4(frames, folder / "side-by-side.mp4", fps)
    except MissingOpenCV as error:
        return [f"There is no side-by-side.mp4. {error}"]
    return []


def overview(samples: Mapping[str, Sequence[Any]], prompts: Sequence[str]) -> Image.Image:
    """One sheet of the first prompts: a row of images for each model, or a row of frames for each video and model."""
    if isinstance(next(iter(samples.values()))[0], Image.Image):
        return sheet([(name, row[:12]) for name, row in samples.items()], prompts[:12])
    return sheet([
        (f"{prompt}: {name}", stills(row[i])) for i, prompt in enumerate(prompts[:4]) for name, row in samples.items()
    ])  # fmt: skip


def stills(video: Video, count: int = STILLS) -> Video:
    """Evenly spaced frames of a video, from the first to the last, at most :data:`STILL_WIDTH` pixels wide."""
    chosen = [video[i] for i in np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)]
    width, height = video[0].size
    if width <= STILL_WIDTH:
        return chosen
    return [frame.resize((STILL_WIDTH, round(height * STILL_WIDTH / width))) for frame in chosen]


def _stacked(frames: Video) -> Image.Image:
    """All frames in one image, to compute a common palette."""
    return Image.fromarray(np.concatenate([np.asarray(frame.convert("RGB")) for frame in frames]))
