"""Budgets as users write them: ``5GB``, ``weights:3.5``, ``activations:6``, ``uniform:128``, or BitOps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ditq.allocation.costs import Cost, averaged, bit_operations, grouped
from ditq.errors import UsageError
from ditq.plan import MIN_GROUP_SIZE, LayerPlan

Budget = float | str

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

FORMS = (
    "a size of the transformer's file (5GB, 800MB, 1.5GiB), weights:BITS or activations:BITS (averages, e.g. "
    f"weights:3.5), a number of BitOps per image, or uniform:G for group size G (at least {MIN_GROUP_SIZE}) everywhere"
)

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]?i?B)\s*", re.IGNORECASE)


def kind_of(budget: Budget) -> Cost:
    """Which cost a budget limits.

    Raises:
        UsageError: it has none of the known forms.
    """
    if not isinstance(budget, str):
        return "bit_operations"
    kind, colon, text = budget.partition(":")
    if colon and kind in ("weights", "activations") and _number(text) is not None:
        return "weights" if kind == "weights" else "activations"
    if colon and kind == "uniform" and text.isdigit() and int(text) >= MIN_GROUP_SIZE:
        return "bit_operations"
    if _SIZE.fullmatch(budget):
        return "bytes"
    if _number(budget) is not None:
        return "bit_operations"
    raise UsageError(f"A budget must be {FORMS}; got {budget!r}.")


def limits(
    budgets: Budget | Sequence[Budget], layers: Sequence[LayerPlan], rows: Mapping[str, float]
) -> dict[Cost, float]:
    """The limits of a space's costs, in the units of :func:`ditq.allocation.costs.costs_of`, by cost.

    Args:
        budgets: one or several; at most one of a kind.
        layers: the searched layers.
        rows: tokens that each layer reads per image, by name.

    Raises:
        UsageError: a budget has none of the known forms, two limit the same cost, or it is not positive.
    """
    return _by_cost(budgets, averaged(layers, rows), lambda budget: _value(budget, layers, rows))


def shared_limits(budgets: Budget | Sequence[Budget], units: Mapping[Cost, float]) -> dict[Cost, float]:
    """The limits of several spaces together.

    Args:
        budgets: as for :func:`limits`, without ``uniform:G``.
        units: what one unit of every cost is for all searched layers together.

    Raises:
        UsageError: see :func:`limits`.
    """
    for budget in _listed(budgets):
        if isinstance(budget, str) and budget.startswith("uniform:"):
            raise UsageError(f"The budget {budget!r} is one of group sizes; for bits pass e.g. weights:4 or 5GB.")
    return _by_cost(budgets, units, lambda budget: _value(budget, (), {}))


def _listed(budgets: Budget | Sequence[Budget]) -> Sequence[Budget]:
    return [budgets] if isinstance(budgets, str | int | float) else budgets


def _by_cost(
    budgets: Budget | Sequence[Budget], units: Mapping[Cost, float], value: Callable[[Budget], float]
) -> dict[Cost, float]:
    out: dict[Cost, float] = {}
    for budget in _listed(budgets):
        kind = kind_of(budget)
        if kind in out:
            raise UsageError(f"Two budgets limit the same cost ({kind}): {budget!r} is the second. Keep one of them.")
        limit = value(budget) * units[kind]
        if not limit > 0:
            raise UsageError(f"A budget must be more than 0, got {budget!r}.")
        out[kind] = limit
    return out


def _value(budget: Budget, layers: Sequence[LayerPlan], rows: Mapping[str, float]) -> float:
    if not isinstance(budget, str):
        return float(budget)
    kind, _, text = budget.partition(":")
    if kind == "uniform":
        size = int(text)
        for layer in layers:
            if layer.in_features % size:
                raise UsageError(
                    f"The budget {budget!r} means group size {size} in every layer, but it does not divide the "
                    f"{layer.in_features} input channels of layer {layer.name!r}; pass another size, or a number."
                )
        return sum(bit_operations(grouped(layer, size), rows[layer.name]) for layer in layers)
    if kind in ("weights", "activations"):
        return float(text)
    if (match := _SIZE.fullmatch(budget)) is not None:
        return float(match[1]) * UNITS[match[2].upper()]
    return float(budget)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
