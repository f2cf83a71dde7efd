"""Registers ditq as a quantization backend of diffusers, as late as possible.

diffusers has no entry point for backends: it looks names up in two module dictionaries, which have to be
extended. Importing diffusers takes seconds, so where it is not imported yet, a one-shot import hook waits
for the module that holds the dictionaries.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "diffusers.quantizers.auto"


def register() -> None:
    """Makes ``DiffusionPipeline.from_pretrained`` understand ditq checkpoints. Safe to call twice."""
    module = sys.modules.get(TARGET)
    if module is not None:
        _extend(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _extend(module: ModuleType) -> None:
    backend = importlib.import_module("ditq.checkpoint.backend")
    if not hasattr(backend, "DitqQuantizer"):
        return  # importing the backend is what imported diffusers: it registers itself when it is complete
    try:
        module.AUTO_QUANTIZER_MAPPING["ditq"] = backend.DitqQuantizer
        module.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] = backend.DitqConfig
    except AttributeError as error:
        import warnings

        warnings.warn(
            f"This diffusers keeps its quantizers elsewhere ({error}): it cannot load ditq checkpoints.",
            stacklevel=2,
        )


class _Waiting:
    """A meta path finder that finds nothing itself; it extends the target module once that has been run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_then_extend(module: ModuleType) -> None:
            run(module)
            _extend(module)

        spec.loader.exec_module = run_then_extend  # type: ignore[method-assign]
        return spec
