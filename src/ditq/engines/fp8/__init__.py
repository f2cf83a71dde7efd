"""8-bit floats for inputs and weights, with row-wise scales, multiplied by cuBLAS; opt-in."""

from ditq.engines.fp8.engine import Fp8Engine

ENGINE = Fp8Engine()

__all__ = ["ENGINE", "Fp8Engine"]
