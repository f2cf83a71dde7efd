"""Who executes a quantized linear: one small operation set, several engines, each declaring what it can do."""

from ditq.engines.base import Engine, QuantizedWeight
from ditq.engines.registry import choose, describe, engines, fuses, fusion, use_engine

__all__ = ["Engine", "QuantizedWeight", "choose", "describe", "engines", "fuses", "fusion", "use_engine"]
