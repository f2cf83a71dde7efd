"""Images and videos as data URIs, embedded in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

Picture = Image.Image | Sequence[Image.Image]

SHOWN = 24  # the largest number of prompts with embedded images
BUDGET = 12_000_000  # characters of all data URIs: a page of this size still opens on a phone
LONGEST_SIDE = 768
LOSSLESS_SIDE = 128
WEBP_SIDE = 16383  # the longest side of the format


@dataclass(frozen=True)
class Pair:
    """The images of one prompt: a strip for each model, the reference first.

    A strip stacks the frames of a video from top to bottom. An image is a strip of one frame.

    Attributes:
        strips: data URIs.
        psnr_db: PSNR of each quantized model to the reference, in dB.
        frames: frames in a strip.
        size: width and height of one embedded frame, in pixels.
    """

    strips: list[str]
    psnr_db: list[float]
    frames: int
    size: tuple[int, int]


def frames_of(sample: Picture) -> list[Image.Image]:
    """The frames of a video, or an image as a list of one frame."""
    return [sample] if isinstance(sample, Image.Image) else list(sample)


def pairs(samples: Mapping[str, Sequence[Picture]], names: Sequence[str]) -> list[Pair]:
    """The first prompts: at least one, at most :data:`SHOWN`, and only as many as fit into :data:`BUDGET`.

    Args:
        samples: images or videos of each model, one for each prompt.
        names: the models in the order of the page; the reference is first.
    """
    from ditq.metrics import psnr_db

    shown: list[Pair] = []
    characters = 0
    columns = [samples[name] for name in names]
    for row in list(zip(*columns, strict=True))[:SHOWN]:
        strips = [strip(frames_of(sample)) for sample in row]
        characters += sum(map(len, strips))
        if shown and characters > BUDGET:
            break
        reference = frames_of(row[0])
        psnr = [
            sum(psnr_db(a, b) for a, b in zip(reference, frames_of(sample), strict=True)) / len(reference)
            for sample in row[1:]
        ]
        shown.append(Pair(strips, psnr, len(reference), embedded_size(reference)))
    return shown


def embedded_size(frames: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height of one frame in the page: its own size, or smaller where a limit requires it."""
    width, height = frames[0].size
    shrink = min(1.0, LONGEST_SIDE / max(width, height), WEBP_SIDE / (height * len(frames)))
    return max(1, int(width * shrink)), max(1, int(height * shrink))


def strip(frames: Sequence[Image.Image]) -> str:
    """All frames in one WebP data URI: lossless up to 128 pixels a side, quality 90 above."""
    width, height = embedded_size(frames)
    stacked = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        stacked.paste(frame.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (0, i * height))
    out = io.BytesIO()
    stacked.save(out, "WEBP", lossless=max(width, height) <= LOSSLESS_SIDE, quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
