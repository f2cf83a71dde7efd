"""ditq: post-training quantization for diffusion transformers.

    import ditq                                   # registers the diffusers backend
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path)
    result = ditq.quantize(pipe, "viditq-w4a8", prompts=prompts)
    pipe.save_pretrained(out)                     # plain diffusers loads it again

Names below are imported when first used: ``import ditq`` costs milliseconds and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ditq.checkpoint.registration import register as _register

if TYPE_CHECKING:
    from ditq.api import Result, export, load, quantize, save, search
    from ditq.checkpoint.backend import DitqConfig
    from ditq.comparison import Comparison, compare
    from ditq.engines import use_engine
    from ditq.errors import CheckpointError, DitqError, UsageError
    from ditq.numerics import Grid
    from ditq.plan import LayerPlan, Plan, TensorFormat
    from ditq.recipe import Recipe

__version__ = "0.1.0"

_HOME = {
    "quantize": "ditq.api",
    "load": "ditq.api",
    "save": "ditq.api",
    "export": "ditq.api",
    "search": "ditq.api",
    "compare": "ditq.comparison",
    "Result": "ditq.api",
    "Comparison": "ditq.comparison",
    "DitqConfig": "ditq.checkpoint.backend",
    "use_engine": "ditq.engines",
    "CheckpointError": "ditq.errors",
    "DitqError": "ditq.errors",
    "UsageError": "ditq.errors",
    "LayerPlan": "ditq.plan",
    "Plan": "ditq.plan",
    "Grid": "ditq.numerics.grid",
    "TensorFormat": "ditq.plan",
    "Recipe": "ditq.recipe",
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "DitqConfig",
    "DitqError",
    "Grid",
    "LayerPlan",
    "Plan",
    "Recipe",
    "Result",
    "TensorFormat",
    "UsageError",
    "__version__",
    "compare",
    "export",
    "load",
    "quantize",
    "save",
    "search",
    "use_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ditq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__


_register()
