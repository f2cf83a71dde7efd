"""Quantized layers: linear layers that store integer weights and multiply them on an engine."""

from ditq.layers.clock import Clock
from ditq.layers.quantized_linear import QuantizedLinear
from ditq.layers.stepped import SteppedLinear, with_steps
from ditq.layers.timesteps import TimestepLinear

__all__ = ["Clock", "QuantizedLinear", "SteppedLinear", "TimestepLinear", "with_steps"]
