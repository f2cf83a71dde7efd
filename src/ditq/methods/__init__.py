"""How a plan's numbers are found: one file a method, found by name."""

from ditq.methods.base import Method, get, names
from ditq.methods.convert import convert, draft, replace
from ditq.methods.quantize import plan_layers, quantize_model

__all__ = ["Method", "convert", "draft", "get", "names", "plan_layers", "quantize_model", "replace"]
