"""How close a quantized model's images are to the 16-bit model's, with the same prompt and seed."""

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
