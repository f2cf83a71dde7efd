"""Why OpenVINO cannot run here, in words; no machine without it, or without integer products, may end in an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from ditq.errors import DitqError

pytest.importorskip("openvino")

from ditq.openvino import probe, runtime


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    runtime._why_no_integers.cache_clear()
    yield
    runtime._why_no_integers.cache_clear()


def test_says_that_openvino_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    assert runtime.why_unavailable() == "OpenVINO is not installed: pip install 'ditq[openvino]'"


def test_says_that_the_cpu_has_no_integer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "execution", lambda *a: "float")
    assert "it needs AVX2-VNNI or AVX512-VNNI" in (runtime.why_unavailable() or "")


def test_says_that_openvino_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("\nno CPU plugin\ndetails")

    monkeypatch.setattr(probe, "execution", fail)
    assert "cannot run here: no CPU plugin" in (runtime.why_unavailable() or "")


def test_says_that_products_are_wrong_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without VNNI, sums of two products of 8-bit numbers are clipped to 16 bits; the probe has such sums.
    def wrong(*args: Any) -> None:
        raise DitqError("OpenVINO computes a linear layer wrongly on this CPU.")

    monkeypatch.setattr(probe, "execution", wrong)
    reason = runtime.why_unavailable() or ""
    assert reason.startswith("OpenVINO computes a linear layer wrongly") and "VNNI" in reason
