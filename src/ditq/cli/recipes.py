"""``ditq recipes``: what can be asked for."""

from __future__ import annotations

from typing import Annotated

import typer

from ditq.cli.common import AsJson, out, print_json


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this recipe in full.")] = None, as_json: AsJson = False
) -> None:
    """List the recipes, or show one.

    Example: ditq recipes viditq-w4a8
    """
    import yaml
    from rich.table import Table

    from ditq import recipe as module

    if name is not None:
        data = module.load(name).model_dump(mode="json")
        print_json(data) if as_json else out.print(yaml.safe_dump(data, sort_keys=False), markup=False)
        return
    loaded = [module.load(n) for n in module.names()]
    if as_json:
        print_json([r.model_dump(mode="json") for r in loaded])
        return
    table = Table("recipe", "weights", "activations", "calibration", "what it is")
    for r in loaded:
        table.add_row(r.name, str(r.weights), str(r.activations), "yes" if r.needs_calibration else "", r.description)
    out.print(table)


VERB = recipes
