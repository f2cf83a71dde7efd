"""The default engine: real integer matrix products through ``torch._int_mm``, on CPU and CUDA."""

from ditq.engines.torch.engine import TorchEngine

ENGINE = TorchEngine()

__all__ = ["ENGINE", "TorchEngine"]
