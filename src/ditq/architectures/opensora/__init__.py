"""Open-Sora v1.0 and v1.2: the transformers that the papers quantize, and what diffusers lacks around them."""

from ditq.architectures.opensora.pipeline import OpenSora12Pipeline, OpenSoraPipeline
from ditq.architectures.opensora.stdit import STDiT
from ditq.architectures.opensora.stdit3 import STDiT3
from ditq.architectures.opensora.vae import OpenSoraVAE

__all__ = ["OpenSora12Pipeline", "OpenSoraPipeline", "OpenSoraVAE", "STDiT", "STDiT3"]
