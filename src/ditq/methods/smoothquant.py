"""SmoothQuant (Xiao et al. 2023, eq. 4): one migration strength for all layers, scales folded where exact."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.methods.base import Method, smooth_of
from ditq.methods.error import best_balance
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Recipe


class SmoothQuant(Method):
    name = "smoothquant"

    def balance(
        self,
        group: InputGroup,
        layers: Sequence[LayerPlan],
        recipe: Recipe,
        seen: GroupStatistics | None,
        timesteps: Tensor | None,
        seed: int,
    ) -> tuple[Smooth | None, Rotate | None]:
        options = [(smooth_of(group, recipe, alpha), None) for alpha in recipe.balance.alphas]
        return best_balance(options, group, layers, seen, timesteps)


METHOD = SmoothQuant()
