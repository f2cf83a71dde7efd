"""PTQ4DiT (Wu et al., NeurIPS 2024, arXiv 2405.16005): balanced channels for static activation scales.

Channel-wise salience balancing divides inputs and multiplies weight columns so that both reach sqrt(s(X_j) s(W_j)),
where s is the largest magnitude of a channel: that is SmoothQuant at alpha = 0.5. Spearman's rho-guided salience
calibration takes for s(X) a mean of the timesteps' maxima, in which those weigh more whose large inputs meet small
weights (:func:`ditq.numerics.salience_weights`). As in the paper (figure 7) the inputs are balanced whose producer can
carry the scale, so that none is left at run time: those behind adaLN, and attention's output by its value projections;
not the one behind the GELU.

Not done here: the reconstruction of blocks with learned rounding (BRECQ, AdaRound), and the quantization of q, k, v
and the softmax. ``rounding: gptq`` stands in for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ditq.architectures import InputGroup
from ditq.calibration import GroupStatistics
from ditq.methods.base import Method, smooth_of
from ditq.methods.error import best_balance
from ditq.plan import LayerPlan, Rotate, Smooth
from ditq.recipe import Recipe


class PTQ4DiT(Method):
    name = "ptq4dit"

    def balance(
        self,
        group: InputGroup,
        layers: Sequence[LayerPlan],
        recipe: Recipe,
        seen: GroupStatistics | None,
        timesteps: Tensor | None,
        seed: int,
    ) -> tuple[Smooth | None, Rotate | None]:
        if group.input.foldable is None:
            return None, None
        smooths = (smooth_of(group, recipe, alpha) for alpha in recipe.balance.alphas)
        options = [(smooth.model_copy(update={"salience": "spearman"}), None) for smooth in smooths]
        return best_balance(options, group, layers, seen, timesteps)


METHOD = PTQ4DiT()
