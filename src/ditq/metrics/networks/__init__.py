"""Networks that metrics look through: one file each with ``NETWORK``, found by name, loaded once a process."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ditq.errors import unknown
from ditq.metrics.networks.base import Extractor, Features, MissingWeights

__all__ = ["Extractor", "Features", "MissingWeights", "load", "names"]


@cache
def _networks() -> dict[str, type[Extractor]]:
    found: dict[str, type[Extractor]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if (network := getattr(module, "NETWORK", None)) is not None:
            found[network.name] = network
    return found


def names() -> list[str]:
    """Names of all feature networks, whether their weights are on this machine or not."""
    return sorted(_networks())


@cache
def load(name: str) -> Extractor:
    """A network by name, ready for use; the same object at every call.

    Raises:
        UsageError: there is none; the known ones are listed.
        MissingWeights: its package or its weights are not on this machine. Nothing is ever downloaded.
    """
    if name not in _networks():
        raise unknown("feature network", name, _networks())
    return _networks()[name].load()
