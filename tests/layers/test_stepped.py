"""SteppedLinear: one set of integer weights, an activation grid by timestep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import layer_plan, token_format
from torch import Tensor, nn

from ditq.errors import UsageError
from ditq.layers import Clock, QuantizedLinear, SteppedLinear, with_steps
from ditq.plan import ALWAYS, LayerPlan, StepFormat

MIDDLE = StepFormat(begin=100, end=800, activation=token_format(3))
EARLY = StepFormat(begin=900, end=ALWAYS, activation=token_format(5))


def plan(**fields: Any) -> LayerPlan:
    return layer_plan(activation=token_format(8), **fields)


class Model(nn.Module):
    """One linear whose inputs have 5 bits from t = 900, 3 bits from 100 to 800, and 8 bits elsewhere."""

    def __init__(self, activation: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 24)
        clock = Clock()
        finest = None if activation == 16 else token_format(activation)
        stepped = plan(steps=(MIDDLE, EARLY)).model_copy(update={"activation": finest})
        self.layer = with_steps(QuantizedLinear.from_linear(self.linear, stepped), stepped, clock)
        clock.attach(self, "timestep")

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(x)

    def at_bits(self, x: Tensor, bits: int) -> Tensor:
        """What a layer without steps returns with inputs of so many bits."""
        fixed = layer_plan(activation=None if bits == 16 else token_format(bits))
        return QuantizedLinear.from_linear(self.linear, fixed)(x)


@pytest.mark.parametrize(
    ("timestep", "bits"), [(1000, 5), (900, 5), (899, 8), (800, 3), (100, 3), (99.5, 8), (0, 8), (1e6, 5)]
)
def test_grid_is_the_one_of_the_timestep(timestep: float, bits: int) -> None:
    model, x = Model(), torch.randn(2, 7, 32)
    for value in (timestep, torch.tensor(timestep), torch.full((2,), timestep)):
        assert torch.equal(model(x, timestep=value), model.at_bits(x, bits))
    assert not torch.equal(model.at_bits(x, bits), model.at_bits(x, 4))


def test_inputs_may_be_in_16_bit_outside_of_the_steps() -> None:
    model, x = Model(activation=16), torch.randn(2, 7, 32)
    assert torch.equal(model(x, timestep=50), model.at_bits(x, 16))
    assert torch.equal(model(x, timestep=500), model.at_bits(x, 3))


def test_each_sample_has_the_grid_of_its_timestep() -> None:
    model, x = Model(), torch.randn(3, 7, 32)
    y = model(x, timestep=torch.tensor([950.0, 50.0, 400.0]))
    for row, bits in enumerate((5, 8, 3)):
        torch.testing.assert_close(y[row], model.at_bits(x, bits)[row])
    assert float(model.layer.__dict__["clock"].now[0]) == 950  # of the call, as before


def test_samples_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UsageError, match="no axis of samples"):
        Model()(torch.randn(7, 32), timestep=torch.tensor([950.0, 400.0]))


def test_no_memory_is_needed_for_steps() -> None:
    layer = Model().layer
    assert isinstance(layer, SteppedLinear)
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) + 4 * 24 == plan().stored_bytes() + 2 * 24


def test_a_copy_follows_its_own_clock() -> None:
    model = Model()
    twin, x = copy.deepcopy(model), torch.randn(1, 4, 32)
    model(x, timestep=400)
    assert torch.equal(twin(x, timestep=50), twin.at_bits(x, 8))
    assert torch.equal(model(x, timestep=400), model.at_bits(x, 3))


def test_dequantized_layer_is_plain_and_steps_are_shown() -> None:
    layer = Model().layer
    assert type(layer.dequantize()) is nn.Linear
    assert "steps=2" in repr(layer)


def test_gradients_pass_to_the_input() -> None:
    model = Model()
    x = torch.randn(2, 3, 32, requires_grad=True)
    model(x, timestep=400).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_compiled_model_follows_the_timestep() -> None:
    model, x = Model(), torch.randn(2, 7, 32)
    compiled = torch.compile(model, backend="eager")
    for timestep, bits in ((400, 3), (950, 5), (50, 8)):
        torch.testing.assert_close(compiled(x, timestep=timestep), model.at_bits(x, bits))
