"""``num_parameters()`` of quantized models."""

from __future__ import annotations

import functools

from torch import nn

from ditq.checkpoint.config import DitqConfig
from ditq.layers import QuantizedLinear, TimestepLinear


@functools.cache
def count_as_float() -> None:
    """Makes ``ModelMixin.num_parameters`` count integer weights as the parameters that they replace.

    diffusers does so inside of that method for its own backends, and has no hook for others. Models of others are
    counted as before.
    """
    from diffusers.models.modeling_utils import ModelMixin  # not above: it imports the quantizers itself

    count = ModelMixin.num_parameters

    @functools.wraps(count)
    def num_parameters(self: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        counted = count(self, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + _replaced(self)

    ModelMixin.num_parameters = num_parameters


def _replaced(model: nn.Module) -> int:
    """The number of float parameters of the quantized layers that ``model.parameters()`` lacks."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if not isinstance(config, DitqConfig) or config.plan is None:
        return 0
    if getattr(quantizer, "compiled", False):  # graphs do not have layers, and keep few other parameters
        whole = config.plan.other_parameters + sum(layer.parameters for layer in config.plan)
        return whole - sum(p.numel() for p in model.parameters())
    missing = -sum(fold.width for fold in config.plan.folds if fold.created)  # norms that the float model lacks
    for name, module in model.named_modules():
        if isinstance(module, TimestepLinear):
            missing += module.plan.parameters - (len(module.ranges) - 1) * module.plan.out_features * module.plan.bias
        elif isinstance(module, QuantizedLinear) and ".ranges." not in f".{name}":
            missing += module.plan.parameters
    return missing
