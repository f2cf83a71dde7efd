"""Pictures and videos from diffusers pipelines: drawn with known noise, kept so that nobody draws them twice."""

from ditq.folders import cache_root
from ditq.sampling.cache import PictureCache
from ditq.sampling.fingerprint import fingerprint
from ditq.sampling.first_call import first_call
from ditq.sampling.sample import Samples, batches, sample
from ditq.sampling.size import draws_videos, size_arguments

__all__ = [
    "PictureCache",
    "Samples",
    "batches",
    "cache_root",
    "draws_videos",
    "fingerprint",
    "first_call",
    "sample",
    "size_arguments",
]
