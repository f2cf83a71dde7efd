"""A walk over blocks runs each block on the inputs that it has in the whole model, as changed so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import example_inputs, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.errors import DitqError
from ditq.trace.arguments import leaves
from ditq.trace.blocks import BlockWalk

NAMES = architectures.names()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def deep_model(name: str, layers: int) -> nn.Module:
    if name == "latte-class":  # a spatial and a temporal block make one layer
        return tiny_model(name, depth=2 * layers)
    return tiny_model(name, **{"depth" if name.startswith("stdit") else "num_layers": layers})


def blocks_of(model: nn.Module, name: str) -> list[str]:
    return list(dict.fromkeys(group.block for group in architectures.load(name).groups(model)))


def calls_of(name: str, count: int = 3) -> list[dict[str, Any]]:
    return [
        {**example_inputs(name, seed=i), "timestep": torch.tensor([t, t])}
        for i, t in enumerate((900, 400, 10)[:count])
    ]


@torch.no_grad()
def change(block: nn.Module) -> None:
    for p in block.parameters():
        p.mul_(1.1)


def inputs_seen(model: nn.Module, block: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input tensors of a block when the whole model runs."""
    seen: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
        seen.append({k: v.clone() for k, v in leaves(given).items() if isinstance(v, Tensor)})

    handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for call in calls:
            model(**call, return_dict=False)
    handle.remove()
    return seen


def walked(model: nn.Module, names: list[str], calls: list[dict[str, Any]], unlinked: bool = False) -> dict[str, Any]:
    """Inputs of every block on a walk that changes each one after it ran."""
    walk = BlockWalk(model, names, calls, lambda call: None)
    if unlinked:
        walk._links.clear()
    seen = {}
    for block in walk.order:
        walk.enter(block)
        got: list[Any] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], got: list[Any] = got) -> None:
            got.append({k: v.clone() for k, v in leaves(kwargs).items() if isinstance(v, Tensor)})

        handle = model.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True)
        assert len(list(walk.run())) == len(calls)
        handle.remove()
        seen[block] = got
        change(model.get_submodule(block))
    return seen


def test_blocks_get_their_inputs_in_the_changed_model(name: str) -> None:
    calls = calls_of(name)
    model = deep_model(name, 4)
    names = blocks_of(model, name)
    seen = walked(model, names, calls)
    reference = deep_model(name, 4)
    for block in seen:  # in the order of their calls
        expected = inputs_seen(reference, block, calls)
        for mine, whole in zip(seen[block], expected, strict=True):
            for key in whole.keys() & mine.keys():
                torch.testing.assert_close(mine[key], whole[key], rtol=0, atol=0)
            hidden = next(v for v in whole.values() if v.is_floating_point() and v.ndim == 3)
            assert any(torch.equal(hidden, v) for v in mine.values())
        change(reference.get_submodule(block))


def test_running_the_model_up_to_a_block_returns_the_same(name: str) -> None:
    calls = calls_of(name)
    runs = []
    for unlinked in (False, True):
        model = deep_model(name, 3)
        runs.append(walked(model, blocks_of(model, name), calls, unlinked))
    for block in runs[0]:
        for a, b in zip(runs[0][block], runs[1][block], strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "mochi"])
def test_plain_stacks_are_handed_over_even_behind_folded_norms(name: str) -> None:
    model = deep_model(name, 4)
    names = blocks_of(model, name)
    ditq.quantize(model, "smoothquant-w8a8", statistics=tiny_statistics(model, name))
    walk = BlockWalk(model, names, calls_of(name, 1), lambda call: None)
    whole = [0]
    model.register_forward_pre_hook(lambda *_: whole.__setitem__(0, whole[0] + 1))
    for block in walk.order:
        walk.enter(block)
    assert whole == [1]  # up to the first block, never again


def test_architecture_that_computes_between_blocks_is_run_up_to_each() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, return_dict: bool = True) -> Tensor:
            for block in self.blocks:
                x = block(x) + 1.0
            return x

    model = Between()
    calls = [{"x": torch.randn(2, 4)} for _ in range(2)]
    walk = BlockWalk(model, ["blocks.2", "blocks.0", "blocks.1"], calls, lambda call: None)
    assert walk.order == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.no_grad():
        for i, block in enumerate(walk.order):
            walk.enter(block)
            for call, given in zip(calls, walk._inputs, strict=True):
                x = call["x"]
                for before in model.blocks[:i]:
                    x = before(x) + 1.0
                assert torch.equal(given["input"], x)
            change(model.get_submodule(block))


def test_block_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor, return_dict: bool = True) -> Tensor:
            return self.block(self.block(x))

    with pytest.raises(DitqError, match="calls block 'block' 2 times"):
        BlockWalk(Twice(), ["block"], [{"x": torch.randn(1, 4)}], lambda call: None)
