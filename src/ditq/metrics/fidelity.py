"""Fidelity to the 16-bit model, image by image, same prompt and seed: PSNR, SSIM, MS-SSIM, LPIPS, latent SQNR.

Every function takes one pair and returns one number; `ditq.metrics.aggregate` computes means and intervals over pairs.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ditq.errors import UsageError
from ditq.metrics.metric import Description
from ditq.metrics.networks.base import Extractor, MissingWeights
from ditq.metrics.picture import pair

# The PSNR of identical images, which would be infinite: means need a finite number. 8-bit images that differ in a
# single value stay far below it.
MAX_DB = 100.0

# Weights of the scales (Wang et al. 2003), and the shorter side from which each number of scales is used, so that the
# window of 11 pixels fits into the coarsest scale (torchmetrics requires 99 where 88 would suffice).
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDES = (11, 22, 44, 99, 176)

ALEXNET = "alexnet-owt-7be5be79.pth"

FIDELITY = (
    Description(
        "psnr_db", "PSNR", "dB", True, "fidelity",
        "Peak signal-to-noise ratio of the quantized model's image against the 16-bit model's. 6 dB more means half "
        "the difference.",
    ),
    Description(
        "ssim", "SSIM", "", True, "fidelity",
        "Structural similarity to the 16-bit model's image (Wang et al. 2004): 1 is identical.",
    ),
    Description(
        "ms_ssim", "MS-SSIM", "", True, "fidelity",
        "SSIM over several resolutions (Wang et al. 2003), up to five as the size allows: 1 is identical.",
    ),
    Description(
        "lpips", "LPIPS", "", False, "fidelity",
        "Learned perceptual distance to the 16-bit model's image, with AlexNet (Zhang et al. 2018).",
    ),
    Description(
        "feature_distance", "Feature distance", "", False, "fidelity",
        "Distance to the 16-bit model's image in the feature maps of a network: LPIPS without its learned channel "
        "weights. 0 is identical.",
    ),
    Description(
        "latent_sqnr_db", "Latent SQNR", "dB", True, "fidelity",
        "Signal-to-noise ratio of the final latents against the 16-bit model's, without the decoder.",
    ),
)  # fmt: skip


def psnr_db(reference: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels of 8-bit images; 100 for identical images.

    Raises:
        UsageError: the images differ in size. All functions of this module raise it.
    """
    a, b = pair(reference, other)
    error = (a - b).square().mean().item()
    return MAX_DB if error == 0 else min(MAX_DB, -10 * math.log10(error))


def ssim(reference: Image.Image, other: Image.Image) -> float:
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), data range 1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = pair(reference, other)
    return float(structural_similarity_index_measure(b, a, data_range=1.0))


def ms_ssim(reference: Image.Image, other: Image.Image) -> float:
    """Multi-scale structural similarity (Wang et al. 2003), data range 1.

    It uses the published five scales if the shorter side has at least 176 pixels, else as many as fit (4 from 99, 3
    from 44, 2 from 22, 1 from 11), with their published weights renormalised to sum to 1. A scale with a negative
    value counts as 0.

    Raises:
        UsageError: a side is shorter than 11 pixels.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = pair(reference, other)
    scales = sum(min(reference.size) >= side for side in MS_SSIM_SIDES)
    if not scales:
        raise UsageError(f"MS-SSIM needs images of at least {MS_SSIM_SIDES[0]} pixels a side, got {reference.size}")
    weights = MS_SSIM_WEIGHTS[:scales]
    betas = tuple(weight / sum(weights) for weight in weights)
    return float(multiscale_structural_similarity_index_measure(b, a, data_range=1.0, betas=betas))


def feature_distance(reference: Image.Image, other: Image.Image, network: Extractor) -> float:
    """LPIPS without its learned weights (Zhang et al. 2018, equation 1 with w = 1), with any network.

    At every position of every stage of the network, features are scaled to length 1 over channels. The squared
    distance is averaged over positions and stages. It is 0 for identical images and at most 4. Values of different
    networks are not comparable.
    """
    with torch.no_grad():
        stages = network.stages(torch.cat(pair(reference, other)))
    distances = [(a - b).square().sum(0).mean() for a, b in (normalize(maps, dim=1) for maps in stages)]
    return float(torch.stack(distances).mean())


def lpips(reference: Image.Image, other: Image.Image) -> float:
    """Learned perceptual image patch similarity with AlexNet (Zhang et al. 2018, version 0.1).

    Raises:
        MissingWeights: torchvision or AlexNet's weights are not on this machine. Nothing is downloaded.
    """
    a, b = pair(reference, other)
    with torch.no_grad():
        return float(_lpips_network()(a, b, normalize=True))


@cache
def _lpips_network() -> Any:
    """The network of torchmetrics, which includes LPIPS' small weights; the backbone comes from torchvision."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    missing = [] if find_spec("torchvision") else ["the package torchvision"]
    missing += [] if file.is_file() else [f"the file {file}"]
    if missing:
        raise MissingWeights(
            f"LPIPS needs torchvision and its AlexNet weights; missing: {' and '.join(missing)}. ditq downloads "
            "nothing: install torchvision, and put the file there, or set TORCH_HOME to a folder that has it in "
            "hub/checkpoints."
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").net


def latent_sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio of final latents in dB: 10 log10(|z|^2 / |z - z'|^2); 100 if identical."""
    return float(latent_sqnr_by_step(reference[None, None], other[None, None]))


def latent_sqnr_by_step(reference: Tensor, other: Tensor) -> Tensor:
    """Latent SQNR along the sampling trajectory.

    Args:
        reference, other: latents [n, steps, ...].

    Returns:
        dB, float64 [n, steps].

    Raises:
        UsageError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise UsageError(f"latents must have one shape, got {list(reference.shape)} and {list(other.shape)}")
    z, error = reference.double(), reference.double() - other.double()
    signal, noise = z.square().flatten(2).sum(2), error.square().flatten(2).sum(2)
    return torch.where(noise == 0, MAX_DB, 10 * torch.log10(signal / noise)).clamp(max=MAX_DB)
