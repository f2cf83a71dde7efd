"""``ditq architectures``: which transformers ditq knows."""

from __future__ import annotations

from typing import Any

from ditq.cli.common import AsJson, out, print_json


def architectures(as_json: AsJson = False) -> None:
    """List the model families and their roles.

    Example: ditq architectures
    """
    from rich.table import Table

    from ditq import architectures as module

    rows: list[dict[str, Any]] = []
    for name in module.names():
        a = module.load(name)
        groups = [group for stack in a.stacks.values() for group in stack]
        rows.append(
            {
                "name": name,
                "classes": list(a.classes),
                "quantized_roles": list(dict.fromkeys(role for g in groups for role in g.linears.values())),
                "kept_roles": sorted(set(a.other.values())),
                "foldable_inputs": sum(g.input.foldable is not None for g in groups),
                "inputs": len(groups),
            }
        )
    if as_json:
        print_json(rows)
        return
    table = Table("architecture", "classes", "quantized roles", "kept in 16 bit", "inputs that fold")
    for r in rows:
        table.add_row(
            r["name"], ", ".join(r["classes"]), ", ".join(r["quantized_roles"]), ", ".join(r["kept_roles"]),
            f"{r['foldable_inputs']} of {r['inputs']} a block",
        )  # fmt: skip
    out.print(table)


VERB = architectures
