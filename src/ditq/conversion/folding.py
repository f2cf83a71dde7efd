"""Folds a static scale 1/s into the producer of an input, where that is exact.

Quantized layers divide by their smoothing scale themselves, while they quantize the input. This takes no measurable
time, and adapters, offloading and casts see a model of the usual structure. Folds are in checkpoints of ditq 0.1;
:func:`prepare` rebuilds them. A fold is also what an architecture file claims about the producer of an input: its
tests fold random scales to check the claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures.architecture import Architecture, InputGroup, present
from ditq.errors import UsageError
from ditq.layers.folded import fold_argument, unfold_argument
from ditq.plan import MODULATION, Fold

BUFFER = MODULATION


@torch.no_grad()
def fold(model: nn.Module, architecture: Architecture, group: InputGroup, scale: Tensor) -> Fold | None:
    """Divides the input of ``group`` by ``scale`` [K] at its producer; the consumers' weights are not changed.

    ``norm``: divides the norm's weight and bias, and the shift rows of its modulation. The (1 + scale) factor is not
    changed: (1 + scale) / s - 1 cancels in 16 bit if s is large.
    ``v``, ``glu``: divides the rows of the value projections, or of the half that is not activated.

    Returns:
        The change of structure that a loader must rebuild before it loads weights; None for ``v`` and ``glu``, which
        change weights only.
    """
    source = group.input
    width = len(scale)
    block: Any = model.get_submodule(group.block)
    for path in source.carriers:
        if present(block, path):
            linear: Any = block.get_submodule(path)
            linear.weight[:width].div_(scale[:, None].to(linear.weight.dtype))
            if linear.bias is not None:
                linear.bias[:width].div_(scale.to(linear.bias.dtype))
    if source.carriers:
        return None
    if source.norm is None:
        raise UsageError(f"The input of {group.name!r} has no producer that could carry a scale.")
    created = getattr(model.get_submodule(f"{group.block}.{source.norm}"), "weight", None) is None
    record = Fold(
        norm=f"{group.block}.{source.norm}",
        created=created,
        width=width,
        block=group.block if source.argument else None,
        argument=source.argument,
        chunks=source.chunks,
    )
    prepare(model, record)
    norm: Any = model.get_submodule(record.norm)
    norm.weight.div_(scale.to(norm.weight))
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale.to(norm.bias))
    for chunk in source.shift:
        rows = slice(chunk * width, (chunk + 1) * width)
        if source.linear:
            modulation: Any = model.get_submodule(f"{group.block}.{source.linear}")
            modulation.weight[rows].div_(scale[:, None].to(modulation.weight.dtype))
            if modulation.bias is not None:
                modulation.bias[rows].div_(scale.to(modulation.bias.dtype))
        elif source.argument:
            if architecture.table:
                table = getattr(block, architecture.table)
                table.view(source.chunks, width)[chunk].div_(scale.to(table.dtype))
            getattr(block, BUFFER)[rows].div_(scale)
    return record


@torch.no_grad()
def unfold(model: nn.Module, architecture: Architecture, folds: Iterable[Fold]) -> None:
    """Undoes norm folds, so that the model has the plain structure of its class again.

    The consumers must be plain linears already; their columns are divided by s. Norms that had a weight before folding
    keep their changed values, which the plain class can store.
    """
    groups = {f"{g.block}.{g.input.norm}": g for g in architecture.groups(model) if g.input.norm}
    folds = list(folds)
    for record in folds:
        if not record.created and record.argument is None:
            continue
        group = groups[record.norm]
        norm: Any = model.get_submodule(record.norm)
        scale = 1 / norm.weight.float()
        fold(model, architecture, group, 1 / scale)
        for linear in group.linears:
            linear.module.weight.div_(scale.to(linear.module.weight.dtype))
        norm.weight = None
    for name in {record.block for record in folds if record.block}:
        unfold_argument(model.get_submodule(name))


def prepare(model: nn.Module, record: Fold) -> None:
    """Adds a weight to a norm, and the factor of the shared modulation to a block, if they do not have one yet.

    Called before folding, and by the loader before weights are loaded (then on the meta device).

    Raises:
        UsageError: the model does not have this norm or block, or the module is not a norm that can carry a weight.
    """
    try:
        norm: Any = model.get_submodule(record.norm)
        block: Any = model.get_submodule(record.block) if record.block else None
    except AttributeError as error:
        raise UsageError(f"The plan folds into {record.norm!r}, which this model does not have.") from error
    if not hasattr(norm, "eps"):
        raise UsageError(f"{record.norm!r} is a {type(norm).__name__}, not a norm that could carry a weight.")
    reference = next(model.parameters())
    if getattr(norm, "weight", None) is None:
        norm.weight = nn.Parameter(
            torch.ones(record.width, dtype=reference.dtype, device=reference.device), requires_grad=False
        )
    if block is not None:
        if record.argument is None:
            raise UsageError(f"The plan folds into block {record.block!r}, but names no argument of it.")
        fold_argument(block, record.argument, record.chunks * record.width, reference.device)
