"""Translates the size of an image or a video into the arguments of each pipeline's call."""

from __future__ import annotations

import inspect
from typing import Any

from ditq.errors import UsageError

# Attributes in which diffusers pipelines store the number of video frames per latent frame.
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def draws_videos(pipe: Any) -> bool:
    """Whether a pipeline generates videos: its call takes a number of frames, or it is one of ditq's own."""
    from ditq.models.pipeline import VideoPipeline

    return _frames_argument(pipe) is not None or isinstance(pipe, VideoPipeline)


def size_arguments(
    pipe: Any, *, frames: int | None = None, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline's call. A size of None keeps the pipeline's default.

    Args:
        pipe: a diffusers pipeline.
        frames: of a video.
        height: in pixels.
        width: in pixels.

    Raises:
        UsageError: ``frames`` with an image pipeline, a number of frames that the pipeline cannot generate, or a
            height or width with a pipeline of one fixed size.
    """
    kind, name = type(pipe).__name__, _frames_argument(pipe)
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if frames is not None:
        if not draws_videos(pipe):
            raise UsageError(f"{kind} generates images; --frames is for video pipelines. Leave it out.")
        _check_frames(pipe, frames)
        arguments |= {name: frames} if name else {}
    for side, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            if side not in accepted:
                raise UsageError(f"{kind} generates one size only, that of its transformer; leave out --{side}.")
            arguments[side] = pixels
    return arguments


def _frames_argument(pipe: Any) -> str | None:
    accepted = inspect.signature(pipe.__call__).parameters
    return next((name for name in ("video_length", "num_frames") if name in accepted), None)


def _trained_frames(pipe: Any) -> int | None:
    """The number of frames of a transformer with an embedding per frame (Latte, STDiT); None for the others."""
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
                f"This {kind} generates videos of {trained} frames, as it was trained; got --frames {frames}."
            )
        return
    factor = next((getattr(pipe, n) for n in _TEMPORAL if hasattr(pipe, n)), 1)
    extra = 0 if kind.startswith("Allegro") else 1  # the other VAEs encode the first frame by itself
    if (frames - extra) % factor:
        lower = (frames - extra) // factor * factor + extra
        nearest = [str(n) for n in (lower, lower + factor) if n > 0]
        raise UsageError(
            f"{kind} needs --frames {factor}n{f' + {extra}' if extra else ''}, as each latent frame holds {factor} "
            f"frames; got --frames {frames}. The nearest are {' and '.join(nearest)}."
        )
