"""Engines execute quantized linears: they share a small set of operations, and each declares what it supports."""

from ditq.engines.base import Engine, QuantizedWeight
from ditq.engines.registry import choose, describe, engines, fuses, fusion, use_engine

__all__ = ["Engine", "QuantizedWeight", "choose", "describe", "engines", "fuses", "fusion", "use_engine"]
