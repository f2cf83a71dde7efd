"""Samples images and videos from diffusers pipelines with seeded noise, and caches them."""

from ditq.folders import cache_root
from ditq.sampling.cache import PictureCache
from ditq.sampling.fingerprint import fingerprint
from ditq.sampling.first_call import example_condition, first_call
from ditq.sampling.sample import Samples, batches, condition_list, sample
from ditq.sampling.sampling import Sampling
from ditq.sampling.size import draws_videos, size_arguments
from ditq.sampling.trajectory import trajectory_timesteps

__all__ = [
    "PictureCache",
    "Samples",
    "Sampling",
    "batches",
    "cache_root",
    "condition_list",
    "draws_videos",
    "fingerprint",
    "example_condition",
    "first_call",
    "sample",
    "size_arguments",
    "trajectory_timesteps",
]
