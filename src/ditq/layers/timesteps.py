"""Timestep-aware layers (ViDiT-Q, first generation): smoothing and integer weights for each range of timesteps."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ditq.errors import UsageError
from ditq.layers.clock import Clock
from ditq.layers.quantized_linear import QuantizedLinear
from ditq.plan import LayerPlan
from ditq.reading import cut


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

    def chosen(self) -> Tensor:
        """Which range each timestep of the current call uses, int64 of the shape of :attr:`Clock.now`.

        Between two ranges, the nearest one.
        """
        assert self.plan.timesteps is not None
        clock: Clock = self.__dict__["clock"]
        now = clock.now
        distances = [torch.maximum(begin - now, now - end).clamp_min(0) for begin, end in self.plan.timesteps]
        return torch.stack(distances).argmin(0)  # the first of equal ones

    def current(self) -> QuantizedLinear:
        """The layer of the current call's range.

        Raises:
            UsageError: the timesteps of the call are in several ranges.
        """
        ranges = self.chosen().unique()
        if len(ranges) > 1:
            raise self._mixed()
        return cast(QuantizedLinear, self.ranges[int(ranges)])

    def _mixed(self, x: Tensor | None = None) -> UsageError:
        clock: Clock = self.__dict__["clock"]
        return UsageError(
            f"One call has timesteps {cut(str(clock.now.flatten().tolist()))}, which are in several ranges of layer "
            f"{self.plan.name!r} (its plan has {cut(str(self.plan.timesteps))})"
            + (
                f", and its input {list(x.shape)} has no axis of samples that tells them apart"
                if x is not None
                else ""
            )
            + ". Call the transformer once for each timestep."
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight of the current range [N, K]."""
        return self.current().weight

    def add_branch(self, down: Tensor, up: Tensor, dtype: str) -> None:
        """Adds (x down^T) up^T to the output at every timestep, see :meth:`QuantizedLinear.add_branch`."""
        for layer in self.ranges:
            cast(QuantizedLinear, layer).add_branch(down, up, dtype)
        self.plan = self.plan.model_copy(update={"branch": cast(QuantizedLinear, self.ranges[0]).plan.branch})

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        chosen = self.chosen()
        ranges = chosen.unique().tolist()
        if len(ranges) == 1:
            return cast(Tensor, self.ranges[ranges[0]](x))
        if tuple(x.shape[: chosen.ndim]) != tuple(chosen.shape):
            raise self._mixed(x)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for i in ranges:  # each sample by the layer of its own timestep
            samples = (chosen == i).to(x.device)
            y[samples] = self.ranges[i](x[samples])
        return y

    def extra_repr(self) -> str:
        return f"timesteps={self.plan.timesteps}"

    @torch.no_grad()
    def dequantize(self) -> nn.Linear:
        """The layer of the first range as a plain ``nn.Linear``: ranges differ by rounding only."""
        return cast(QuantizedLinear, self.ranges[0]).dequantize()
