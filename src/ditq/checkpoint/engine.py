"""The ``engine`` field of a component's config: a runtime whose graphs are stored beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ditq.checkpoint.header import metadata
from ditq.checkpoint.verify import FORMAT
from ditq.engines.registry import forced
from ditq.errors import CheckpointError
from ditq.openvino.options import ATTENTIONS, SHAPES
from ditq.plan import Plan
from ditq.reading import short

OPENVINO = "openvino"


def checked(engine: Any) -> dict[str, Any]:
    """Validates the ``engine`` field of a config, which may come from an untrusted source, and fills in defaults.

    Raises:
        CheckpointError: it is not ``{"name": "openvino", "shapes": "dynamic", "attention": "auto", "options":
            {NAME: text or number}}``.
    """
    options = engine.get("options", {}) if isinstance(engine, dict) else None
    shapes = engine.get("shapes", "dynamic") if isinstance(engine, dict) else None
    attention = engine.get("attention", "f32") if isinstance(engine, dict) else None
    if (
        not isinstance(options, dict)
        or engine.keys() - {"name", "shapes", "attention", "options"}
        or engine.get("name") != OPENVINO
        or shapes not in SHAPES
        or attention not in ATTENTIONS
        or not all(isinstance(k, str) and isinstance(v, str | int) for k, v in options.items())
    ):
        raise CheckpointError(
            f"The config names the engine {short(engine)}; expected {{'name': '{OPENVINO}', "
            f"'shapes': one of {SHAPES}, 'attention': one of {ATTENTIONS}, 'options': {{NAME: value}}}}."
        )
    return {"name": OPENVINO, "shapes": shapes, "attention": attention, "options": options}


def compile_graphs(model: nn.Module, engine: dict[str, Any] | None, folder: Path, plan: Plan | None = None) -> bool:
    """Replaces the modules of a component by the exported graphs in its folder.

    Args:
        plan: of a quantized transformer.

    Returns:
        Whether modules were replaced: False if there are no graphs, or another engine is forced.
    """
    if engine is None or forced() not in (None, OPENVINO):
        return False
    from ditq.openvino import export as openvino
    from ditq.openvino.manifest import check_binding
    from ditq.sampling import cache_root

    cache = cache_root() / OPENVINO
    cache.mkdir(parents=True, exist_ok=True)
    options = {"CACHE_DIR": str(cache), **engine["options"]}
    written_by_0_1 = not any(FORMAT in metadata(file) for file in folder.glob("*.safetensors"))
    check_binding(folder / OPENVINO, plan, required=plan is not None and not written_by_0_1)
    openvino.load(folder / OPENVINO, model, properties=options, shapes=engine["shapes"], attention=engine["attention"])
    return True
