"""Calibration as every search starts with it: read from the cache if an earlier run left it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ditq.architectures import Architecture
from ditq.calibration import Statistics, calibrate
from ditq.errors import UsageError
from ditq.recipe import Recipe


def calibrated(
    pipe: Any,
    component: str,
    architecture: Architecture,
    recipe: Recipe,
    conditions: Sequence[str] | None,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> Statistics:
    """The statistics of one transformer by the recipe's calibration; see :func:`ditq.calibration.calibrate`.

    Args:
        progress: called with ("calibrate", batches done, all batches).

    Raises:
        UsageError: there are no conditions to calibrate with.
    """
    if not conditions:
        raise UsageError(f"Recipe {recipe.name!r} needs calibration: pass calibration=[...] prompts.")
    return calibrate(
        pipe, architecture, conditions, recipe.calibration, component=component, seed=seed, resume=True,
        progress=None if progress is None else lambda done, total: progress("calibrate", done, total),
    )  # fmt: skip
