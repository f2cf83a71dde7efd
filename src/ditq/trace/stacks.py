"""Captures arguments and outputs of the blocks of a stack, and which outputs one block passes to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.trace.arguments import bound, handed_over
from ditq.trace.hooks import all_hooked, hooked

Returns = Literal["tensor", "tuple", "BaseModelOutput"]


@dataclass
class BlockCall:
    """One call of a block: arguments by name, and outputs.

    Attributes:
        arguments: as bound to the block's forward, defaults included.
        outputs: the tensors that the block returned.
        returns: the kind of container of the outputs.
    """

    arguments: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()
    returns: Returns = "tensor"


@dataclass
class StackCall:
    """The calls of all blocks of a stack during one call of the model.

    Attributes:
        blocks: one call per block.
        outside: names (``"0.norm1.emb"``) of modules inside blocks that the model also calls outside of them.
    """

    blocks: list[BlockCall]
    outside: set[str] = field(default_factory=set)

    def chain(self) -> dict[str, int] | None:
        """Maps the arguments of each block to the outputs of the block before it.

        Returns:
            ``{argument leaf: index of the output}``; None if the mapping or another argument differs between blocks.
        """
        pairs = zip(self.blocks, self.blocks[1:], strict=False)
        links = [handed_over(before.arguments, before.outputs, after.arguments) for before, after in pairs]
        if any(not link or link != links[0] for link in links):
            return None
        return links[0] if links else {}


@torch.no_grad()
def capture(model: nn.Module, stack: str, call: Mapping[str, Any]) -> StackCall:
    """Runs ``model`` on a call and records arguments and outputs of the blocks of ``stack``.

    Raises:
        DitqError: a block was not called exactly once, or returned anything but tensors.
    """
    blocks: Any = model.get_submodule(stack)
    calls: dict[int, BlockCall] = {}
    inside = [0]
    outside: set[str] = set()

    def watch(i: int, block: nn.Module) -> Iterator[AbstractContextManager[None]]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i in calls:
                raise DitqError(
                    f"The model calls block {stack}.{i} twice. Only models that call every block once can be exported."
                )
            calls[i] = BlockCall(bound(block, f"Block {stack}.{i}", args, kwargs))
            inside[0] += 1

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inside[0] -= 1
            calls[i].outputs, calls[i].returns = returned(output, f"Block {stack}.{i}")

        yield hooked(block, before, after, first=True)
        for name, module in block.named_modules():
            if name:
                yield hooked(module, _note(outside, f"{i}.{name}", inside))

    with all_hooked(hook for i, block in enumerate(blocks) for hook in watch(i, block)):
        model(**{**call, "return_dict": False})
    missing = [i for i in range(len(blocks)) if i not in calls]
    if missing:
        raise DitqError(f"The model does not call block {stack}.{missing[0]} on the example inputs.")
    # A submodule of a listed module needs no entry of its own.
    outermost = {n for n in outside if not any(n.startswith(f"{other}.") for other in outside)}
    return StackCall([calls[i] for i in range(len(blocks))], outermost)


@torch.no_grad()
def capture_module(module: nn.Module, name: str, run: Callable[[], Any]) -> BlockCall:
    """Captures the first call of a module during ``run``.

    Raises:
        DitqError: the module was not called, or returned anything but tensors.
    """
    calls: list[BlockCall] = []

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not calls:
            calls.append(BlockCall(bound(module, name, args, kwargs), *returned(output, name)))

    with hooked(module, after=after):
        run()
    if not calls:
        raise DitqError(f"{name} was not called on the example inputs.")
    return calls[0]


def returned(output: Any, name: str) -> tuple[tuple[Tensor, ...], Returns]:
    """The tensors that a module returned, and the kind of their container.

    Raises:
        DitqError: the output has anything but tensors.
    """
    returns: Returns = "tensor" if isinstance(output, Tensor) else "tuple"
    if isinstance(output, Mapping):  # of transformers: only with last_hidden_state and nothing else
        returns, output = "BaseModelOutput", tuple(output.values())[: 1 if set(output) == {"last_hidden_state"} else 0]
    outputs = output if isinstance(output, tuple) else (output,)
    if not outputs or not all(isinstance(x, Tensor) for x in outputs):
        raise DitqError(f"{name} does not return tensors only and cannot be exported.")
    return outputs, returns


def _note(outside: set[str], name: str, inside: list[int]) -> Any:
    """A hook that adds ``name`` to ``outside`` if no block is running."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not inside[0]:
            outside.add(name)

    return note
