"""QuaRot (Ashkboos et al. 2024) as far as a DiT allows: every input rotated by a random Hadamard matrix, online.

Rotations cannot be pushed through the residual stream of a DiT, since modulation and gates are per channel
(diagonal, but not constant); so there is no global rotation, and each layer turns its own input.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.methods.base import Method, rotate_of
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Recipe


class QuaRot(Method):
    name = "quarot"

    def balance(
        self,
        group: InputGroup,
        layers: Sequence[LayerPlan],
        recipe: Recipe,
        seen: GroupStatistics | None,
        timesteps: Tensor | None,
        seed: int,
    ) -> tuple[Smooth | None, Rotate | None]:
        return None, rotate_of(layers[0].in_features, recipe, seed)


METHOD = QuaRot()
