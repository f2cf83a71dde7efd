"""Fidelity to the 16-bit model, picture by picture: PSNR, SSIM, latent SQNR."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Identical pictures have no finite PSNR; means need one. 8-bit pictures that differ in a single
# value stay far below.
MAX_DB = 100.0


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def psnr_db(reference: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels of 8-bit pictures; identical ones give 100."""
    error = (to_tensor(reference) - to_tensor(other)).square().mean().item()
    return MAX_DB if error == 0 else min(MAX_DB, -10 * math.log10(error))


def ssim(reference: Image.Image, other: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), data range 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(to_tensor(other)[None], to_tensor(reference)[None], data_range=1.0)
    return float(value)


def latent_sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB of final latents: 10 log10(||z||^2 / ||z - z'||^2)."""
    z, error = reference.double().square().sum(), (reference.double() - other.double()).square().sum()
    return MAX_DB if error == 0 else min(MAX_DB, float(10 * torch.log10(z / error)))


@dataclass(frozen=True)
class Metric:
    """A named fidelity metric; ``of`` says whether it compares pictures or latents."""

    name: str
    of: str
    higher_is_better: bool
    function: Callable[..., float]

    def values(self, reference: Sequence[object], other: Sequence[object]) -> list[float]:
        """One value for each pair."""
        return [self.function(a, b) for a, b in zip(reference, other, strict=True)]


FIDELITY = (
    Metric("psnr_db", "images", True, psnr_db),
    Metric("ssim", "images", True, ssim),
    Metric("latent_sqnr_db", "latents", True, latent_sqnr_db),
)
