"""Open-Sora v1.0 and v1.2: the transformers that the papers quantize, which diffusers does not have."""

from ditq.architectures.opensora.pipeline import OpenSoraPipeline
from ditq.architectures.opensora.stdit import STDiT
from ditq.architectures.opensora.stdit3 import STDiT3

__all__ = ["OpenSoraPipeline", "STDiT", "STDiT3"]
