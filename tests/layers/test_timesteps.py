"""TimestepLinear: the layer of the range the clock is in."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import layer_plan
from torch import Tensor, nn

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


def test_positional_timestep_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="keyword argument 'timestep'"):
        Model()(torch.zeros(1, 32), 800)


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
