"""How large an image or a video shall be, in the words of each pipeline's call."""

from __future__ import annotations

import inspect
from typing import Any

from ditq.errors import UsageError

# What pipelines of diffusers call the frames that one frame of latents stands for.
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def draws_videos(pipe: Any) -> bool:
    """Whether a pipeline draws videos: its call takes a number of frames, or it is one of ditq's own."""
    from ditq.models.pipeline import VideoPipeline

    return _frames_argument(pipe) is not None or isinstance(pipe, VideoPipeline)


def size_arguments(
    pipe: Any, *, frames: int | None = None, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline's call; what is None is left to the pipeline.

    Raises:
        UsageError: a pipeline of images has no frames; it cannot draw so many, or its size is fixed.
    """
    kind, name = type(pipe).__name__, _frames_argument(pipe)
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if frames is not None:
        if not draws_videos(pipe):
            raise UsageError(f"{kind} draws images, which have no frames; --frames is for pipelines of videos.")
        _check_frames(pipe, frames)
        arguments |= {name: frames} if name else {}
    for side, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            if side not in accepted:
                raise UsageError(f"{kind} draws one size, that of its transformer; leave out --{side}.")
            arguments[side] = pixels
    return arguments


def _frames_argument(pipe: Any) -> str | None:
    accepted = inspect.signature(pipe.__call__).parameters
    return next((name for name in ("video_length", "num_frames") if name in accepted), None)


def _trained_frames(pipe: Any) -> int | None:
    """How many frames a transformer with an embedding for each of them has: those of Latte and STDiT."""
    config = pipe.transformer.config
    if _frames_argument(pipe) is None:
        return int(config.num_frames)
    size = getattr(config, "input_size", None)
    return getattr(config, "video_length", None) or (size[0] if size else None)


def _check_frames(pipe: Any, frames: int) -> None:
    kind, trained = type(pipe).__name__, _trained_frames(pipe)
    if trained is not None:
        if frames != trained:
            raise UsageError(
                f"This {kind} draws videos of {trained} frames, as it was trained; got --frames {frames}."
            )
        return
    factor = next((getattr(pipe, n) for n in _TEMPORAL if hasattr(pipe, n)), 1)
    extra = 0 if kind.startswith("Allegro") else 1  # elsewhere the first frame stands for itself
    if (frames - extra) % factor:
        less = (frames - extra) // factor * factor + extra
        near = [str(n) for n in (less, less + factor) if n > 0]
        raise UsageError(
            f"{kind} draws {factor} frames for each frame of latents{', and one before them' if extra else ''}: "
            f"--frames {frames} is none of its numbers; the nearest are {' and '.join(near)}."
        )
