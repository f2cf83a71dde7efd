"""Prompts files in several encodings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditq.cli.common import read_prompts
from ditq.errors import UsageError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_are_the_same_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("ein grüner Baum\n\n猫\n".encode(encoding))
    assert read_prompts(file) == ["ein grüner Baum", "猫"]


def test_another_encoding_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a tree\nein grüner Baum\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"prompts\.txt is not text in UTF-8: line 2 .* Save it as UTF-8"):
        read_prompts(file)
