"""Distances to real images as the fitness of a search, as in the paper of Q-DiT: FID, and KID for fewer images."""

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
    """FID, sFID or KID of what a candidate draws; the 16-bit model's images play no part.

    Args:
        real: real images, or a folder of them, which are fitted to the size of the drawn ones.

    Raises:
        UsageError: another metric; ``real`` has only features of other networks.
    """
    if metric not in METRICS:
        raise unknown("fitness", metric, METRICS)
    function = getattr(distribution, metric)
    if isinstance(real, Path):
        files = sorted((path.name, path.stat().st_size) for path in real.iterdir()) if real.is_dir() else []
        name = f"{real.name} ({zlib.crc32(repr(files).encode()):08x})"
    else:
        name = f"{real.name} ({float(real.seen_by(network).pooled.double().sum()):.9g})"
    known: list[Features] = []

    def score(_: Samples, drawn: Samples) -> float:
        if not bool(torch.isfinite(drawn.latents).all()):
            return math.inf
        frames = [f for x in drawn.images for f in ([x] if isinstance(x, Image.Image) else x)]
        if not known:
            fitted = from_folder(real, frames[0].size) if isinstance(real, Path) else real
            known.append(fitted.seen_by(network))
        return float(function(known[0], network(frames)).value)

    return Fitness(f"{metric.upper()} to {name} through {network.name}", score)
