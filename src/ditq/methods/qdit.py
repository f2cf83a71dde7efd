"""Q-DiT (Chen et al. 2024, arXiv 2406.17343): groups of input channels, dynamic activations, GPTQ.

What makes a recipe Q-DiT is in its formats: weights and activations of a layer share one group size, scales of
activations are found per token and group at run time (their "sample-wise dynamic quantization"), both are
asymmetric, and weights are rounded by GPTQ with scales found when it reaches a group. There is no balance.
Group sizes that differ between layers are found by ``ditq search``.
"""

from __future__ import annotations

from ditq.methods.rtn import RoundToNearest


class QDiT(RoundToNearest):
    name = "qdit"


METHOD = QDiT()
