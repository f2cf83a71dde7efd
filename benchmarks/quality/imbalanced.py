"""A function-preserving copy of a model with the channel imbalance of large DiTs. Synthetic, and labelled so.

Small models lack the outlier channels that balancing methods exist for. For every input that a norm or a value
projection produces, a channel factor c is moved: the producer is multiplied by c, the columns of the
consumers are divided by it, so the 16-bit model draws the same pictures. Most factors are log-normal
(sigma 0.5), some channels are 10 to 60 times larger: weight incoherence of ffn.up then rises as ViDiT-Q
reports for a large DiT. The factors are constant over timesteps: a static linear cannot undo factors that
vary, so what varies with time is what the model itself has. Inputs of ``ffn.down`` (after GELU), of the
cross-attention query (residual) and text keys and values have no producer that can carry c, and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.architectures.folding import fold

OUTLIER_SHARE, OUTLIER_RANGE, SPREAD = 0.04, (10.0, 60.0), 0.5


def channel_factors(width: int, generator: torch.Generator) -> Tensor:
    """C float32 [width]: powers of two, so that moving them costs no precision at all."""
    factors = (SPREAD * torch.randn(width, generator=generator)).exp()
    outliers = torch.randperm(width, generator=generator)[: max(1, round(OUTLIER_SHARE * width))]
    low, high = OUTLIER_RANGE
    factors[outliers] = low + (high - low) * torch.rand(len(outliers), generator=generator)
    return factors.log2().round().exp2()


@torch.no_grad()
def make_imbalanced(model: nn.Module, architecture: Architecture, seed: int = 0) -> int:
    """Changes ``model`` in place; returns how many inputs were made imbalanced."""
    generator = torch.Generator().manual_seed(seed)
    changed = 0
    for group in architecture.groups(model):
        if group.input.foldable is None:
            continue
        factors = channel_factors(group.linears[0].module.in_features, generator)
        fold(model, architecture, group, 1 / factors)
        for linear in group.linears:
            linear.module.weight.div_(factors)
        changed += 1
    return changed
