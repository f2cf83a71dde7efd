"""Sheets of images: a column for each prompt, a row for each model, with captions and labels."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN = 8
_TEXT = 15


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str] = (), zoom: int = 0
) -> Image.Image:
    """Many images in one.

    Args:
        rows: (label, images) of each row.
        captions: texts above the columns, wrapped.
        zoom: a whole factor by which images are enlarged; 0 makes them at least 96 pixels wide.
    """
    font = ImageFont.load_default(_TEXT)
    small = ImageFont.load_default(_TEXT - 4)
    width, height = rows[0][1][0].size
    zoom = zoom or max(1, -(-96 // width))
    cell_w, cell_h = width * zoom + _MARGIN, height * zoom + _MARGIN
    label_w = max(int(font.getlength(label)) for label, _ in rows) + 3 * _MARGIN
    lines = [_wrap(c, small, cell_w - _MARGIN) for c in captions]
    top = _MARGIN + max((len(x) for x in lines), default=0) * (_TEXT - 1) + (_MARGIN if captions else 0)
    columns = max(len(images) for _, images in rows)
    page = Image.new("RGB", (label_w + columns * cell_w + _MARGIN, top + len(rows) * cell_h), "white")
    draw = ImageDraw.Draw(page)
    for i, wrapped in enumerate(lines):
        for j, line in enumerate(wrapped):
            draw.text((label_w + i * cell_w, _MARGIN + j * (_TEXT - 1)), line, fill="#555555", font=small)
    for r, (label, images) in enumerate(rows):
        y = top + r * cell_h
        draw.text((_MARGIN, y + height * zoom // 2 - _TEXT), label, fill="black", font=font)
        for i, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.LANCZOS)
            page.paste(enlarged, (label_w + i * cell_w, y))
    return page


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
