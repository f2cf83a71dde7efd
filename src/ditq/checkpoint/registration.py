"""Registers ditq as a quantization backend of diffusers and transformers, as late as possible.

Neither library has an entry point for backends. They look names up in two module dictionaries, which must be extended.
Importing a library takes seconds. If it is not imported yet, a one-shot import hook extends the dictionaries once
their module is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# The modules with the dictionaries, and the modules with the classes to add.
TARGETS = {
    "diffusers.quantizers.auto": "ditq.checkpoint.backend",
    "transformers.quantizers.auto": "ditq.checkpoint.text_encoder",
}


# Modules named in the model_index.json of folders saved by ditq 0.1, and their new names.
RENAMED = {
    "ditq.architectures.opensora": "ditq.models.opensora",
    "ditq.architectures.vchitect.latte": "ditq.models.latte_class.transformer",
    "ditq.architectures.vchitect": "ditq.models.latte_class",
}


def register() -> None:
    """Lets ``DiffusionPipeline.from_pretrained`` load ditq checkpoints. It is safe to call twice."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Renamed())
    for name in TARGETS:
        module = sys.modules.get(name)
        if module is not None:
            _extend(module)
        elif not any(isinstance(finder, _ImportHook) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _ImportHook(name))


def _extend(module: ModuleType) -> None:
    backend = importlib.import_module(TARGETS[module.__name__])
    if not hasattr(backend, "DitqQuantizer"):
        return  # the backend is still being imported, and imported this module; it registers itself at its end
    try:
        module.AUTO_QUANTIZER_MAPPING["ditq"] = backend.DitqQuantizer
        module.AUTO_QUANTIZATION_CONFIG_MAPPING["ditq"] = backend.DitqConfig
    except AttributeError as error:
        import warnings

        library = module.__name__.partition(".")[0]
        warnings.warn(
            f"This version of {library} is not supported ({error}): it cannot load ditq checkpoints.",
            stacklevel=2,
        )


class _ImportHook:
    """A one-shot meta path finder that extends the target module after it was executed."""

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
    """A meta path finder that provides the modules of :data:`RENAMED` under both names.

    Importing an old name returns the new module. A new module, once imported, is also in ``sys.modules`` under its old
    name, because diffusers looks up the modules of a ``model_index.json`` there without importing them.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (new := _renamed(name, RENAMED)) is not None:
            return ModuleSpec(name, _Alias(new))  # type: ignore[arg-type]
        old_names = [old for old, new in RENAMED.items() if name == new or name.startswith(f"{new}.")]
        spec = PathFinder.find_spec(name, path) if old_names else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_then_alias(module: ModuleType) -> None:
            run(module)
            for old in old_names:
                sys.modules.setdefault(str(_renamed(name, {RENAMED[old]: old})), module)

        spec.loader.exec_module = run_then_alias  # type: ignore[method-assign]
        return spec


class _Alias:
    """A loader that returns the module with another name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it by the spec of the old name


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
    """The new name of a module, or of a module inside a renamed package; None if it was not renamed."""
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return None
