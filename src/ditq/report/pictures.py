"""Images and videos as data URIs that stand in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

Picture = Image.Image | Sequence[Image.Image]

SHOWN = 24  # prompts with embedded images, at most
BUDGET = 12_000_000  # characters of all data URIs: what a phone opens without complaint
LONGEST_SIDE = 768
LOSSLESS_SIDE = 128
WEBP_SIDE = 16383  # the longest side of the format


@dataclass(frozen=True)
class Pair:
    """One prompt: a strip for each model, the reference first, and each one's PSNR to the reference in dB.

    A strip is the frames of a video one below the other; an image is a strip of one frame. ``size`` is that of
    one frame as embedded, in pixels.
    """

    strips: list[str]
    psnr_db: list[float]
    frames: int
    size: tuple[int, int]


def frames_of(picture: Picture) -> list[Image.Image]:
    """The frames of a video; an image has one."""
    return [picture] if isinstance(picture, Image.Image) else list(picture)


def pairs(pictures: Mapping[str, Sequence[Picture]], names: Sequence[str]) -> list[Pair]:
    """The first prompts, as many as :data:`SHOWN` and :data:`BUDGET` allow, at least one."""
    from ditq.metrics import psnr_db

    shown: list[Pair] = []
    size = 0
    columns = [pictures[name] for name in names]
    for row in list(zip(*columns, strict=True))[:SHOWN]:
        strips = [strip(frames_of(picture)) for picture in row]
        size += sum(map(len, strips))
        if shown and size > BUDGET:
            break
        reference = frames_of(row[0])
        psnr = [
            sum(psnr_db(a, b) for a, b in zip(reference, frames_of(picture), strict=True)) / len(reference)
            for picture in row[1:]
        ]
        shown.append(Pair(strips, psnr, len(reference), embedded_size(reference)))
    return shown


def embedded_size(frames: Sequence[Image.Image]) -> tuple[int, int]:
    """Width and height of one frame in the page: as it is, or smaller where a limit asks for it."""
    width, height = frames[0].size
    shrink = min(1.0, LONGEST_SIDE / max(width, height), WEBP_SIDE / (height * len(frames)))
    return max(1, int(width * shrink)), max(1, int(height * shrink))


def strip(frames: Sequence[Image.Image]) -> str:
    """All frames in one WebP data URI, exact up to 128 pixels a side, else quality 90."""
    width, height = embedded_size(frames)
    whole = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        whole.paste(frame.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (0, i * height))
    out = io.BytesIO()
    whole.save(out, "WEBP", lossless=max(width, height) <= LOSSLESS_SIDE, quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
