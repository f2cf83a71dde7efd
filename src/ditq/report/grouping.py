"""Groups equal layers of equal blocks into one row, so that the plan of a deep transformer fits on one screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ditq.plan import LayerPlan

By = Literal["blocks", "layers", "roles"]
Treatment = tuple[object, ...]


@dataclass(frozen=True)
class Row:
    """Layers that are treated alike, except for the smoothing strength.

    Attributes:
        label: their name within a block, their full name, or their role.
        blocks: indices of the blocks that contain the layers; empty outside of a stack.
        total: the number of blocks in the stack.
    """

    label: str
    layers: tuple[LayerPlan, ...]
    blocks: frozenset[int] = frozenset()
    total: int = 0


@dataclass(frozen=True)
class Section:
    """Rows under one heading: a stack with its blocks, ``transformer_blocks.0-27``, or "" for layers outside."""

    title: str
    rows: tuple[Row, ...]


def sections(layers: Iterable[LayerPlan], by: By = "blocks") -> list[Section]:
    """The rows of the table, in the order of the layers. By ``layers`` or ``roles`` there is one section."""
    if by == "layers":
        return [Section("", tuple(Row(layer.name, (layer,)) for layer in layers))]
    if by == "roles":
        split = _split([(layer.role, layer) for layer in layers])
        return [Section("", _ordered([Row(label, tuple(members)) for (label, _), members in split.items()]))]
    stacks: list[tuple[str, list[tuple[int, str, LayerPlan]]]] = []
    for layer in layers:
        stack, index, inner = within_block(layer.name)
        members = next((members for name, members in stacks if name == stack), None) if stack else None
        if members is None and not stack and stacks and not stacks[-1][0]:
            members = stacks[-1][1]
        if members is None:
            stacks.append((stack, members := []))
        members.append((index, inner, layer))
    return [_of_stack(stack, members) for stack, members in stacks]


def within_block(name: str) -> tuple[str, int, str]:
    """Splits a name into stack, block index and the name within the block.

    ``("transformer_blocks", 3, "ff.net.0.proj")``, or ``("", 0, name)`` for a layer outside of blocks.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[1:-1], 1):
        if part.isdecimal():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", 0, name


def ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers as ascending runs: ``["0-3", "7"]``."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return [str(a) if a == b else f"{a}-{b}" for a, b in runs]


def _of_stack(stack: str, members: list[tuple[int, str, LayerPlan]]) -> Section:
    if not stack:
        return Section("", tuple(Row(layer.name, (layer,)) for _, _, layer in members))
    blocks = {index for index, *_ in members}
    rows = []
    for (inner, _), layers in _split([(inner, layer) for _, inner, layer in members]).items():
        row_blocks = frozenset(within_block(layer.name)[1] for layer in layers)
        rows.append(Row(inner, tuple(layers), row_blocks, len(blocks)))
    return Section(f"{stack}.{', '.join(ranges(blocks))}", _ordered(rows))


def _ordered(rows: list[Row]) -> tuple[Row, ...]:
    """Puts rows with the same label together, in the order in which the labels first appear."""
    first = {label: i for i, label in enumerate(dict.fromkeys(row.label for row in rows))}
    return tuple(sorted(rows, key=lambda row: first[row.label]))


def _split(labelled: list[tuple[str, LayerPlan]]) -> dict[tuple[str, Treatment], list[LayerPlan]]:
    """Groups (label, layer) pairs by label and treatment."""
    groups: dict[tuple[str, Treatment], list[LayerPlan]] = {}
    for label, layer in labelled:
        groups.setdefault((label, _treatment(layer)), []).append(layer)
    return groups


def _treatment(layer: LayerPlan) -> Treatment:
    smooth = layer.smooth and layer.smooth.model_copy(update={"alpha": 0.0})
    rotate = layer.rotate and layer.rotate.model_copy(update={"seed": 0})
    formats = (layer.weight, layer.activation, layer.timesteps, layer.range_weights, layer.steps, layer.branch)
    return (layer.role, *formats, smooth, rotate, layer.rounding, layer.reason)
