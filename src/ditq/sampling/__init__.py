"""Pictures and videos from diffusers pipelines: drawn with known noise, kept so that nobody draws them twice."""

from ditq.sampling.cache import PictureCache, cache_root
from ditq.sampling.fingerprint import fingerprint
from ditq.sampling.sample import Samples, sample

__all__ = ["PictureCache", "Samples", "cache_root", "fingerprint", "sample"]
