"""What a search by sensitivity scores chose, and why: tables for the terminal, and the same facts as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ditq.allocation.search import Chosen, SearchResult
from ditq.report.tables import folded
from ditq.report.terminal import table
from ditq.report.wording import megabytes, number

PARTS = {"w": "weights", "a": "activations"}  # by the first letter of a choice

# Columns of the terminal.
NAME_ROOM = 21  # for a role or block, at most
BITS_ROOM = 20  # for counts of bits, at most
LARGEST_ROOM = 13  # for the layer with the largest error, at least
BETWEEN = 3  # between two columns


@dataclass(frozen=True)
class Row:
    """One role (or block) in one part and timestep segment.

    Attributes:
        name: of the role or block.
        segment: the timesteps, e.g. ``t > 500``; empty if the bits do not change with them.
        bits: how many layers (or roles, blocks) got each choice, the most bits first.
        weights: share of the searched weights, from 0 to 1.
        error: share of the expected error of the part, over all rows and segments, from 0 to 1.
        largest: what contributes the largest error.
    """

    name: str
    segment: str
    bits: dict[str, int]
    weights: float
    error: float
    largest: Chosen

    @property
    def text(self) -> str:
        """``6 x W4, 2 x W3``, or ``W4`` if there is nothing to count."""
        if sum(self.bits.values()) == 1:
            return next(iter(self.bits)).upper()
        return ", ".join(f"{count} x {choice.upper()}" for choice, count in self.bits.items())


def by_part(result: SearchResult) -> dict[str, list[Chosen]]:
    """The choices of weights and of activations."""
    parts: dict[str, list[Chosen]] = {}
    for one in result.chosen:
        parts.setdefault(PARTS[one.choice[0]], []).append(one)
    return parts


def is_by_role(chosen: Sequence[Chosen]) -> bool:
    """Whether the rows are roles: every layer (or role) that was chosen for has one. Blocks have several."""
    return all(len(one.roles) == 1 for one in chosen)


def rows(chosen: Sequence[Chosen]) -> list[Row]:
    """The rows of one part, in the order of the model: by role, or by block, and within it by segment.

    Args:
        chosen: of one part.
    """
    by_role = is_by_role(chosen)
    groups: dict[str, dict[str, list[Chosen]]] = {}
    for one in chosen:
        name = one.roles[0] if by_role else _plain(one)
        groups.setdefault(name, {}).setdefault(one.segment, []).append(one)
    error = sum(one.error for one in chosen)
    result = []
    for name, segments in groups.items():
        for segment, members in segments.items():
            weights = sum(one.parameters for one in chosen if one.segment == segment)
            choices = sorted((one.choice for one in members), key=lambda choice: -int(choice[1:]))
            result.append(
                Row(
                    name, segment, {choice: choices.count(choice) for choice in choices},
                    sum(one.parameters for one in members) / weights,
                    sum(one.error for one in members) / error if error > 0 else 0.0,
                    max(members, key=lambda one: one.error),
                )
            )  # fmt: skip
    return result


def tables(result: SearchResult, width: int = 80) -> list[Table]:
    """A table of weights and one of activations, for each transformer.

    Args:
        result: of a search by scores.
        width: columns of the terminal.
    """
    several = bool(result.others)
    return [
        _table(f"{one.component}, {part}" if several else part, chosen, width)
        for one in (result, *result.others)
        for part, chosen in by_part(one).items()
    ]


def _table(title: str, chosen: Sequence[Chosen], width: int) -> Table:
    listed = rows(chosen)
    kind = "role" if is_by_role(chosen) else "block"
    caption = "error: share of the expected error of the output"
    result = table(title=f"{title}: bits by {kind}", caption=caption, min_width=len(caption))
    segments = any(row.segment for row in listed)
    single = all(sum(row.bits.values()) == 1 for row in listed)
    head = f"{kind}, timesteps" if segments else kind
    bits = [_wrapped(row.text) for row in listed]
    names = [folded(row.name, NAME_ROOM) for row in listed]
    first = [f"  {row.segment}" if segments else name for row, name in zip(listed, names, strict=True)]
    widths = [_widest([head, *names, *first]), _widest(bits), len("weights"), len("100.0 %")]
    room = max(LARGEST_ROOM, width - sum(widths) - BETWEEN * len(widths))
    for column in (head, "bits"):
        result.add_column(column, no_wrap=True)
    for column in ("weights", "error"):
        result.add_column(column, justify="right", no_wrap=True)
    if not single:
        result.add_column("largest error")
    last = ""
    for row, name, cell, text in zip(listed, names, first, bits, strict=True):
        if segments and name != last:
            result.add_row(name)
        shares = (f"{number(100 * share, 1)} %" for share in (row.weights, row.error))
        result.add_row(cell, text, *shares, *([] if single else [folded(_plain(row.largest), room)]))
        last = name
    return result


def _widest(texts: Sequence[str]) -> int:
    return max(len(line) for text in texts for line in text.splitlines())


def _wrapped(text: str) -> str:
    """Counts of bits in lines, broken after a comma."""
    return textwrap.fill(text.replace(" x ", "\0x\0"), BITS_ROOM).replace("\0", " ")


def _plain(one: Chosen) -> str:
    """The name of the layer, block or role, without its segment."""
    return one.gene.removesuffix(f", {one.segment}") if one.segment else one.gene


def lines(result: SearchResult) -> list[str]:
    """Sizes, average bits and errors of every transformer, then the notes about scores and budgets, once."""
    out = []
    for one in (result, *result.others):
        head = f"{one.component}: " if result.others else ""
        size, full = one.plan.memory()
        weights, activations = one.costs["weights"], one.costs["activations"]
        out += [
            f"{head}{megabytes(size)}, {size / full:.3f} of the 16-bit {megabytes(full)}; strategy: {one.strategy}",
            f"{weights:.2f} bits a weight and {activations:.2f} bits an input in the blocks; in the whole transformer "
            f"{one.plan.average_bits:.2f} and {one.plan.average_activation_bits:.2f}",
            f"{one.fitness_name} {number(one.fitness, 2)} on the prompts of the search",
        ]
    return [*out, *result.notes]


def allocation_json(result: SearchResult) -> dict[str, Any]:
    """The facts of the tables and lines about one transformer, for ``ditq search --json``.

    Returns:
        Sizes and average bits of the whole transformer by the names of ``ditq inspect --json``; ``block_bits``: those
        of the searched layers; ``notes``; ``choices``: by part, the rows of the tables, and every single choice.
    """
    size, full = result.plan.memory()
    return {
        "transformer_bytes": size, "transformer_bytes_16bit": full, "average_bits": result.plan.average_bits,
        "average_activation_bits": result.plan.average_activation_bits,
        "block_bits": {"weights": result.costs["weights"], "activations": result.costs["activations"]},
        "notes": list(result.notes),
        "choices": {
            part: {
                "by": "role" if is_by_role(chosen) else "block",
                "rows": [_row_json(row) for row in rows(chosen)],
                "genes": [_gene_json(one) for one in chosen],
            }
            for part, chosen in by_part(result).items()
        },
    }  # fmt: skip


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name, "timesteps": row.segment or None,
        "bits": {choice[1:]: count for choice, count in row.bits.items()},
        "share_of_weights": row.weights, "share_of_error": row.error, "largest_error": _plain(row.largest),
    }  # fmt: skip


def _gene_json(one: Chosen) -> dict[str, Any]:
    return {
        "name": _plain(one), "timesteps": one.segment or None, "bits": int(one.choice[1:]), "error": one.error,
        "error_at_fewest_bits": one.cheapest, "parameters": one.parameters,
    }  # fmt: skip
