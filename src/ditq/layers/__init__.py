"""The plan carried out: linear layers that hold integers and ask an engine to multiply them."""

from ditq.layers.quantized_linear import QuantizedLinear
from ditq.layers.timesteps import Clock, TimestepLinear

__all__ = ["Clock", "QuantizedLinear", "TimestepLinear"]
