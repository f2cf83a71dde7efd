"""Terminal output: strings are printed literally, without markup, in characters that the terminal can encode."""

from __future__ import annotations

import codecs
import unicodedata
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A line of hyphens under the header and two spaces between columns: the same in every encoding.
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

# ASCII replacements for the characters that ditq's own texts use, for encodings that lack them.
PLAIN = {"→": "->", "±": "+-", "↑": "^", "↓": "v", "−": "-", "×": "x", "…": "...", "’": "'"}
ERRORS = "ditq.plain"


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Escapes control characters (as ``\x1b``) and replaces characters that ``encoding`` lacks.

    Line ends are kept. Marks that change the direction of writing count as control characters. Joiners do not, because
    emoji need them.
    """
    clean = "".join(_escaped(c) if c != "\n" and _is_control(c) else c for c in text)
    return clean.encode(encoding, ERRORS).decode(encoding)


def _is_control(character: str) -> bool:
    category = unicodedata.category(character)
    # Surrogates (Cs) represent bytes of a file name that are not UTF-8.
    return (
        category in ("Cc", "Cs", "Zl", "Zp") or "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler: replaces known characters by ASCII (:data:`PLAIN`) and escapes all others."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or _escaped(c) for c in missing), error.end


codecs.register_error(ERRORS, _replace)


class Terminal(Console):
    """A console without markup: every printed string, also in cells and titles, passes through :func:`printable`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, self.encoding), **(options | {"markup": False, "emoji": False}))


def table(*columns: str, title: str | None = None, **options: Any) -> Table:
    """A table in ditq's style. Print it with a :class:`Terminal`: another console would read markup in its cells."""
    return Table(
        *columns, title=title, title_justify="left", caption_justify="left", caption_style="", box=RULE,
        padding=(0, 1), show_edge=False, pad_edge=False, **options,
    )  # fmt: skip
