"""Where caches go."""

from pathlib import Path

import pytest

from ditq.folders import cache_root


def test_own_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.setenv("DITQ_CACHE", "~/own")
    assert cache_root() == Path.home() / "own"


@pytest.mark.skipif("sys.platform != 'linux'")
@pytest.mark.parametrize("value", [None, ""], ids=["absent", "empty"])
def test_linux_keeps_its_folder(value: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DITQ_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_root() == tmp_path / ".cache" / "ditq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "ditq"
