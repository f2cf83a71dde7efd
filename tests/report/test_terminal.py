"""What reaches a terminal: names as they are, no markup, no control characters, only what its encoding has."""

from __future__ import annotations

import io

import pytest

from ditq.report.terminal import Terminal, printable, table


def printed(*things: object, encoding: str = "utf-8", width: int = 60) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Terminal(file=file, width=width).print(*things)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", ["w[red]", "blocks.[/0]", "[link=x]y[/link]", ":smile:", "[/]"])
def test_markup_is_text_in_lines_cells_heads_titles_and_captions(name: str) -> None:
    made = table(name, "b", title=f"title {name}", caption=f"caption {name}")
    made.add_row("1", f"cell {name}")
    assert printed(name).strip() == name
    out = printed(made)
    assert [line.strip() for line in out.splitlines() if "title" in line or "caption" in line] == [
        f"title {name}", f"caption {name}",
    ]  # fmt: skip
    assert f"cell {name}" in out
    assert out.count(name) == 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\x07\r\x7f\x9b", r"a\x07\r\x7f\x9b"),
        ("safe\u202egnp.exe", r"safe\u202egnp.exe"),
        ("bytes \udcff", r"bytes \udcff"),
        ("two\nlines", "two\nlines"),
        ("ä 漢 👩‍🔬", "ä 漢 👩‍🔬"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printed(text).rstrip("\n") == shown


def test_an_encoding_gets_only_its_own_characters() -> None:
    assert printable("1 ± 2 → ä", "ascii") == r"1 +- 2 -> \xe4"
    assert printable("1 ± 2 → ä", "latin-1") == "1 ± 2 -> ä"
    made = table("x ↑")
    made.add_row("1 ± 2")
    assert [line.strip() for line in printed(made, encoding="ascii").splitlines()] == ["x ^", "-" * 6, "1 +- 2"]
