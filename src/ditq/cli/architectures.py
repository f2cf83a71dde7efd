"""``ditq architectures``: a table of the supported transformers, generated from the architecture files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import AsJson, out, print_json

if TYPE_CHECKING:
    from ditq.architectures import Architecture

Row = dict[str, Any]

# Columns that fit a terminal, with their headings; --json and --markdown print the others too.
FAMILY = {"architecture": "architecture", "class": "class", "tested": "tested"}
SIZE = {"checkpoint": "checkpoint", "parameters": "weights", "16 bit": "16 bit", "W8A8": "W8A8", "W4A8": "W4A8"}

GUIDANCE = {
    ("batch", "conditional"): "one batch, conditional half first",
    ("batch", "unconditional"): "one batch, unconditional half first",
    ("calls", "conditional"): "two calls, conditional first",
    ("embedded", ""): "an input of the model",
}
PAGE = """# Architectures

<!-- Made by: ditq architectures --sizes --markdown > docs/architectures.md -->

A file in `src/ditq/architectures` says what each linear layer of a transformer is for and what feeds it.

Tested: `tiny`, a model of that class with random weights, for roles, shared inputs and exact folds; `bundled`, trained
models that come with ditq; `real size`, the second table.

{families}
{notes}
## At real size

Every linear of these has a role. They are made of their public configs without weights, so that nothing is downloaded,
and memory is what the plans of `rtn-w8a8` and `rtn-w4a8` say: packed weights, scales and all that stays in 16 bit.

{sizes}"""


def architectures(
    name: Annotated[str | None, typer.Argument(help="Show this architecture in full.")] = None,
    sizes: Annotated[bool, typer.Option("--sizes", help="Show the memory of public checkpoints.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/architectures.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the model families and how they are tested, or show one with its roles.

    Example: ditq architectures pixart
    """
    from ditq import architectures as module
    from ditq.report.terminal import table

    chosen = [module.load(n) for n in ([name] if name else module.names())]
    if markdown:
        print(page(chosen), end="")
        return
    rows = checkpoints(chosen) if sizes else families(chosen)
    if as_json:
        print_json(rows)
    elif name and not sizes:
        printed = table("architecture", name)
        for key, value in list(rows[0].items())[1:]:
            printed.add_row(key, in_words(value))
        out.print(printed)
    else:
        columns = SIZE if sizes else FAMILY
        caption = None if sizes else "`ditq architectures NAME` shows roles and folds."
        printed = table(*columns.values(), caption=caption)
        printed.columns[0].no_wrap = printed.columns[1].no_wrap = True
        for row in rows:
            printed.add_row(*(in_words(row[key]) for key in columns))
        out.print(printed)


def families(known: list[Architecture]) -> list[Row]:
    """One row per architecture file."""
    bundled = _bundled()
    rows = []
    for a in known:
        groups = [group for stack in a.stacks.values() for group in stack]
        tested = ["tiny"] if a.example else []
        tested += [f"bundled:{name}" for name, kind in bundled.items() if kind in a.classes]
        tested += [f"real size ({len(a.sizes)})"] if a.sizes else []
        rows.append(
            {
                "architecture": a.name,
                "class": list(a.classes),
                "pipeline": list(a.pipeline.classes),
                "guidance": GUIDANCE[a.guidance.style, a.guidance.order[0] if a.guidance.order else ""],
                "quantized roles": _grouped([role for g in groups for role in g.linears.values()]),
                "16 bit": sorted(set(a.other.values())),
                "folds": f"{sum(g.input.foldable is not None for g in groups)} of {len(groups)} inputs",
                "tested": tested,
            }
        )
    return rows


def checkpoints(known: list[Architecture]) -> list[Row]:
    """One row per public config, built on the meta device."""
    import torch

    from ditq.conversion import estimate
    from ditq.recipe import load

    rows = []
    for a in known:
        for name, config in a.sizes.items():
            with torch.device("meta"):
                model = a.model_class()(**config)
            w8, w4 = (estimate(model, a, load(recipe)) for recipe in ("rtn-w8a8", "rtn-w4a8"))
            quantized_bytes, full_bytes = w8.memory()
            rows.append(
                {
                    "checkpoint": name,
                    "architecture": a.name,
                    "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B",
                    "linears": f"{len(w8.layers)}",
                    "quantized": f"{len(w8.quantized)}",
                    "16 bit": f"{full_bytes / 1e9:.2f} GB",
                    "W8A8": f"{quantized_bytes / 1e9:.2f} GB",
                    "W4A8": f"{w4.memory()[0] / 1e9:.2f} GB",
                }
            )
    return rows


def page(known: list[Architecture]) -> str:
    """The text of docs/architectures.md."""
    notes = "".join(f"- **{a.name}**: {a.note}\n" for a in known if a.note)
    return PAGE.format(families=as_markdown(families(known)), notes=notes, sizes=as_markdown(checkpoints(known)))


def as_markdown(rows: list[Row]) -> str:
    """A Markdown table that ends in a newline."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(in_words, row.values()) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_words(value: Any) -> str:
    """A cell as text; the items of a list are separated by commas."""
    return ", ".join(value) if isinstance(value, list) else str(value)


def _grouped(roles: list[str]) -> list[str]:
    """Roles grouped by kind, in order of appearance: ``cross_attn.q/k/v/out`` for four roles of one kind."""
    kinds: dict[str, dict[str, None]] = {}
    for role in roles:
        kind, _, part = role.rpartition(".")
        kinds.setdefault(kind or part, {}).update({part: None} if kind else {})
    return [f"{kind}.{'/'.join(parts)}" if parts else kind for kind, parts in kinds.items()]


def _bundled() -> dict[str, str]:
    """The transformer class of each bundled model; empty if they are not installed."""
    import json

    try:
        import ditq_bundled
    except ImportError:
        return {}
    configs = {name: ditq_bundled.path(name) / "transformer" / "config.json" for name in ditq_bundled.names()}
    return {name: json.loads(config.read_text())["_class_name"] for name, config in configs.items()}


VERB = architectures
