"""8-bit floats for inputs and weights, row by row, by the products of cuBLAS; runs only where it is asked for."""

from ditq.engines.fp8.engine import Fp8Engine

ENGINE = Fp8Engine()

__all__ = ["ENGINE", "Fp8Engine"]
