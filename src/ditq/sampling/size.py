"""How large a picture or a video shall be, in the words of each pipeline's call."""

from __future__ import annotations

import inspect
from typing import Any

from ditq.errors import UsageError

# What pipelines of diffusers call the frames that one frame of latents stands for.
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def draws_videos(pipe: Any) -> bool:
    """Whether a pipeline draws videos: its call takes a number of frames."""
    return _frames_argument(pipe) is not None


def size_arguments(
    pipe: Any, *, frames: int | None = None, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline's call; what is None is left to the pipeline.

    Raises:
        UsageError: a pipeline of pictures has no frames; it cannot draw so many, or its size is fixed.
    """
    kind, name = type(pipe).__name__, _frames_argument(pipe)
    accepted = inspect.signature(pipe.__call__).parameters
    found: dict[str, Any] = {}
    if frames is not None:
        if name is None:
            raise UsageError(f"{kind} draws pictures, which have no frames; --frames is for pipelines of videos.")
        found[name] = _checked(pipe, frames)
    for side, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            if side not in accepted:
                raise UsageError(f"{kind} draws pictures of one size, that of its transformer; leave out --{side}.")
            found[side] = pixels
    return found


def _frames_argument(pipe: Any) -> str | None:
    accepted = inspect.signature(pipe.__call__).parameters
    return next((name for name in ("video_length", "num_frames") if name in accepted), None)


def _checked(pipe: Any, frames: int) -> int:
    kind, config = type(pipe).__name__, pipe.transformer.config
    trained = getattr(config, "video_length", None) or (getattr(config, "input_size", None) or [None])[0]
    if trained is not None:  # Latte and STDiT have an embedding for each frame
        if frames != trained:
            raise UsageError(
                f"This {kind} draws videos of {trained} frames, as it was trained; got --frames {frames}."
            )
        return frames
    factor = next((getattr(pipe, n) for n in _TEMPORAL if hasattr(pipe, n)), 1)
    extra = 0 if kind.startswith("Allegro") else 1  # elsewhere the first frame stands for itself
    if frames < 1 or (frames - extra) % factor:
        less = max(frames - extra, 0) // factor * factor + extra
        near = [str(n) for n in (less, less + factor) if n > 0]
        raise UsageError(
            f"{kind} draws {factor} frames for each frame of latents{', and one before them' if extra else ''}: "
            f"--frames {frames} is none of its numbers; the nearest are {' and '.join(near)}."
        )
    return frames
