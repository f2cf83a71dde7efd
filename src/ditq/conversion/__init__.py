"""From a recipe to a plan, and from a plan to integers: draft, balance, scales, rounding, layers."""

from ditq.conversion.convert import convert, replace
from ditq.conversion.draft import draft, estimate
from ditq.conversion.quantize import plan_layers, quantize_model

__all__ = ["convert", "draft", "estimate", "plan_layers", "quantize_model", "replace"]
