"""Open-Sora v1.0 and v1.2, which diffusers does not provide: the transformers, the VAE of v1.2, and pipelines."""

from ditq.models.opensora.pipeline import OpenSora12Pipeline, OpenSoraPipeline
from ditq.models.opensora.stdit import STDiT
from ditq.models.opensora.stdit3 import STDiT3
from ditq.models.opensora.vae import OpenSoraVAE

__all__ = ["OpenSora12Pipeline", "OpenSoraPipeline", "OpenSoraVAE", "STDiT", "STDiT3"]
