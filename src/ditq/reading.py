"""Reads YAML and JSON files that others wrote, in bounded time and memory, and shows parts of them in messages."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ditq.errors import DitqError

# Far above what ditq writes: the config of a transformer with 2,000 quantized layers has 1.5 MiB.
JSON_BYTES = 16 * 2**20
YAML_BYTES = 256 * 2**10  # PyYAML parses less than 1 MB a second
DEPTH = 32
KEY_CHARACTERS = 256
LARGEST_INTEGER = 2**64 - 1  # the largest seed

_SHOWN = 80
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _RefusedError(ValueError):
    """A value that no file of ditq needs."""


def short(value: object, length: int = _SHOWN) -> str:
    """The ``repr`` of any value, cut to about ``length`` characters without computing all of it."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = length
    try:
        text = shortened.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= length else f"{text[:length]}…"


def cut(text: str, length: int = 300) -> str:
    """A text from elsewhere as one line of at most ``length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]}…"


def read_json(path: Path, error: type[DitqError]) -> Any:
    """The content of a JSON file.

    Raises:
        ``error``: the file cannot be read, is too large, is not JSON in UTF-8, is nested too deeply, or has an
            integer of more than 64 bits.
    """
    return parse_json(read_text(path, JSON_BYTES, error), str(path), error)


def parse_json(text: str, source: str, error: type[DitqError]) -> Any:
    """The content of a JSON text, with the limits of :func:`read_json`; ``source`` names it in messages."""
    _check_length(text, JSON_BYTES, source, error)
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as problem:
        raise error(f"{source} is not JSON that ditq can read ({_reason(problem)}): damaged.") from problem


def read_yaml(path: Path, error: type[DitqError]) -> Any:
    """The content of a YAML file: mappings, lists, texts, numbers, true, false and null only.

    Raises:
        ``error``: the file cannot be read, is too large, is not YAML in UTF-8, has an alias, a tag, a repeated key,
            NaN or infinity, an integer of more than 64 bits, or is nested too deeply.
    """
    return parse_yaml(read_text(path, YAML_BYTES, error), str(path), error)


def parse_yaml(text: str, source: str, error: type[DitqError]) -> Any:
    """The content of a YAML text, with the limits of :func:`read_yaml`; ``source`` names it in messages."""
    _check_length(text, YAML_BYTES, source, error)
    try:
        return _checked(yaml.load(text, Loader=_Loader), finite=True)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as problem:
        raise error(f"{source} is not valid: not YAML that ditq can read ({_reason(problem)}).") from problem


def read_text(path: Path, limit: int, error: type[DitqError]) -> str:
    """The content of a file of at most ``limit`` bytes, in UTF-8; a byte-order mark is removed.

    Raises:
        ``error``: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    if len(content) > limit:
        raise error(f"{path} is larger than {limit >> 10} KiB, more than any file of its kind that ditq writes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not text in UTF-8: byte {problem.start} is wrong. Save it as UTF-8.") from problem


def _check_length(text: str, limit: int, source: str, error: type[DitqError]) -> None:
    if len(text) > limit:
        raise error(f"{source} has {len(text)} characters; ditq reads at most {limit}.")


def _reason(problem: Exception) -> str:
    if isinstance(problem, RecursionError):
        return f"it is nested more than {DEPTH} levels deep"
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem and problem.problem_mark:
        return f"line {problem.problem_mark.line + 1}: {cut(problem.problem)}"
    return cut(str(problem))


def _checked(content: Any, finite: bool = False) -> Any:
    """Returns ``content`` if it is within the limits."""
    for depth, value in _walk(content):
        if depth > DEPTH:
            raise _RefusedError(f"it is nested more than {DEPTH} levels deep")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise _RefusedError("it has an integer of more than 64 bits")
        if finite and isinstance(value, float) and not math.isfinite(value):
            raise _RefusedError(f"it has the number {value}; ditq takes finite numbers only")
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, str) and len(key) > KEY_CHARACTERS:
                    raise _RefusedError(f"it has a key of {len(key)} characters; ditq takes at most {KEY_CHARACTERS}")
    return content


def _walk(content: Any) -> Iterator[tuple[int, Any]]:
    """Every value with its depth, without recursion."""
    level, depth = [content], 0
    while level:
        yield from ((depth, value) for value in level)
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [item for value in containers for item in (value.values() if isinstance(value, dict) else value)]
        depth += 1


class _Loader(yaml.SafeLoader):
    """A safe loader without aliases, which expand to any size, and without dates and other rare types."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _RefusedError("it has an alias (*name); write the value out")
        self._depth += 1
        if self._depth > DEPTH:
            raise _RefusedError(f"it is nested more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node.tag not in _PLAIN_TAGS:
            raise _RefusedError(f"line {node.start_mark.line + 1}: the tag {short(node.tag)} is not allowed")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            seen: set[str] = set()
            twice = next((key for key in keys if key in seen or seen.add(key)), "")  # type: ignore[func-returns-value]
            raise _RefusedError(f"line {node.start_mark.line + 1}: a mapping has the key {short(twice)} twice")
        return mapping
