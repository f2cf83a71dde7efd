"""What a quantization method decides, and how methods are found."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from ditq import methods as package
from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.errors import unknown
from ditq.numerics import is_supported, largest_block
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Recipe


class Method(ABC):
    """Chooses the balance of every input group. Formats come from the recipe, rounding from the plan."""

    name: str

    @abstractmethod
    def balance(
        self,
        group: InputGroup,
        layers: Sequence[LayerPlan],
        recipe: Recipe,
        seen: GroupStatistics | None,
        timesteps: Tensor | None,
        seed: int,
    ) -> tuple[Smooth | None, Rotate | None]:
        """Smoothing and rotation of the input of ``group``.

        Args:
            layers: draft plans of the group's linears that are quantized (at least one).
            seen: statistics of the input, None where the recipe needs no calibration.
            timesteps: float32 [T] that ``seen.absmax`` is indexed by.
        """


def smooth_of(group: InputGroup, recipe: Recipe, alpha: float) -> Smooth:
    """The smoothing of a group at one ``alpha``, folded where the recipe and the architecture allow it."""
    fold = recipe.balance.fold and recipe.balance.timesteps is None
    return Smooth(alpha=alpha, power_of_two=recipe.balance.power_of_two, folded=group.input.foldable if fold else None)


def rotate_of(width: int, recipe: Recipe, seed: int) -> Rotate:
    """The widest Hadamard rotation known for ``width`` inputs, or the recipe's block size."""
    block = recipe.balance.block or (width if is_supported(width) else largest_block(width))
    return Rotate(block=block, seed=seed)


@cache
def _methods() -> dict[str, Method]:
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if isinstance(method := getattr(module, "METHOD", None), Method):
            found[method.name] = method
    return found


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_methods())


def get(name: str) -> Method:
    """A method by name.

    Raises:
        UsageError: there is none; the known ones are listed.
    """
    if name not in _methods():
        raise unknown("method", name, _methods())
    return _methods()[name]
