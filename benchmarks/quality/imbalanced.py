"""A function-preserving copy of a model with the channel imbalance of large DiTs. It is synthetic, and labelled so.

Small models lack the outlier channels that balancing methods are designed for. For every input that a norm or a value
projection produces, this adds a factor c to each channel: the producer is multiplied by c, and the columns of the
consumers are divided by it. The 16-bit model therefore generates the same images. Factors are log-normal (sigma 0.5).
4 % of the channels get weight columns 10 to 30 times larger (ViDiT-Q reports a weight incoherence of 40.75 before and
5.02 after balancing an FFN layer of a large DiT). Another 4 % get activations 2 to 4 times larger.

There are two limits. The factors are constant over timesteps, because a static linear layer cannot undo factors that
vary; variation over time is only that of the model itself. And stronger activation outliers cannot be created this
way: they come with vanishing weight columns, which no real model has, and on which 4-bit rotated weights are worse
than none (``--outliers activations`` shows it). Inputs of ``ffn.down`` (after GELU), of the cross-attention query
(residual) and of text keys and values have no producer that can be multiplied by c, and are unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.conversion.folding import fold

SPREAD, SHARE = 0.5, 0.04
# Ranges of the factor on activations; the weight columns get its inverse.
OUTLIERS = {
    "weights": ((1 / 30, 1 / 10), (2.0, 4.0)),
    "activations": ((10.0, 60.0),),
}


def channel_factors(width: int, kind: str, generator: torch.Generator) -> Tensor:
    """Factors c, float32 [width]: powers of two, so that moving them costs no precision at all."""
    factors = (SPREAD * torch.randn(width, generator=generator)).exp()
    order, n = torch.randperm(width, generator=generator), max(1, round(SHARE * width))
    for i, (low, high) in enumerate(OUTLIERS[kind]):
        factors[order[i * n : (i + 1) * n]] = low + (high - low) * torch.rand(n, generator=generator)
    return factors.log2().round().exp2()


@torch.no_grad()
def make_imbalanced(model: nn.Module, architecture: Architecture, seed: int = 0, kind: str = "weights") -> int:
    """Changes ``model`` in place; returns how many inputs were made imbalanced."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for group in architecture.groups(model):
        if group.input.foldable is None:
            continue
        factors = channel_factors(group.linears[0].module.in_features, kind, generator)
        fold(model, architecture, group, 1 / factors)
        for linear in group.linears:
            linear.module.weight.div_(factors)
        changed += 1
    return changed
