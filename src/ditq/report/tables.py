"""Plans as tables, and as the stable JSON that scripts rely on."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ditq.plan import LayerPlan, Plan
from ditq.report import wording as words
from ditq.report.grouping import By, Row, ranges, sections
from ditq.report.terminal import Terminal, table

# Longer reasons are printed below the table.
LONGEST_REASON = 20

# Terminal columns reserved for the last column of the table and for the gaps between its four columns.
REST = 14 + 3 * 2


def plan_json(plan: Plan, transformer_bytes: int) -> dict[str, Any]:
    """The JSON of ``ditq inspect --json``; ``transformer_bytes`` is the actual size of the files."""
    return {
        "method": plan.method,
        "recipe": plan.recipe,
        "architecture": plan.architecture,
        "hash": plan.hash(),
        "nominal_bits": {"weights": plan.nominal_weight_bits, "activations": plan.nominal_activation_bits},
        "average_bits": plan.average_bits,
        "average_activation_bits": plan.average_activation_bits,
        "transformer_bytes": transformer_bytes,
        "transformer_bytes_16bit": plan.memory()[1],
        "layers": [layer_json(layer) for layer in plan],
    }


def layer_json(layer: LayerPlan) -> dict[str, Any]:
    """One row of the table of layers."""
    return {
        "name": layer.name,
        "role": layer.role,
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "granularity": {
            "weights": layer.weight.granularity if layer.weight else None,
            "activations": layer.activation.granularity if layer.activation else None,
        },
        "group_size": {
            "weights": layer.weight.group_size if layer.weight else None,
            "activations": layer.activation.group_size if layer.activation else None,
        },
        **levels_json(layer),
        "balance": layer.balance,
        "rounding": layer.rounding if layer.weight else None,
        "rounding_gain": layer.rounding_gain,
        "incoherence": layer.incoherence.model_dump() if layer.incoherence else None,
        "reason": layer.reason,
        **({"steps": [step.model_dump(mode="json") for step in layer.steps]} if layer.steps else {}),
        **({"timesteps": layer.timesteps} if layer.timesteps else {}),
        **({"range_weight_bits": [grid.bits for grid in layer.range_weights]} if layer.range_weights else {}),
    }


def levels_json(layer: LayerPlan) -> dict[str, Any]:
    """The levels of a layer's grids, unless all are uniform."""
    weights, inputs = (None if grid is None else grid.levels for grid in (layer.weight, layer.activation))
    return {"levels": {"weights": weights, "activations": inputs}} if "normal" in (weights, inputs) else {}


def plan_table(plan: Plan, *, by: By = "blocks", width: int = 80) -> Table:
    """The table of layers: formats of weights and inputs, balance and rounding.

    Args:
        by: ``blocks`` shows equal layers of equal blocks once, ``layers`` every layer, ``roles`` every role.
        width: columns of the terminal; names are broken at dots to leave room for the formats.
    """
    layers = table("role" if by == "roles" else "layer", "weights", "inputs", "balance, rounding",
                 title=f"{plan.recipe} on {plan.architecture}")  # fmt: skip
    for column in layers.columns[:3]:
        column.no_wrap = True
    notes: dict[str, str] = {}
    rows = [
        (section.title, row, _cells(row.layers, by, notes)) for section in sections(plan, by) for row in section.rows
    ]
    formats = sum(max((len(cells[i]) for *_, cells in rows), default=0) for i in (0, 1))
    room = max(20, min(width * 7 // 20, width - formats - REST))
    title = label = ""
    for section, row, cells in rows:
        indent = "  " if section else ""
        if section and section != title:
            layers.add_row(folded(section, room))
        name = "" if (section, row.label) == (title, label) else row.label
        title, label = section, row.label
        label_cell = textwrap.indent(_label_cell(name, _where(row, by, room - 4), room - len(indent)), indent)
        layers.add_row(label_cell, *cells)
    layers.caption = "\n".join(f"{mark} {reason}" for reason, mark in notes.items()) or None
    return layers


def _where(row: Row, by: By, room: int) -> str:
    """The blocks of a row, if it does not cover the whole stack, or the number of layers of a role."""
    if by == "roles":
        return f"{len(row.layers)} layers" if len(row.layers) > 1 else ""
    if len(row.blocks) == row.total:
        return ""
    listed = f"in {', '.join(ranges(row.blocks))}"
    return listed if len(listed) <= room else f"in {len(row.blocks)} of {row.total}"


def _label_cell(name: str, where: str, room: int) -> str:
    """A name and its blocks, on one line if they fit. Without a name, the blocks belong to the row above."""
    if not where:
        return folded(name, room)
    if name and len(name) + 1 + len(where) <= room:
        return f"{name} {where}"
    return "\n".join([*([folded(name, room)] if name else []), f"  {where}"])


def folded(name: str, room: int) -> str:
    """Breaks a name into lines of at most ``room`` characters: at dots, and longer parts at underscores."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        for piece in re.findall(r"[^_]*_|[^_]+", part) if len(part) > room else [part]:
            if lines[-1].strip() and len(lines[-1] + piece) > room:
                lines.append(" ")
            lines[-1] += piece
    return "\n".join(lines)


def _cells(layers: Sequence[LayerPlan], by: By, notes: dict[str, str]) -> tuple[str, str, str]:
    """The cells of layers that differ in smoothing strength only: weights, inputs, and balance with rounding.

    Args:
        notes: marks of long reasons, which are printed below the table; a new reason is added.
    """
    first = layers[0]
    reason = first.reason.removesuffix(" is kept in 16 bit")
    if len(reason) > LONGEST_REASON:
        reason = notes.setdefault(reason, f"({len(notes) + 1})")
    if first.weight is None:
        return "16 bit", "16 bit", reason
    methods = [
        words.balance(layers),
        words.ranges(first),
        words.steps(first),
        "GPTQ" if first.rounding == "gptq" else "",
        _incoherence(first) if by == "layers" else "",
        reason,
    ]
    return words.weights(first.weight), words.inputs(first.activation), ", ".join(text for text in methods if text)


def _incoherence(layer: LayerPlan) -> str:
    """Incoherence of the weight rows and of the inputs, before and after balancing."""
    mu = layer.incoherence
    if mu is None:
        return ""
    text = f"mu W {mu.weight_before:.1f}->{mu.weight_after:.1f}"
    return text if mu.input_before is None else f"{text}, X {mu.input_before:.1f}->{mu.input_after:.1f}"


def plan_summary(plan: Plan, transformer_bytes: int | None = None) -> str:
    """Counts, bits and memory in three lines."""
    planned, full = plan.memory()
    size = transformer_bytes if transformer_bytes is not None else planned
    kept = ", ".join(sorted({layer.role for layer in plan.kept})) or "none"
    return (
        f"{len(plan.quantized)} linear layers quantized, {len(plan.kept)} kept in 16 bit ({kept})\n"
        f"nominal W{plan.nominal_weight_bits}A{plan.nominal_activation_bits}; average over all parameters: "
        f"{plan.average_bits:.2f} bits a weight, {plan.average_activation_bits:.2f} bits an input of a linear\n"
        f"transformer {size / 1e6:.2f} MB, {size / full:.3f} of its 16-bit {full / 1e6:.2f} MB"
    )


def plan_text(plan: Plan, *, engine: str = "", width: int = 80) -> str:
    """The table and the summary as plain text."""
    out = io.StringIO()
    terminal = Terminal(file=out, width=width, force_terminal=False)
    terminal.print(plan_table(plan, width=width))
    terminal.print(plan_summary(plan))
    if engine:
        terminal.print(f"engine: {engine}")
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
