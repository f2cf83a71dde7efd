"""A model in which single layers are quantized, weights and inputs apart; all others stay in 16 bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ditq.allocation.candidates import Candidates
from ditq.conversion.scales import balanced
from ditq.numerics import fake_quantize
from ditq.plan import LayerPlan


class RoundedInput(nn.Linear):
    """A linear with the weight of the float model and a rounded input: y = Q(x / s R) (W s R)^T + b.

    It measures what the rounding of inputs alone costs. It is no layer of a quantized model: its product is in floats.
    """

    def __init__(self, linear: nn.Linear, plan: LayerPlan, scale: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.plan = plan
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.smooth_scale = scale
        self.balanced_weight = balanced(linear.weight.detach(), scale, plan.rotate, weight=True).to(
            linear.weight.dtype
        )

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        grid = self.plan.activation
        assert grid is not None
        rows = balanced(x.reshape(-1, self.in_features), self.smooth_scale, self.plan.rotate, weight=False)
        y = F.linear(fake_quantize(rows, grid).to(x.dtype), self.balanced_weight, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)


class WeightProbes(Candidates):
    """Quantizes the weights of single layers; their inputs stay in 16 bit."""

    def _put(self, layer: LayerPlan) -> LayerPlan:
        return super()._put(layer.model_copy(update={"activation": None}))


class InputProbes(Candidates):
    """Rounds the inputs of single layers; their weights stay in 16 bit."""

    def _put(self, layer: LayerPlan) -> LayerPlan:
        kept = layer.model_copy(
            update={"weight": None, "activation": None, "smooth": None, "rotate": None, "rounding": "nearest",
                    "gptq": None, "clip": "minmax", "steps": None}
        )  # fmt: skip
        plan = super()._put(kept)
        if layer.activation is not None:
            scale = self.scales.get(layer.name) if layer.smooth else None
            linear = self.model.get_submodule(layer.name)
            assert isinstance(linear, nn.Linear)
            self.replace(layer.name, RoundedInput(linear, layer, scale))
        return plan
