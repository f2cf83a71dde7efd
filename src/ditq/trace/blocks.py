"""Replays recorded calls block by block, feeding each block the outputs of the already quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.trace.arguments import bound, filled, handed_over, leaves
from ditq.trace.calls import Call
from ditq.trace.hooks import all_hooked, hooked


class _Reached(Exception):  # noqa: N818 - stops a call of the model early, not an error
    pass


class BlockWalk:
    """Walks over blocks in the order the model calls them: ``enter`` a block, ``run`` it, change it, enter the next.

    If only outputs of the block before change between two blocks, those are passed on directly. Otherwise (the first
    block, another kind of block, an architecture that computes between blocks) the model runs up to the block.

    Attributes:
        order: names of the blocks in the order of their calls.

    Raises:
        DitqError: the model does not call one of the blocks exactly once.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], calls: Sequence[Call], prepare: Callable[[Call], None]
    ) -> None:
        """Finds the order of the blocks with one call of the model.

        Args:
            model: the transformer.
            names: of its blocks.
            calls: recorded calls of the model.
            prepare: called before a block runs by itself, to set the state that otherwise the model's call sets.
        """
        self.model, self.calls, self._prepare = model, calls, prepare
        self.order, self._links = _probe(model, names, on_device(calls[0], model))
        self._current: str | None = None
        self._inputs: list[Call] = []

    @torch.no_grad()
    def enter(self, name: str) -> None:
        """Prepares block ``name`` for :meth:`run`; the blocks before it must already be changed."""
        previous, self._current = self._current, name
        link = self._links.get(name)
        if link is not None and previous == self.order[self.order.index(name) - 1]:
            self._inputs = [self._handed_over(previous, i, link) for i in range(len(self.calls))]
            return
        self._inputs = []
        block = self.model.get_submodule(name)

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs.append(_on_cpu(bound(block, name, args, kwargs)))
            raise _Reached

        with hooked(block, stop, first=True):
            for call in self.calls:
                try:
                    self.model(**on_device(call, self.model), return_dict=False)
                except _Reached:
                    continue

    def run(self) -> Iterator[Call]:
        """Runs the block on one call after the other; yields each call of the model before its run."""
        assert self._current is not None
        for i, call in enumerate(self.calls):
            yield call
            with torch.no_grad():
                self._outputs(self._current, i)

    def _outputs(self, name: str, i: int) -> tuple[Tensor, ...]:
        self._prepare(self.calls[i])
        output = self.model.get_submodule(name)(**on_device(self._inputs[i], self.model))
        return output if isinstance(output, tuple) else (output,)

    def _handed_over(self, previous: str, i: int, link: dict[str, int]) -> Call:
        """Inputs of the next block for call ``i``, from the outputs of ``previous``."""
        outputs = self._outputs(previous, i)
        inputs: Call = filled(self._inputs[i], {argument: outputs[j].cpu() for argument, j in link.items()})
        self._inputs[i] = {}  # keeps one set of inputs in memory, not two
        return inputs


@torch.no_grad()
def _probe(model: nn.Module, names: Sequence[str], call: Call) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The order of the blocks, and their links by name: see :func:`ditq.trace.arguments.handed_over`."""
    order: list[str] = []
    arguments: list[Call] = []
    returned: list[tuple[Any, ...]] = []

    def watch(name: str) -> AbstractContextManager[None]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(name)
            arguments.append(bound(block, name, args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            returned.append(output if isinstance(output, tuple) else (output,))

        return hooked(model.get_submodule(name), before, after, first=True)

    with all_hooked(watch(name) for name in names):
        model(**call, return_dict=False)
    if sorted(order) != sorted(names):
        wrong = next(name for name in [*names, *order] if order.count(name) != 1)
        raise DitqError(
            f"The model must call every block once, but it calls block {wrong!r} {order.count(wrong)} times. "
            "It cannot be replayed block by block."
        )
    pairs = zip(order[1:], arguments, returned, arguments[1:], strict=False)
    links = {name: handed_over(before, outputs, after) for name, before, outputs, after in pairs}
    return order, {name: link for name, link in links.items() if link}


def _on_cpu(arguments: Call) -> Call:
    tensors = {name: value for name, value in leaves(arguments).items() if isinstance(value, Tensor)}
    moved: Call = filled(arguments, {name: value.detach().cpu() for name, value in tensors.items()})
    return moved


def on_device(arguments: Call, model: nn.Module) -> Call:
    device = next(model.parameters()).device
    tensors = {name: value for name, value in leaves(arguments).items() if isinstance(value, Tensor)}
    moved: Call = filled(arguments, {name: value.to(device) for name, value in tensors.items()})
    return moved
