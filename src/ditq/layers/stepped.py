"""A quantized layer whose input grid follows the timestep: more bits at steps where rounding hurts."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ditq.errors import UsageError
from ditq.layers.clock import Clock
from ditq.layers.quantized_linear import QuantizedLinear
from ditq.numerics import Grid
from ditq.plan import LayerPlan
from ditq.reading import cut


class SteppedLinear(QuantizedLinear):
    """A :class:`QuantizedLinear` with the activation grid of the current timestep, see :attr:`LayerPlan.steps`.

    Its integer weights are those of every timestep. A call with several timesteps (one for each sample, or for each
    frame) is computed grid by grid.
    """

    clock: Clock

    @classmethod
    def of(cls, layer: QuantizedLinear, plan: LayerPlan, clock: Clock) -> Self:
        """A layer with the integers of ``layer``, shared, and the steps of ``plan``."""
        stepped = cls.like(layer, plan)
        # Not a submodule of every layer: the model owns the clock.
        object.__setattr__(stepped, "clock", clock)
        return stepped

    @property
    def activation(self) -> Grid | None:
        (grid,) = self._grids()
        return grid

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        grids = self._grids()
        if len(grids) == 1:
            return super().forward(x)
        clock = self.clock
        now = clock.now
        if tuple(x.shape[: now.ndim]) != tuple(now.shape):
            raise UsageError(
                f"One call has timesteps {cut(str(now.flatten().tolist()))}, at which layer {self.plan.name!r} has "
                f"different activation grids, and its input {list(x.shape)} has no axis of samples that tells them "
                "apart. Call the transformer once for each timestep."
            )
        y = x.new_empty(*x.shape[:-1], self.out_features)
        of_time = [self.plan.activation_at(time) for time in now.flatten().tolist()]
        for grid in grids:  # each sample with the grid of its own timestep
            samples = torch.tensor([g == grid for g in of_time]).reshape(now.shape)
            time = now.flatten()[of_time.index(grid)]
            with clock.at(time):
                y[samples.to(x.device)] = super().forward(x[samples.to(x.device)])
        return y

    @torch.compiler.disable
    def _grids(self) -> tuple[Grid | None, ...]:
        """The grids of the current call, one for each group of its timesteps."""
        return tuple(dict.fromkeys(self.plan.activation_at(time) for time in self.clock.times))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, steps={len(self.plan.steps or ())}"


def stepped(model: nn.Module) -> dict[str, SteppedLinear]:
    """The layers of ``model`` whose grid follows the timestep, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SteppedLinear)}


def with_steps(layer: QuantizedLinear, plan: LayerPlan, clock: Clock) -> QuantizedLinear:
    """The layer itself, or one that follows the timestep if its plan has steps."""
    return layer if plan.steps is None else SteppedLinear.of(layer, plan, clock)
