"""From a recipe to a plan, and from a plan to integers: draft, balance, scales, folding, rounding, layers."""

from ditq.conversion.convert import convert, replace
from ditq.conversion.draft import draft, estimate
from ditq.conversion.quantize import carry_out, plan_layers, quantize_model

__all__ = ["carry_out", "convert", "draft", "estimate", "plan_layers", "quantize_model", "replace"]
