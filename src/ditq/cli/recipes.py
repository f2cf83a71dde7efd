"""``ditq recipes``: what can be asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import AsJson, out, print_json

if TYPE_CHECKING:
    from ditq.recipe import Recipe


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe, or family of recipes, in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the families of recipes, or show one recipe as a file to copy.

    Example: ditq recipes viditq-w4a8
    """
    import yaml

    from ditq import recipe as module
    from ditq.report.terminal import table

    families = module.families()
    if name is not None:
        full = families[name].model_dump(mode="json") if name in families else None
        if as_json:
            print_json(full or module.load(name).model_dump(mode="json"))
        else:
            shown = full or _file(module.load(name))
            # Not by the console: it would break lines, and YAML with them.
            print(yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=1000), end="")
        return
    if as_json:
        print_json([module.load(n).model_dump(mode="json") for n in module.names()])
        return
    made = table("recipe", "what it is", "for whom", "calibrates", caption="X: 2 to 8 bits a weight; Y: 2 to 8 or 16 "
                 "bits an input. `ditq recipes NAME` shows a family, `ditq recipes NAME-w4a8` a recipe.")  # fmt: skip
    costs = any(family.cost for family in families.values())
    if costs:
        made.add_column("cost")
    made.columns[0].no_wrap = made.columns[3].no_wrap = True
    for family in families.values():
        recipe = family.recipe(8, 8)
        cells = [f"{family.name}-wXaY", in_words(recipe), family.for_whom, "yes" if recipe.needs_calibration else "no"]
        made.add_row(*cells, *([family.cost] if costs else []))
    out.print(made)


def in_words(recipe: Recipe) -> str:
    """What a recipe does, without numbers: ``smooth + rotate by error, dynamic``."""
    rules = recipe.balance
    balance = " + ".join(name for name, on in (("smooth", rules.smooth), ("rotate", rules.rotate)) if on)
    parts = [
        f"{balance} by error" if rules.choose == "error" else balance,
        "GPTQ" if recipe.rounding == "gptq" else "" if balance else "round to nearest",
        f"groups of {recipe.weights.group_size}" if recipe.weights.group_size else "",
        "dynamic" if recipe.activations is None or recipe.activations.dynamic else "static",
        "chosen timesteps" if recipe.calibration.timesteps == "normal" else "",
    ]
    return ", ".join(part for part in parts if part)


def _file(recipe: Recipe) -> dict[str, Any]:
    """The fields that a file of this recipe needs: all that differ from the defaults."""
    return {"version": recipe.version, **recipe.model_dump(mode="json", exclude_defaults=True)}


VERB = recipes
