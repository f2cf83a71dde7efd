"""Pictures and videos from diffusers pipelines: drawn with known noise, kept so that nobody draws them twice."""

from ditq.sampling.cache import PictureCache, cache_root
from ditq.sampling.fingerprint import fingerprint
from ditq.sampling.sample import Samples, batches, sample

__all__ = ["PictureCache", "Samples", "batches", "cache_root", "fingerprint", "sample"]
