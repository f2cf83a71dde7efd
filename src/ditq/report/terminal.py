"""The terminal: strings are printed as they are, whatever names hold, in characters that its encoding has."""

from __future__ import annotations

import codecs
import unicodedata
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A line of hyphens under the head and two spaces between columns: the same in every encoding.
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

# What stands for the characters that ditq's own texts use, where an encoding lacks them.
PLAIN = {"→": "->", "±": "+-", "↑": "^", "↓": "v", "−": "-", "×": "x", "…": "...", "’": "'"}
ERRORS = "ditq.plain"


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""``text`` without control characters (they become ``\x1b``), in characters that ``encoding`` has.

    Line ends stay. Marks that change the direction of writing count as control characters; joiners do not, because
    emoji need them.
    """
    clean = "".join(_escaped(c) if c != "\n" and _controls(c) else c for c in text)
    return clean.encode(encoding, ERRORS).decode(encoding)


def _controls(character: str) -> bool:
    kind = unicodedata.category(character)
    # Surrogates stand for bytes of a file name that are not UTF-8.
    return kind in ("Cc", "Cs", "Zl", "Zp") or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """The error handler: a known character in words of ASCII, any other as its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or _escaped(c) for c in missing), error.end


codecs.register_error(ERRORS, _replace)


class Terminal(Console):
    """A console without markup: every string that is printed, in cells and titles too, passes :func:`printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, self.encoding), **(options | {"markup": False, "emoji": False}))


def table(*columns: str, title: str | None = None, **options: Any) -> Table:
    """A table in ditq's one style; its cells are strings, which only a :class:`Terminal` prints as they are."""
    return Table(
        *columns, title=title, title_justify="left", caption_justify="left", caption_style="", box=RULE,
        padding=(0, 1), show_edge=False, pad_edge=False, **options,
    )  # fmt: skip
