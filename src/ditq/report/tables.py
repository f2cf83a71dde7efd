"""Plans and comparisons as tables, and as the stable JSON that scripts rely on."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from ditq.plan import LayerPlan, Plan


def plan_json(plan: Plan, transformer_bytes: int) -> dict[str, Any]:
    """The JSON of ``ditq inspect --json``; ``transformer_bytes`` is what the files really take."""
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
        "balance": layer.balance,
        "rounding": layer.rounding if layer.weight else None,
        "rounding_gain": layer.rounding_gain,
        "incoherence": layer.incoherence.model_dump() if layer.incoherence else None,
        "reason": layer.reason,
    }


def plan_table(plan: Plan, *, full: bool = True) -> Table:
    """One row a layer; ``full=False`` merges the blocks and shows one row for each role."""
    table = Table(title=f"{plan.recipe} on {plan.architecture}", title_justify="left")
    for column in ("layer" if full else "role", "weights", "activations", "balance", "incoherence of W, X", "reason"):
        table.add_column(column, overflow="fold")
    if full:
        for layer in plan:
            table.add_row(layer.name, *_cells(layer))
        return table
    by_role: dict[str, list[LayerPlan]] = {}
    for layer in plan:
        by_role.setdefault(layer.role, []).append(layer)
    for role, layers in by_role.items():
        balances = [x.balance.split(" ")[0] + ("+rotate" if x.smooth and x.rotate else "") for x in layers]
        counts = ", ".join(f"{balances.count(b)} {b}" for b in dict.fromkeys(balances)) if layers[0].weight else ""
        weights, activations = (_counted([_cells(layer)[i] for layer in layers]) for i in (0, 1))
        reason = _cells(layers[0])[4]
        table.add_row(f"{role} ({len(layers)})", weights, activations, counts, _mean_incoherence(layers), reason)
    return table


def _counted(texts: list[str]) -> str:
    """One text if all are equal, else each with how often it is there."""
    distinct = sorted(set(texts))
    return distinct[0] if len(distinct) == 1 else "\n".join(f"{texts.count(text)} {text}" for text in distinct)


def _cells(layer: LayerPlan) -> tuple[str, str, str, str, str]:
    if layer.weight is None:
        return "16 bit", "16 bit", "", "", layer.reason
    return (
        str(layer.weight).removesuffix(", static") + (", GPTQ" if layer.rounding == "gptq" else ""),
        str(layer.activation or "16 bit"),
        layer.balance,
        _mean_incoherence([layer]),
        layer.reason,
    )


def _mean_incoherence(layers: list[LayerPlan]) -> str:
    found = [x.incoherence for x in layers if x.incoherence]
    if not found:
        return ""

    def mean(field: str) -> float | None:
        values = [value for x in found if (value := getattr(x, field)) is not None]
        return sum(values) / len(values) if values else None

    text = f"{mean('weight_before'):.1f}→{mean('weight_after'):.1f}"
    before, after = mean("input_before"), mean("input_after")
    return text if before is None else f"{text}, {before:.1f}→{after:.1f}"


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


def plan_text(plan: Plan, *, engine: str = "", full: bool = False, width: int = 140) -> str:
    """Table and summary as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(plan_table(plan, full=full))
    console.print(plan_summary(plan), highlight=False, markup=False)
    if engine:
        console.print(f"engine: {engine}", highlight=False, markup=False)
    return out.getvalue()
