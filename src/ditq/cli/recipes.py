"""``ditq recipes``: lists the recipes."""

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
            content = full or _file(module.load(name))
            # Not by the console, which would wrap lines and break the YAML.
            print(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=1000), end="")
        return
    if as_json:
        print_json([module.load(n).model_dump(mode="json") for n in module.names()])
        return
    caption = (
        "X: 2 to 8 bits per weight; Y: 2 to 8 or 16 bits per input. `ditq recipes NAME` shows a family, "
        "`ditq recipes NAME-w4a8` a recipe. Cost: to quantize bundled:emoji-t2i at W4A8 on 2 CPU cores "
        "(benchmarks/quality/recipe_cost.py)."
    )
    printed = table("recipe", "what it is", "for whom", "calibrates", caption=caption)
    costs = any(family.cost for family in families.values())
    if costs:
        printed.add_column("cost")
    printed.columns[0].no_wrap = printed.columns[3].no_wrap = True
    for family in families.values():
        recipe = family.recipe(8, 8)
        cells = [f"{family.name}-wXaY", in_words(recipe), family.for_whom, "yes" if recipe.needs_calibration else "no"]
        printed.add_row(*cells, *([family.cost] if costs else []))
    out.print(printed)


def in_words(recipe: Recipe) -> str:
    """The steps of a recipe without numbers: ``smooth + rotate by error, dynamic``."""
    rules = recipe.balance
    rotation = "rotate by regular blocks" if rules.rotation == "regular" else "rotate"
    balance = " + ".join(name for name, on in (("smooth", rules.smooth), (rotation, rules.rotate)) if on)
    parts = [
        f"{balance} by error" if rules.choose == "error" else balance,
        f"branch of rank {recipe.branch.rank}" if recipe.branch else "",
        "GPTQ" if recipe.rounding == "gptq" else "" if balance else "round to nearest",
        f"groups of {recipe.weights.group_size}" if recipe.weights.group_size else "",
        "dynamic" if recipe.activations is None or recipe.activations.dynamic else "static",
        "mixed bits" if recipe.layers or recipe.step_weights else "",
        "chosen timesteps" if recipe.calibration.timesteps == "normal" else "",
    ]
    return ", ".join(part for part in parts if part)


def _file(recipe: Recipe) -> dict[str, Any]:
    """The fields for a file of this recipe: all that differ from the defaults."""
    return {"version": recipe.version, **recipe.model_dump(mode="json", exclude_defaults=True)}


VERB = recipes
