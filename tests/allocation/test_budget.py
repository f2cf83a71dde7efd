"""Budgets as users write them, in the units of costs."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import layer_plan

from ditq.allocation.budget import kind_of, limits
from ditq.allocation.costs import bit_operations, grouped
from ditq.errors import UsageError

LAYERS = [layer_plan("a", k=32, n=24), layer_plan("b", k=64, n=8)]
ROWS = {"a": 10.0, "b": 5.0}
A, B = 32 * 24, 64 * 8  # weights


@pytest.mark.parametrize(
    ("budget", "kind", "limit"),
    [
        ("5GB", "bytes", 5e9),
        ("1.5GiB", "bytes", 1.5 * 2**30),
        (" 800 mb ", "bytes", 8e8),
        (".5KB", "bytes", 500),
        ("3MiB", "bytes", 3 * 2**20),
        ("2kib", "bytes", 2048),
        ("700B", "bytes", 700),
        ("weights:3.5", "weights", 3.5 * (A + B)),
        ("activations:6", "activations", 6 * (A * 10 + B * 5)),
        (2_000_000, "bit_operations", 2e6),
        (2e6, "bit_operations", 2e6),
        ("2e6", "bit_operations", 2e6),
        (
            "uniform:16",
            "bit_operations",
            bit_operations(grouped(LAYERS[0], 16), 10) + bit_operations(grouped(LAYERS[1], 16), 5),
        ),
    ],
)
def test_forms(budget: Any, kind: str, limit: float) -> None:
    assert kind_of(budget) == kind
    assert limits(budget, LAYERS, ROWS) == {kind: pytest.approx(limit, rel=1e-12)}


def test_several_budgets_keep_their_order() -> None:
    found = limits(["weights:4", "5KB", "activations:8"], LAYERS, ROWS)
    assert list(found) == ["weights", "bytes", "activations"]
    assert found["bytes"] == 5000


@pytest.mark.parametrize(
    "budget",
    [
        "", "much", "weights:", "weights:many", "bits:4", "uniform:4", "uniform:-16", "uniform:x", "uniform:16.0",
        "5TB", "GB", "-5GB", "1.2.3GB",
    ],
)  # fmt: skip
def test_other_forms_are_refused_with_the_known_ones(budget: str) -> None:
    with pytest.raises(UsageError) as error:
        limits(budget, LAYERS, ROWS)
    words = ("5GB", "weights:BITS", "BitOps", "uniform:G", "at least 8", f"got {budget!r}")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), "0GB", "weights:0", "activations:-3", "nan", "weights:nan"])
def test_a_budget_is_positive(budget: Any) -> None:
    with pytest.raises(UsageError, match="must be more than 0, got"):
        limits(budget, LAYERS, ROWS)


@pytest.mark.parametrize("pair", [("5GB", "4MB"), ("weights:3", "weights:4"), ("uniform:16", 1e6)])
def test_two_budgets_of_one_cost_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="Two budgets limit the same cost") as error:
        limits(pair, LAYERS, ROWS)
    assert repr(pair[1]) in str(error.value)


def test_a_uniform_size_divides_every_layer() -> None:
    with pytest.raises(UsageError, match=r"group size 64 in every layer.* the 32 input channels of layer 'a'"):
        limits("uniform:64", LAYERS, ROWS)
