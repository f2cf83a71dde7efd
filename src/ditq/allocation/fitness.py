"""How good a candidate is: by default, how near its latents stay to those of the 16-bit model from the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ditq.sampling import Samples


@dataclass(frozen=True)
class Fitness:
    """A number for what a candidate drew; smaller is better.

    Attributes:
        name: belongs to a study's identity, so it changes with everything that changes the number.
        score: of (what the 16-bit model drew, what the candidate drew), for the same conditions and seeds.
        pictures: whether it looks at pictures; if not, nothing is decoded.
    """

    name: str
    score: Callable[[Samples, Samples], float]
    pictures: bool = True


def latent_error_db(reference: Samples, drawn: Samples) -> float:
    """Error of the final latents in dB: the mean of 10 log10(||z' - z||^2 / ||z||^2) over pictures.

    The negative of the latent SQNR that ``ditq compare`` reports. The mean of logarithms, so that no single picture
    whose trajectory ends elsewhere decides. Infinite where a candidate draws NaN or Inf.
    """
    a, b = reference.latents.flatten(1).double(), drawn.latents.flatten(1).double()
    if not bool(torch.isfinite(b).all()):
        return math.inf
    ratios = (b - a).square().sum(1) / a.square().sum(1).clamp_min(1e-30)
    return float((10 * ratios.clamp_min(1e-10).log10()).mean())


LATENT = Fitness("latent error, dB", latent_error_db, pictures=False)


@contextmanager
def undecoded(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline's decoder passes three channels of the latents on: pictures of no meaning, at no cost."""
    from diffusers.models.autoencoders.vae import DecoderOutput

    pipe.vae.decode = lambda latents, *args, **kwargs: DecoderOutput(sample=latents[:, :3])
    try:
        yield
    finally:
        del pipe.vae.decode
