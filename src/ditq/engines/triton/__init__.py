"""Triton kernels for NVIDIA GPUs: one file per operation, with its reference in plain torch beside it.

- quantize.py: x / smooth @ Q -> codes
- norm.py: LayerNorm, modulation -> codes
- activation.py: GELU, SiLU, and their gated forms -> codes
- linear.py: codes @ packed weights -> output
- expand.py: packed weights -> int8
- rows.py: shared by the three quantizers: codes, scales and sums of a few rows in registers
- tiles.py: tile sizes by GPU and shape
- tuning.py: tile sizes measured on the GPU
- proof.py: every kernel against its reference, before the engine is used on a device
- operation.py: registration with torch.library
"""

from ditq.engines.triton.engine import TritonEngine

ENGINE = TritonEngine()

__all__ = ["ENGINE", "TritonEngine"]
