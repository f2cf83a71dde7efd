"""Quantized layers: linear layers that store integer weights and multiply them on an engine."""

from ditq.layers.quantized_linear import QuantizedLinear
from ditq.layers.timesteps import Clock, TimestepLinear

__all__ = ["Clock", "QuantizedLinear", "TimestepLinear"]
