"""ViDiT-Q (Zhao et al., ICLR 2025): static-dynamic channel balancing.

The static part of the channel imbalance (the constant ``scale_shift_table`` of adaLN) is taken out by a
smoothing scale, what varies with the timestep by a Hadamard rotation; weights are quantized once. The
paper sets which layers are balanced, and alpha, by hand; here both are chosen per input group by the
output error on calibration inputs, "none" being one of the choices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.methods.base import Method, rotate_of, smooth_of
from ditq.methods.error import Option, best_balance
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Recipe


class ViDiTQ(Method):
    name = "viditq"

    def balance(
        self,
        group: InputGroup,
        layers: Sequence[LayerPlan],
        recipe: Recipe,
        seen: GroupStatistics | None,
        timesteps: Tensor | None,
        seed: int,
    ) -> tuple[Smooth | None, Rotate | None]:
        rules = recipe.balance
        smooths = [smooth_of(group, recipe, alpha) for alpha in rules.alphas] if rules.smooth else []
        rotation = rotate_of(layers[0].in_features, recipe, seed) if rules.rotate else None
        both: list[Option] = [(smooth, rotation) for smooth in smooths] or [(None, rotation)]
        if rules.choose == "always":
            return best_balance(both, group, layers, seen, timesteps)
        options: list[Option] = [(None, None)]
        options += [(smooth, None) for smooth in smooths]
        if rotation:
            options += [(None, rotation), *((smooth, rotation) for smooth in smooths)]
        return best_balance(options, group, layers, seen, timesteps)


METHOD = ViDiTQ()
