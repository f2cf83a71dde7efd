"""PSNR, SSIM and latent SQNR against closed forms and an independent numpy implementation."""

import math

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ditq.metrics import FIDELITY, latent_sqnr_db, psnr_db, ssim


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def noise(seed: int = 0, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3))


def reference_ssim(a: np.ndarray, b: np.ndarray, sigma: float = 1.5, size: int = 11) -> float:
    """Wang et al. 2004: Gaussian windows of 11 x 11, K1 = 0.01, K2 = 0.03; edges reflected, mean of channels."""
    offsets = np.arange(size) - size // 2
    line = np.exp(-(offsets**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        padded = (np.pad(z[..., channel].astype(np.float64) / 255, size // 2, mode="reflect") for z in (a, b))
        x, y = (sliding_window_view(z, (size, size)) for z in padded)  # [H, W, 11, 11]
        mean = lambda z: (z * window).sum((-1, -2))  # noqa: E731
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


@pytest.mark.parametrize("step", [1, 5, 51])
def test_psnr_of_a_constant_difference(step: int) -> None:
    a = np.full((8, 8, 3), 100)
    assert psnr_db(picture(a), picture(a + step)) == pytest.approx(20 * math.log10(255 / step), abs=1e-4)


def test_psnr_against_numpy() -> None:
    a, b = noise(0), noise(1)
    error = np.mean(((a - b) / 255.0) ** 2)
    assert psnr_db(picture(a), picture(b)) == pytest.approx(-10 * math.log10(error), abs=1e-4)


def test_psnr_of_one_differing_value_stays_below_that_of_identical_pictures() -> None:
    a = np.full((64, 64, 3), 100)
    b = a.copy()
    b[0, 0, 0] += 1
    assert psnr_db(picture(a), picture(b)) < psnr_db(picture(a), picture(a)) == 100.0


@pytest.mark.parametrize("amplitude", [2, 20, 120])
def test_ssim_against_numpy(amplitude: int) -> None:
    a = np.clip(noise(0) // 4 + np.linspace(0, 150, 24)[:, None, None], 0, 255).astype(np.uint8)
    b = np.clip(a + np.random.default_rng(1).integers(-amplitude, amplitude + 1, a.shape), 0, 255).astype(np.uint8)
    assert ssim(picture(a), picture(b)) == pytest.approx(reference_ssim(a, b), abs=1e-4)


def test_ssim_is_symmetric_and_one_for_identical_pictures() -> None:
    a, b = picture(noise(0)), picture(noise(1))
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    assert ssim(a, b) < 0.2


@pytest.mark.parametrize("ratio", [0.5, 0.1, 1e-3])
def test_latent_sqnr_of_a_scaled_copy(ratio: float) -> None:
    z = torch.randn(4, 8, 8)
    assert latent_sqnr_db(z, z * (1 + ratio)) == pytest.approx(-20 * math.log10(ratio), abs=0.02)


def test_latent_sqnr_of_identical_latents_is_finite() -> None:
    z = torch.randn(4, 8, 8)
    assert latent_sqnr_db(z, z.clone()) == 100.0
    assert latent_sqnr_db(z, torch.zeros_like(z)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("metric", FIDELITY, ids=lambda m: m.name)
def test_metric_goes_pair_by_pair(metric) -> None:  # type: ignore[no-untyped-def]
    make = (lambda i: picture(noise(i))) if metric.of == "images" else (lambda i: torch.from_numpy(noise(i)).float())
    a, b = [make(0), make(1), make(2)], [make(0), make(4), make(2)]
    values = metric.values(a, b)
    assert len(values) == 3
    assert metric.higher_is_better
    assert values[1] < min(values[0], values[2])
    with pytest.raises(ValueError, match="zip"):
        metric.values(a, b[:2])
