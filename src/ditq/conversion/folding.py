"""Folds a static smoothing scale 1/s into the producer of an input, where that is exact."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ditq.architectures.architecture import Architecture, InputGroup, present
from ditq.errors import UsageError
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
        model.get_submodule(name)._buffers.pop(BUFFER, None)


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
    if block is not None and BUFFER not in block._buffers:
        block.register_buffer(BUFFER, torch.ones(record.chunks * record.width, device=reference.device))
        assert record.argument is not None
        _scale_argument(block, record.argument)


def _scale_argument(block: nn.Module, argument: str) -> None:
    """Multiplies one argument [..., chunks * width] or [..., chunks, width] of a block's forward by its factor."""
    parameters = list(inspect.signature(block.forward).parameters)
    if argument not in parameters:
        raise UsageError(f"The plan folds into argument {argument!r}, which {type(block).__name__} does not have.")
    position = parameters.index(argument)

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        factor = module._buffers.get(BUFFER)
        if factor is None:  # unfolded in the meantime
            return args, kwargs
        value = kwargs[argument] if argument in kwargs else args[position]
        if value.shape[-1] != factor.numel():
            factor = factor.view(value.shape[-2:])
        value = value * factor.to(value.dtype)
        if argument in kwargs:
            return args, {**kwargs, argument: value}
        return (*args[:position], value, *args[position + 1 :]), kwargs

    block.register_forward_pre_hook(scale, with_kwargs=True)
