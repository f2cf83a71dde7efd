"""Arguments and outputs of the blocks of a stack: what all share, and what one block hands to the next."""

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
        returns: the kind of container that held them.
    """

    arguments: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()
    returns: Returns = "tensor"


@dataclass
class StackCall:
    """The calls of all blocks of a stack during one call of the model.

    Attributes:
        outside: names (``"0.norm1.emb"``) of modules inside blocks that the model itself calls too.
    """

    blocks: list[BlockCall]
    outside: set[str] = field(default_factory=set)

    def chain(self) -> dict[str, int] | None:
        """Which output of a block becomes which argument of the next, where nothing else differs between blocks.

        Returns:
            ``{argument leaf: number of the output}``; None if the model does more between two blocks than that.
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
        DitqError: a block was not called exactly once, or returned something else than tensors.
    """
    blocks: Any = model.get_submodule(stack)
    calls: dict[int, BlockCall] = {}
    inside = [0]
    outside: set[str] = set()

    def watch(i: int, block: nn.Module) -> Iterator[AbstractContextManager[None]]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i in calls:
                raise DitqError(
                    f"The model calls block {stack}.{i} twice; only plain stacks of blocks can be exported."
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
    # A module that is called inside another one comes with it.
    top = {n for n in outside if not any(n.startswith(f"{other}.") for other in outside)}
    return StackCall([calls[i] for i in range(len(blocks))], top)


@torch.no_grad()
def capture_module(module: nn.Module, name: str, run: Callable[[], Any]) -> BlockCall:
    """The first call of a module while ``run`` runs.

    Raises:
        DitqError: there was none, or it returned something else than tensors.
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
    """The tensors that a module returned, and the kind of container.

    Raises:
        DitqError: something else is among them.
    """
    returns: Returns = "tensor" if isinstance(output, Tensor) else "tuple"
    if isinstance(output, Mapping):  # of transformers' outputs only those with nothing but the last states
        returns, output = "BaseModelOutput", tuple(output.values())[: 1 if set(output) == {"last_hidden_state"} else 0]
    outputs = output if isinstance(output, tuple) else (output,)
    if not outputs or not all(isinstance(x, Tensor) for x in outputs):
        raise DitqError(f"{name} returns something else than tensors and cannot be exported.")
    return outputs, returns


def _note(outside: set[str], name: str, inside: list[int]) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not inside[0]:
            outside.add(name)

    return note
