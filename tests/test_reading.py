"""Files from elsewhere are read in bounded time and memory, and refused in one short line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditq.errors import CheckpointError, UsageError
from ditq.reading import DEPTH, JSON_BYTES, YAML_BYTES, cut, parse_json, parse_yaml, read_json, read_yaml, short

LAUGHS = "a0: &a0 [ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

YAMLS = {
    "laughs": (LAUGHS, "alias"),
    "self": ("a: &a [*a]", "alias"),
    "merge": ("a: &a {b: 1}\nc: {<<: *a}", "alias"),
    "alias-key": ("&a b: 1\n*a : 2", "alias"),
    "depth-flow": ("[" * 100_000, "levels deep"),
    "depth-mapping": ("{a: " * 1000, "levels deep"),
    "depth-block": ("".join(" " * i + "a:\n" for i in range(300)), "levels deep"),
    "depth-sequence": ("- " * 1000 + "a", "levels deep"),
    "integer": (f"a: {'9' * 5000}", r"4300 digits|64 bits"),
    "integer-hex": (f"a: 0x{'f' * 5000}", "64 bits"),
    "integer-sexagesimal": (f"a: 1{':59' * 2000}", "64 bits"),
    "integer-30": (f"a: {10**30}", "64 bits"),
    "float-sexagesimal": (f"a: 1{':59' * 2000}.5", "float"),
    "infinity": ("a: .inf", "finite"),
    "large-float": ("a: 1.0e+999", "finite"),
    "nan": ("a: [.nan]", "finite"),
    "object": ("a: !!python/object/apply:os.getcwd []", "tag"),
    "binary": ("a: !!binary aGVsbG8=", "tag"),
    "set": ("!!set {a, b}", "tag"),
    "tag-date": ("a: !!timestamp 2001-99-99", "tag"),
    "tag-own": ("a: !x 1", "tag"),
    "bad-integer": ("a: !!int b", "invalid literal"),
    "twice": ("a: 1\nb: 2\na: 3", "'a' twice"),
    "twice-inside": ("a: {b: 2, b: 3}", "'b' twice"),
    "key-of-list": ("? [a]\n: 1", "unhashable"),
    "long-key": (f"? {'k' * 300}\n: 1", "key of 300"),
    "unclosed": ("a: [", "line 1"),
    "tab": ("a:\n\t- b", "line 2"),
    "control": ("a: \x07", "special characters"),
    "long": ("a: 1\n" * (YAML_BYTES // 4), "at most"),
    "undefined-long": (f"a: *{'x' * 100_000}", "alias"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_is_refused(name: str) -> None:
    text, reason = YAMLS[name]
    with pytest.raises(UsageError, match=reason) as error:
        parse_yaml(text, "file.yaml", UsageError)
    assert str(error.value).startswith("file.yaml")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_yaml_that_is_read() -> None:
    text = "a: 1\nb: [1.5, null, true, 'x', 2001-99-99]\nc: {d: -0x10, e: 18446744073709551615, f: 2001-01-01}\n"
    assert parse_yaml(text, "x", UsageError) == {
        "a": 1,
        "b": [1.5, None, True, "x", "2001-99-99"],
        "c": {"d": -16, "e": 2**64 - 1, "f": "2001-01-01"},
    }
    assert parse_yaml("", "x", UsageError) is None
    nested: Any = 1
    for _ in range(DEPTH - 1):
        nested = [nested]
    assert parse_yaml(str(nested), "x", UsageError) == nested


JSONS = {
    "integer": ("9" * 5000, "4300 digits"),
    "integer-30": (f'{{"a": {10**30}}}', "64 bits"),
    "depth": ("[" * 200_000, "levels deep"),
    "depth-50": ("[" * 50 + "]" * 50, "levels deep"),
    "unclosed": ("{", "line 1 column"),
    "long-key": (f'{{"{"k" * 300}": 1}}', "key of 300"),
    "empty": ("", "line 1 column 1"),
}


@pytest.mark.parametrize("name", JSONS)
def test_json_that_is_refused(name: str) -> None:
    text, reason = JSONS[name]
    with pytest.raises(CheckpointError, match=reason) as error:
        parse_json(text, "config.json", CheckpointError)
    assert str(error.value).startswith("config.json is not JSON that ditq can read")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("read", "limit"), [(read_json, JSON_BYTES), (read_yaml, YAML_BYTES)])
def test_files_that_are_refused(read: Any, limit: int, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b" " * (limit + 1))
    (tmp_path / "latin").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for name, reason in {
        "large": "is larger than",
        "latin": "UTF-8",
        "folder": "cannot be",
        "none": "cannot be",
    }.items():
        with pytest.raises(UsageError, match=reason):
            read(tmp_path / name, UsageError)


def test_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a", UsageError) == read_yaml(tmp_path / "a", UsageError) == {"a": 1}


def test_values_are_shown_short() -> None:
    assert short("abc") == "'abc'"
    assert short({"a": [1]}) == "{'a': [1]}"
    loop: list[Any] = []
    loop += [loop] * 10
    for value in ("x" * 10**6, ["x" * 10**5] * 10**5, 10**6000, {str(i): "y" * 1000 for i in range(1000)}, loop):
        assert len(short(value)) <= 81
    assert cut("a\n  b " + "c" * 1000, 10) == "a b cccccc…"
