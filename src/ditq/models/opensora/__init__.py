"""Open-Sora v1.0 and v1.2: the transformers that the papers quantize, and what diffusers lacks around them."""

from ditq.models.opensora.pipeline import OpenSora12Pipeline, OpenSoraPipeline
from ditq.models.opensora.stdit import STDiT
from ditq.models.opensora.stdit3 import STDiT3
from ditq.models.opensora.vae import OpenSoraVAE

__all__ = ["OpenSora12Pipeline", "OpenSoraPipeline", "OpenSoraVAE", "STDiT", "STDiT3"]
