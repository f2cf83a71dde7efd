"""Timestep-aware layers (ViDiT-Q, first generation): smoothing and integer weights for each range of timesteps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ditq.layers.quantized_linear import QuantizedLinear
from ditq.plan import LayerPlan


def timestep_of(value: Tensor | float) -> float:
    """The timestep of a transformer call from its argument: a number, or the first element of a tensor."""
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


class Clock(nn.Module):
    """Holds the timestep of the current transformer call; one per model, set by a forward pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.argument = ""

    def attach(self, model: nn.Module, argument: str) -> None:
        """Reads ``argument`` (a number, or a tensor of equal numbers) before every forward of ``model``."""
        self.argument = argument
        # A bound method, so that a deep copy of the model sets its own copy of the clock.
        model.register_forward_pre_hook(self._set, with_kwargs=True)

    def _set(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = kwargs.get(self.argument)
        if value is None:
            raise ValueError(f"timestep-aware layers need the transformer's keyword argument {self.argument!r}")
        self.now = timestep_of(value)


class TimestepLinear(nn.Linear):
    """One ``QuantizedLinear`` per timestep range; memory counts all of them."""

    def __init__(self, plan: LayerPlan, ranges: list[QuantizedLinear], clock: Clock) -> None:
        nn.Module.__init__(self)
        self.plan = plan
        self.in_features, self.out_features = plan.in_features, plan.out_features
        self.ranges = nn.ModuleList(ranges)
        # Not a submodule of every layer: the model owns the clock.
        object.__setattr__(self, "clock", clock)
        self.register_parameter("bias", None)

    def current(self) -> QuantizedLinear:
        """The layer of the current timestep's range; between two ranges, the nearest one."""
        assert self.plan.timesteps is not None
        clock: Clock = self.__dict__["clock"]
        now = clock.now
        distance = [max(begin - now, now - end, 0.0) for begin, end in self.plan.timesteps]
        return cast(QuantizedLinear, self.ranges[distance.index(min(distance))])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight of the current range [N, K]."""
        return self.current().weight

    def add_branch(self, down: Tensor, up: Tensor, dtype: str) -> None:
        """Adds (x down^T) up^T to the output at every timestep, see :meth:`QuantizedLinear.add_branch`."""
        for layer in self.ranges:
            cast(QuantizedLinear, layer).add_branch(down, up, dtype)
        self.plan = self.plan.model_copy(update={"branch": cast(QuantizedLinear, self.ranges[0]).plan.branch})

    def forward(self, x: Tensor) -> Tensor:
        return self.current()(x)

    def extra_repr(self) -> str:
        return f"timesteps={self.plan.timesteps}"

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """The layer of the first range as a plain ``nn.Linear``: ranges differ by rounding only."""
        return cast(QuantizedLinear, self.ranges[0]).dequantize()
