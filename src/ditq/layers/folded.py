"""Blocks of checkpoints that ditq 0.1 saved, whose modulation argument is multiplied by a factor of the block.

ditq 0.1 moved smoothing scales 1/s into the norm before a layer. Where the shift of that norm comes from an argument
that all blocks share, each block held a factor for it. Layers divide by s themselves now; these blocks only keep old
checkpoints computing what they computed.

The factor is applied inside of ``forward``: hooks that offload, move or cast a module wrap its forward, so that the
argument and the factor are on one device by then.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ditq.errors import UsageError
from ditq.plan import MODULATION


class FoldedBlock(nn.Module):
    """Mixed into the class of a block by :func:`fold_argument`."""

    plain: type[nn.Module]
    argument: str

    def scaled(self, value: Tensor) -> Tensor:
        """The argument [..., chunks * width] or [..., chunks, width] times the block's factor."""
        factor = cast(Tensor, self._buffers[MODULATION])
        if value.shape[-1] != factor.numel():
            factor = factor.view(value.shape[-2:])
        return value * factor.to(value.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        factor = self._buffers[MODULATION]
        super()._apply(fn, recurse)
        moved = self._buffers[MODULATION]
        if factor is not None and moved is not None and moved.dtype != factor.dtype:
            self._buffers[MODULATION] = factor.to(moved.device)  # it stays float32, as the scales of layers do
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.plain, self.argument), self.__dict__


def fold_argument(block: nn.Module, argument: str, numbers: int, device: torch.device) -> None:
    """Gives ``block`` a factor of ``numbers`` ones, by which it multiplies ``argument`` of its forward."""
    if isinstance(block, FoldedBlock):
        if block.argument != argument:
            raise UsageError(f"The plan folds into two arguments of a block: {block.argument!r} and {argument!r}.")
        return
    object.__setattr__(block, "__class__", _folded_class(cast(Any, type(block)), argument))
    block.register_buffer(MODULATION, torch.ones(numbers, device=device))


def unfold_argument(block: nn.Module) -> None:
    """Gives the block its own class again."""
    if isinstance(block, FoldedBlock):
        del block._buffers[MODULATION]
        object.__setattr__(block, "__class__", block.plain)


@functools.cache
def _folded_class(kind: Any, argument: str) -> type[FoldedBlock]:
    plain_forward: Callable[..., Any] = kind.forward
    parameters = list(inspect.signature(plain_forward).parameters)[1:]
    if argument not in parameters:
        raise UsageError(f"The plan folds into argument {argument!r}, which {kind.__name__} does not have.")
    position = parameters.index(argument)

    @functools.wraps(plain_forward)
    def forward(self: FoldedBlock, *args: Any, **kwargs: Any) -> Any:
        if argument in kwargs:
            kwargs[argument] = self.scaled(kwargs[argument])
        else:
            args = (*args[:position], self.scaled(args[position]), *args[position + 1 :])
        return plain_forward(self, *args, **kwargs)

    # Under the name of the plain class, by which diffusers decides what stays on one device.
    members = {"forward": forward, "plain": kind, "argument": argument, "__module__": kind.__module__}
    return cast(type[FoldedBlock], type(kind.__name__, (FoldedBlock, kind), members))


def _rebuild(kind: Any, argument: str) -> FoldedBlock:
    folded = _folded_class(kind, argument)
    return folded.__new__(folded)
