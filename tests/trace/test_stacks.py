"""Arguments and outputs of blocks, and whether the blocks are a plain chain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import example_inputs, tiny_model
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.trace.arguments import filled, handed_over, leaves, parameters
from ditq.trace.stacks import capture


class Block(nn.Module):
    """Two streams, and an argument with tensors inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor], scale: float = 2.0
    ) -> tuple[Tensor, Tensor]:
        return text + 1, self.inner(x) * scale * rotary[0] + rotary[1]


class Model(nn.Module):
    """``between`` is what happens to x from one block to the next."""

    def __init__(self, between: Any = lambda x: x, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.between = between

    def forward(self, x: Tensor, text: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        rotary = (torch.ones(4), torch.zeros(4))
        for block in self.blocks:
            text, x = block(self.between(x), text=text, rotary=rotary)
        self.blocks[0].inner(x)
        return (x,)


CALL = {"x": torch.randn(2, 3, 4), "text": torch.randn(2, 4)}


def test_a_chain_with_two_streams() -> None:
    stack = capture(Model(), "blocks", CALL)
    assert stack.chain() == {"x": 1, "text": 0}
    first = stack.blocks[0]
    assert list(leaves(first.arguments)) == ["x", "text", "rotary.0", "rotary.1", "scale"]
    assert first.arguments["x"] is CALL["x"]
    assert (len(first.outputs), first.returns) == (2, "tuple")


def test_modules_that_the_model_calls_itself_are_noted() -> None:
    assert capture(Model(), "blocks", CALL).outside == {"0.inner"}
    assert capture(tiny_model("dit"), "transformer_blocks", example_inputs("dit")).outside == {"0.norm1.emb"}
    assert capture(tiny_model("pixart"), "transformer_blocks", example_inputs("pixart")).outside == set()


def test_what_is_done_between_blocks_breaks_the_chain() -> None:
    assert capture(Model(lambda x: x * 2), "blocks", CALL).chain() is None


def test_arguments_that_differ_between_blocks_break_the_chain() -> None:
    model = Model()
    model.blocks[1].register_forward_pre_hook(lambda m, a, k: (a, {**k, "scale": 3.0}), with_kwargs=True, prepend=True)
    assert capture(model, "blocks", CALL).chain() == {"x": 1, "text": 0}  # a hook of the block belongs to it

    class Uneven(Model):
        def forward(self, x: Tensor, text: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            for i, block in enumerate(self.blocks):
                text, x = block(x, text, (torch.ones(4), torch.zeros(4)), scale=float(i))
            return (x,)

    assert capture(Uneven(), "blocks", CALL).chain() is None


def test_a_single_block_is_a_chain() -> None:
    assert capture(Model(blocks=1), "blocks", CALL).chain() == {}


def test_hooks_go_away() -> None:
    model = Model()
    capture(model, "blocks", CALL)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_blocks_called_twice_or_never_are_refused() -> None:
    class Twice(Model):
        def forward(self, x: Tensor, text: Tensor, return_dict: bool = True) -> None:
            for _ in range(2):
                self.blocks[0](x, text, (torch.ones(4), torch.zeros(4)))

    class Never(Model):
        def forward(self, x: Tensor, text: Tensor, return_dict: bool = True) -> None:
            self.blocks[0](x, text, (torch.ones(4), torch.zeros(4)))

    for kind, message in ((Twice, "blocks.0 twice"), (Never, "does not call block blocks.1")):
        model = kind()
        with pytest.raises(DitqError, match=message):
            capture(model, "blocks", CALL)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_outputs_that_are_no_tensors_are_refused() -> None:
    class Wordy(Block):
        def forward(self, x: Tensor, text: Tensor, rotary: Any) -> Any:
            return x, "done"

    model = Model()
    model.blocks[2] = Wordy()
    with pytest.raises(DitqError, match=r"Block blocks\.2 does not return tensors only"):
        capture(model, "blocks", CALL)


def test_variadic_arguments() -> None:
    class Loose(Block):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x, *args, **kwargs)

    model = Model()
    for i in range(3):
        model.blocks[i] = Loose()
    stack = capture(model, "blocks", CALL)
    assert parameters(model.blocks[0]) == ("x",)
    assert list(stack.blocks[0].arguments) == ["x", "text", "rotary"]
    assert stack.chain() == {"x": 1, "text": 0}

    class Positional(Model):
        def forward(self, x: Tensor, text: Tensor, return_dict: bool = True) -> None:
            self.blocks[0](x, text, (torch.ones(4), torch.zeros(4)))

    model = Positional()
    model.blocks[0] = Loose()
    with pytest.raises(DitqError, match="arguments that have no name"):
        capture(model, "blocks", CALL)


def test_leaves_and_filled_are_inverse() -> None:
    value = {"a": 1, "b": (2, [3, None]), "c": {"d": 4}}
    assert leaves(value) == {"a": 1, "b.0": 2, "b.1.0": 3, "b.1.1": None, "c.d": 4}
    assert filled(value, {"b.1.0": 30, "c.d": 40}) == {"a": 1, "b": (2, [30, None]), "c": {"d": 40}}


def test_outputs_that_become_arguments() -> None:
    x, y, shared = torch.ones(1), torch.zeros(1), torch.ones(2)
    before = {"x": torch.ones(1), "text": torch.ones(1), "rotary": (shared, 2)}
    assert handed_over(before, (y, x), {"x": x, "text": y, "rotary": (shared, 2)}) == {"x": 1, "text": 0}
    assert handed_over(before, (y, x), {"x": x, "text": y, "rotary": (shared, 3)}) == {}  # another value differs
    assert handed_over(before, (y, x), {"x": x, "text": y, "rotary": (shared.clone(), 2)}) == {}  # another tensor
    assert handed_over(before, (y, x), {"x": x, "text": y}) == {}
    assert handed_over(before, (), before) == {}
