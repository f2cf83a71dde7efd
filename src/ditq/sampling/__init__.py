"""Pictures and videos from diffusers pipelines: drawn with known noise, kept so that nobody draws them twice."""

from ditq.sampling.sample import Samples, sample

__all__ = ["Samples", "sample"]
