"""Examples in docstrings run, and every name of the front door has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import ditq

SOURCE = Path(ditq.__file__).parent
MODULES = sorted(
    ".".join(("ditq", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write folders
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "cache"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("name", [n for n in dir(ditq) if not n.startswith("__")])
def test_every_name_of_the_front_door_is_explained(name: str) -> None:
    value = getattr(ditq, name)
    assert inspect.getdoc(value), name
    if inspect.isfunction(value) and value.__module__ != "ditq.engines.registry":
        assert ">>> " in (inspect.getdoc(value) or ""), f"ditq.{name} has no example"


def test_help_of_the_package_is_a_table_of_contents() -> None:
    text = ast.get_docstring(ast.parse((SOURCE / "__init__.py").read_text())) or ""
    for name in ("quantize", "load", "save", "export", "search", "compare"):
        assert f"    {name}(" in text, name
