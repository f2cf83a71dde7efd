"""Registers ditq as a quantization backend of diffusers and transformers, as late as possible.

Neither has an entry point for backends: they look names up in two module dictionaries, which have to be
extended. Importing them takes seconds, so where one is not imported yet, a one-shot import hook waits
for the module that holds the dictionaries.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# The module that holds the dictionaries, and the one with what goes there.
TARGETS = {
    "diffusers.quantizers.auto": "ditq.checkpoint.backend",
    "transformers.quantizers.auto": "ditq.checkpoint.text_encoder",
}


# Modules that model_index.json of folders saved by ditq 0.1 names, and where they are now.
RENAMED = {
    "ditq.architectures.opensora": "ditq.models.opensora",
    "ditq.architectures.vchitect.latte": "ditq.models.latte_class.transformer",
    "ditq.architectures.vchitect": "ditq.models.latte_class",
}


def register() -> None:
    """Makes ``DiffusionPipeline.from_pretrained`` understand ditq checkpoints. Safe to call twice."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renamed())
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is not None:
            _extend(module)
        elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(name))


def _extend(module: ModuleType) -> None:
    backend = importlib.import_module(TARGETS[module.__name__])
    if not hasattr(backend, "DitqQuantizer"):
        return  # importing the backend is what imported the module: it registers itself when it is complete
    try:
        module.AUTO_QUANTIZER_MAPPING["ditq"] = backend.DitqQuantizer
        module.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] = backend.DitqConfig
    except AttributeError as error:
        import warnings

        library = module.__name__.partition(".")[0]
        warnings.warn(
            f"This {library} keeps its quantizers elsewhere ({error}): it cannot load ditq checkpoints.",
            stacklevel=2,
        )


class _Waiting:
    """A meta path finder that finds nothing itself; it extends the target module once that has been run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
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


class _Renamed:
    """A meta path finder and loader: an old name of a module gives the module under its new name."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if _new_name(name) is None else ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(_new_name(spec.name)))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's there


def _new_name(name: str) -> str | None:
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None
