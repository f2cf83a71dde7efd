"""Distances to real images as the fitness of a search, as in the Q-DiT paper: FID, and KID for fewer images."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import torch
from PIL import Image

from ditq.allocation import Fitness
from ditq.errors import unknown
from ditq.metrics import distribution
from ditq.metrics.networks import Extractor, Features
from ditq.metrics.real import Real, from_folder
from ditq.sampling import Samples

METRICS = ("fid", "kid", "sfid")


def distance_to_real(metric: str, real: Real | Path, network: Extractor) -> Fitness:
    """FID, sFID or KID of a candidate's images to real ones; the 16-bit model's images are not used.

    Args:
        metric: ``fid``, ``kid`` or ``sfid``.
        real: real images, or a folder of them. Those of a folder are resized to the size of the generated ones.
        network: the feature network.

    Raises:
        UsageError: an unknown metric, or ``real`` has only features of other networks.
    """
    if metric not in METRICS:
        raise unknown("fitness", metric, METRICS)
    function = getattr(distribution, metric)
    if isinstance(real, Path):
        files = sorted((path.name, path.stat().st_size) for path in real.iterdir()) if real.is_dir() else []
        name = f"{real.name} ({zlib.crc32(repr(files).encode()):08x})"
    else:
        name = f"{real.name} ({float(real.seen_by(network).pooled.double().sum()):.9g})"
    cached_features: list[Features] = []

    def score(_: Samples, generated: Samples) -> float:
        if not bool(torch.isfinite(generated.latents).all()):
            return math.inf
        frames = [f for x in generated.images for f in ([x] if isinstance(x, Image.Image) else x)]
        if not cached_features:
            resized = from_folder(real, frames[0].size) if isinstance(real, Path) else real
            cached_features.append(resized.seen_by(network))
        return float(function(cached_features[0], network(frames)).value)

    return Fitness(f"{metric.upper()} to {name} through {network.name}", score)
