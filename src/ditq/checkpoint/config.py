"""The ``quantization_config`` of a model: the plan of a checkpoint, or the recipe to apply while loading."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ditq.checkpoint.engine import checked
from ditq.errors import CheckpointError, UsageError, unknown
from ditq.plan import Plan
from ditq.recipe import Recipe, load, parse

KEYWORDS = ("plan", "recipe", "engine", "overrides", "modules_to_not_convert")


class Method(str, Enum):  # noqa: UP042 - diffusers reads `.value` of a str-valued enum member
    DITQ = "ditq"


class DitqConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a transformer: ``quant_method`` and the fields of a plan.

    ``DitqConfig(recipe="rtn-w8a8")`` quantizes while loading, for recipes without calibration. A config with neither
    plan nor recipe belongs to a floating-point component that an engine executes (a VAE, a text encoder). Models get
    a copy of it, so that one config can load several.

    Args:
        plan: the plan of a quantized transformer.
        recipe: the recipe to apply while loading: its name, the path of a YAML file, or a :class:`ditq.Recipe`.
        engine: a runtime and its options: ``{"name": "openvino", "shapes": "dynamic", "attention": "auto", "options":
            {"NUM_STREAMS": 1}}``. Its graphs (``ditq export``) are in a folder of that name beside the weights.
        overrides: ``key=value`` assignments to fields of the recipe; a single one may be a string.
        modules_to_not_convert: modules that stay in 16 bit, by name (``transformer_blocks.0.ff``) or by a part of it
            between dots (``ff``), besides those of the recipe's ``keep_layers``.
        fields: the fields of a plan, as read from ``config.json``.

    Raises:
        UsageError: an unknown keyword, one without effect, or a recipe that does not exist.
        CheckpointError: the fields are not those of a plan.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        recipe: str | Path | Recipe | dict[str, Any] | None = None,
        engine: dict[str, Any] | None = None,
        overrides: str | Sequence[str] = (),
        modules_to_not_convert: str | Sequence[str] | None = (),
        **fields: Any,
    ) -> None:
        self.quant_method = Method.DITQ
        self.engine = None if engine is None else checked(engine)
        self.overrides = (overrides,) if isinstance(overrides, str) else tuple(overrides)
        not_converted = modules_to_not_convert or ()
        self.modules_to_not_convert = (not_converted,) if isinstance(not_converted, str) else tuple(not_converted)
        fields.pop("quant_method", None)
        if plan is None and "layers" in fields:
            plan, fields = Plan.from_dict({**fields, "recipe": recipe}), {}
        _refuse(fields)
        if plan is None and recipe is None and engine is None:
            raise CheckpointError("A ditq quantization_config needs the fields of a plan, or the name of a recipe.")
        self.plan, self.recipe = plan, recipe
        if (plan is not None or recipe is None) and (self.overrides or self.modules_to_not_convert):
            raise UsageError(
                "overrides= and modules_to_not_convert= of a DitqConfig change its recipe, but it has "
                f"{'a plan, which is explicit' if plan else 'none'}. Leave them out, or pass recipe=."
            )
        if plan is None and recipe is not None:
            self.job()  # refuses what does not exist before anything is loaded

    def job(self) -> Recipe:
        """The recipe with its overrides, keeping the modules that are not to be converted."""
        assert self.recipe is not None
        recipe = parse(self.recipe, "the DitqConfig") if isinstance(self.recipe, dict) else load(self.recipe)
        if self.overrides:
            recipe = recipe.override(self.overrides)
        kept = tuple(map(_pattern, self.modules_to_not_convert))
        return recipe.model_copy(update={"keep_layers": (*recipe.keep_layers, *kept)}) if kept else recipe

    def check_names(self, model: nn.Module) -> None:
        """Refuses names in ``modules_to_not_convert`` that no module of ``model`` has.

        Raises:
            UsageError: names it.
        """
        names = [name for name, _ in model.named_modules() if name]
        for wanted in self.modules_to_not_convert:
            if not any(re.search(_pattern(wanted), name) for name in names):
                raise unknown(f"module of {type(model).__name__} in modules_to_not_convert", wanted, names[:50])

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.plan is not None:
            fields = self.plan.model_dump(mode="json", exclude_none=True)
        elif self.recipe is not None:
            written = self.recipe.model_dump(mode="json") if isinstance(self.recipe, Recipe) else self.recipe
            fields["recipe"] = str(written) if isinstance(written, Path) else written
            for name in ("overrides", "modules_to_not_convert"):
                if getattr(self, name):
                    fields[name] = list(getattr(self, name))
        engine = {} if self.engine is None else {"engine": self.engine}
        return {"quant_method": self.quant_method.value, **engine, **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        recipe = self.recipe.name if isinstance(self.recipe, Recipe) else self.recipe
        return f"DitqConfig({self.plan.hash() if self.plan else recipe or self.engine})"

    @property
    def is_plain(self) -> bool:
        """Whether the component is not quantized by ditq."""
        return self.plan is None and self.recipe is None


def _refuse(fields: dict[str, Any]) -> None:
    """Refuses keywords that mean nothing here."""
    for name in fields:
        if name in Plan.model_fields:
            raise CheckpointError(
                f"The ditq quantization_config has {name!r}, a field of a plan, but not the plan's layers. Pass the "
                f"whole plan, or a recipe with overrides=[...]; keywords: {', '.join(KEYWORDS)}."
            )
        hint = "The widths are part of the recipe's name, e.g. recipe='rtn-w8a8'; see `ditq recipes`. Fields of a "
        raise unknown("keyword of DitqConfig", name, KEYWORDS, hint + "recipe are set by overrides=['key=value'].")


def _pattern(name: str) -> str:
    """The regular expression of the names of a module and of all inside of it."""
    return rf"(^|\.){re.escape(name)}(\.|$)"
