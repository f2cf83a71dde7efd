"""Hooks that last as long as a with block: their order, their removal, and what they may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditq.trace.hooks import all_hooked, hooked


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if scale < 0:
            raise ValueError("negative")
        return x * scale


def hooks_of(*modules: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)


def test_both_hooks_see_the_call_and_go_away() -> None:
    module, calls = Scaled(), []
    x = torch.ones(2)
    with hooked(module, lambda m, a, k: calls.append((a, k)), lambda m, a, k, out: calls.append((a, k, out))):
        y = module(x, scale=3.0)
    assert calls == [((x,), {"scale": 3.0}), ((x,), {"scale": 3.0}, y)]
    assert hooks_of(module) == 0
    module(x)
    assert len(calls) == 2


def test_a_hook_before_the_call_may_change_its_arguments() -> None:
    module = Scaled()
    with hooked(module, lambda m, args, kwargs: ((args[0] + 1,), {"scale": 2.0})):
        assert module(torch.ones(1)).item() == 4.0


@pytest.mark.parametrize(("first", "order"), [(True, ["new", "own"]), (False, ["own", "new"])])
def test_first_runs_ahead_of_hooks_that_are_there(first: bool, order: list[str]) -> None:
    module, calls = Scaled(), []
    module.register_forward_pre_hook(lambda m, a: calls.append("own"))
    with hooked(module, lambda m, a, k: calls.append("new"), first=first):
        module(torch.ones(1))
    assert calls == order
    assert hooks_of(module) == 1


@pytest.mark.parametrize("always", [True, False])
def test_a_call_that_fails(always: bool) -> None:
    module, calls = Scaled(), []
    with (
        pytest.raises(ValueError, match="negative"),
        hooked(module, after=lambda m, a, k, out: calls.append(out), always=always),
    ):
        module(torch.ones(1), scale=-1.0)
    assert calls == ([None] if always else [])
    assert hooks_of(module) == 0


def test_many_modules_and_a_failure_half_way() -> None:
    modules, calls = [Scaled() for _ in range(3)], []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(modules.index(module))

    with all_hooked(hooked(module, note) for module in modules):
        assert hooks_of(*modules) == 3
        for module in modules[::-1]:
            module(torch.ones(1))
    assert calls == [2, 1, 0]
    assert hooks_of(*modules) == 0
    with pytest.raises(AttributeError), all_hooked(hooked(module, note) for module in [*modules, None]):  # type: ignore[list-item]
        pass
    assert hooks_of(*modules) == 0
