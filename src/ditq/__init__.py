"""ditq: post-training quantization for diffusion transformers.

    import ditq                                   # registers the diffusers backend
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path)
    result = ditq.quantize(pipe, "viditq-w4a8", prompts=prompts)
    pipe.save_pretrained(out)                     # plain diffusers loads it again

Verbs:
    quantize(pipe, recipe)      the transformer of a pipeline, in place; gives a Result
    save(pipe, out)             a pipeline to a new folder, all of it or nothing
    load(path)                  a pipeline from a folder, a hub id or bundled:NAME
    compare(reference, others)  the same prompts and noise, measured; gives a Comparison
    search(pipe, recipe)        bits or group sizes for every layer, within a budget; gives a Plan
    sensitivity(pipe, recipe)   what quantizing each block alone does to the model; gives Scores
    export(source, out)         a quantized pipeline as graphs of OpenVINO, for CPUs
    fuse_lora(pipe)             loaded LoRA adapters into a quantized transformer, to save them with it
    use_engine(name)            inside, that engine computes: with ditq.use_engine("torch"): ...

Nouns:
    Recipe, Grid                what to do, and how a tensor becomes integers
    Plan, LayerPlan             what was done to each layer; saved with the checkpoint
    DitqConfig                  the quantization_config of diffusers
    DitqError                   of which UsageError and CheckpointError are kinds

``help(ditq.quantize)`` explains one of them. They are imported when first used: ``import ditq`` costs milliseconds and
pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ditq.checkpoint.registration import register as _register

if TYPE_CHECKING:
    from ditq.adapters import fuse_lora as fuse_lora
    from ditq.api import Result as Result
    from ditq.api import export as export
    from ditq.api import load as load
    from ditq.api import quantize as quantize
    from ditq.api import save as save
    from ditq.api import search as search
    from ditq.api import sensitivity as sensitivity
    from ditq.checkpoint.backend import DitqConfig as DitqConfig
    from ditq.comparison import Comparison as Comparison
    from ditq.comparison import compare as compare
    from ditq.engines import use_engine as use_engine
    from ditq.errors import CheckpointError as CheckpointError
    from ditq.errors import DitqError as DitqError
    from ditq.errors import UsageError as UsageError
    from ditq.numerics import Grid as Grid
    from ditq.plan import LayerPlan as LayerPlan
    from ditq.plan import Plan as Plan
    from ditq.plan import TensorFormat as TensorFormat
    from ditq.recipe import Recipe as Recipe

__version__ = "0.1.0"

_HOME = {
    "quantize": "ditq.api",
    "load": "ditq.api",
    "save": "ditq.api",
    "export": "ditq.api",
    "search": "ditq.api",
    "sensitivity": "ditq.api",
    "fuse_lora": "ditq.adapters",
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ditq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    # There is no __all__: with one, help(ditq) prints every class in full below the table of contents.
    return [*_HOME, "__version__"]


_register()
