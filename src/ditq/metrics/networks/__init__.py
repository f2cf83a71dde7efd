"""The feature networks of metrics: one file each, which defines ``NETWORK``; loaded by name, once per process."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ditq.errors import unknown
from ditq.metrics.networks.base import Extractor, Features, MissingWeights

__all__ = ["Extractor", "Features", "MissingWeights", "load", "names"]


@cache
def _networks() -> dict[str, type[Extractor]]:
    by_name: dict[str, type[Extractor]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if (network := getattr(module, "NETWORK", None)) is not None:
            by_name[network.name] = network
    return by_name


def names() -> list[str]:
    """Names of all feature networks, including those whose weights are not on this machine."""
    return sorted(_networks())


@cache
def load(name: str) -> Extractor:
    """A network by name, ready for use; every call returns the same object.

    Raises:
        UsageError: no network has this name.
        MissingWeights: its package or its weights are not on this machine. Nothing is downloaded.
    """
    if name not in _networks():
        raise unknown("feature network", name, _networks())
    return _networks()[name].load()
