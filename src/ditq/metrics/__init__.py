"""Metrics of generated images and videos: fidelity to the 16-bit model, alignment, distribution and motion."""

from ditq.metrics.fidelity import FIDELITY, latent_sqnr_db, psnr_db, ssim
from ditq.metrics.interval import Interval, aggregate, paired_difference

__all__ = [
    "FIDELITY",
    "Interval",
    "aggregate",
    "latent_sqnr_db",
    "paired_difference",
    "psnr_db",
    "ssim",
]
