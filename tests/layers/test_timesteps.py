"""TimestepLinear: the layer of the range the clock is in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import layer_plan
from torch import Tensor, nn

from ditq.errors import UsageError
from ditq.layers import Clock, QuantizedLinear, TimestepLinear

RANGES = ((700, 999), (300, 600), (0, 299))


class Model(nn.Module):
    """One timestep-aware layer; range i returns i + 1 in every output."""

    def __init__(self) -> None:
        super().__init__()
        plan = layer_plan(timesteps=RANGES)
        clock = Clock()
        layers = []
        for i in range(len(RANGES)):
            linear = nn.Linear(32, 24)
            with torch.no_grad():
                linear.weight.zero_()
                linear.bias.fill_(i + 1)
            layers.append(QuantizedLinear.from_linear(linear, plan.model_copy(update={"timesteps": None})))
        self.layer = TimestepLinear(plan, layers, clock)
        clock.attach(self, "timestep")

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("timestep", "chosen"),
    [(999, 1), (700, 1), (600, 2), (300, 2), (299, 3), (0, 3), (640, 2), (670, 1), (299.4, 3), (5000, 1), (-1, 3)],
)
def test_range_is_the_one_of_the_timestep_or_the_nearest(timestep: float, chosen: int) -> None:
    model = Model()
    for value in (timestep, torch.tensor(timestep), torch.full((2,), timestep)):
        assert bool((model(torch.randn(2, 32), timestep=value) == chosen).all())


def test_weight_shown_is_that_of_the_current_range() -> None:
    model = Model()
    model(torch.zeros(1, 32), timestep=800)
    assert model.layer.current() is model.layer.ranges[0]
    model(torch.zeros(1, 32), timestep=10)
    assert torch.equal(model.layer.weight, model.layer.ranges[2].weight)


def test_timestep_may_be_positional() -> None:
    assert bool((Model()(torch.zeros(1, 32), 800) == 1).all())


def test_missing_timestep_is_named() -> None:
    with pytest.raises(ValueError, match="Model was called without its argument 'timestep'"):
        Model()(torch.zeros(1, 32), timestep=None)


def test_copy_has_its_own_clock() -> None:
    model = Model()
    twin = copy.deepcopy(model)
    model(torch.zeros(1, 32), timestep=800)
    assert bool((twin(torch.zeros(1, 32), timestep=10) == 3).all())
    assert model.layer.current() is model.layer.ranges[0]


def test_repr_and_dequantize() -> None:
    layer = Model().layer
    assert "(300, 600)" in repr(layer)
    assert type(layer.dequantize()) is nn.Linear


def test_memory_is_that_of_all_ranges() -> None:
    model = Model().to(torch.bfloat16)
    held = sum(t.numel() * t.element_size() for t in [*model.buffers(), *model.parameters()])
    assert held == model.layer.plan.stored_bytes()


def test_samples_of_several_timesteps_use_their_own_ranges() -> None:
    model, x = Model(), torch.randn(4, 5, 32)
    y = model(x, timestep=torch.tensor([999, 10, 10, 400]))
    assert y[:, 0, 0].tolist() == [1, 3, 3, 2]
    tokens = model(x, timestep=torch.tensor([[999, 10, 10, 400, 0]]).expand(4, 5))  # one for each token
    assert tokens[2, :, 0].tolist() == [1, 3, 3, 2, 3]


def test_timesteps_that_no_axis_of_the_input_tells_apart_are_refused() -> None:
    model = Model()
    with pytest.raises(UsageError, match=r"timesteps \[999.0, 10.0\].*once for each timestep"):
        model(torch.randn(6, 32), timestep=torch.tensor([999, 10]))
    assert bool((model(torch.randn(6, 32), timestep=torch.tensor([999, 800])) == 1).all())  # one range: no matter


def test_threads_have_their_own_timestep() -> None:
    """Two calls that are inside of the model at the same time, at different timesteps."""
    model, both, found = Model(), threading.Barrier(2, timeout=10), dict[int, Tensor]()
    model.layer.register_forward_pre_hook(lambda *_: None if both.wait() >= 0 else None)

    def call(timestep: int) -> None:
        found[timestep] = model(torch.randn(2, 32), timestep=torch.tensor([timestep, timestep]))

    threads = [threading.Thread(target=call, args=(timestep,)) for timestep in (999, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bool((found[999] == 1).all())
    assert bool((found[10] == 3).all())


def test_thread_that_never_called_the_model_reads_the_latest_call() -> None:
    model, seen = Model(), list[Tensor]()
    model(torch.zeros(1, 32), timestep=10)
    thread = threading.Thread(target=lambda: seen.append(model.layer(torch.zeros(1, 32))))
    thread.start()
    thread.join()
    assert bool((seen[0] == 3).all())
