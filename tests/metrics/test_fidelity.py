"""Fidelity metrics against closed forms and independent numpy implementations."""

import math
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics import fidelity
from ditq.metrics.fidelity import (
    feature_distance,
    latent_sqnr_by_step,
    latent_sqnr_db,
    lpips,
    ms_ssim,
    psnr_db,
    ssim,
)
from ditq.metrics.networks import Extractor, Features, MissingWeights


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def noise(seed: int = 0, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3))


def reference_ssim(a: np.ndarray, b: np.ndarray, contrast_only: bool = False, size: int = 11) -> float:
    """Wang et al. 2004: Gaussian windows of 11 x 11, K1 = 0.01, K2 = 0.03; edges reflected, mean of channels."""
    sigma = 1.5
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
        contrast = (2 * cov + c2) / (vx + vy + c2)
        inside = slice(size // 2, -(size // 2))  # torchmetrics takes contrast from whole windows only
        luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
        values.append(contrast[inside, inside].mean() if contrast_only else (luminance * contrast).mean())
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


@pytest.fixture
def apple() -> Image.Image:
    """Smooth shapes with edges and fine texture, [96, 96]."""
    y, x = np.mgrid[:96, :96] / 95
    disc = ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1)[..., None] * np.array([160, 20, 30])
    ground = np.stack([60 + 30 * x, 90 + 30 * y, 80 + 10 * np.sin(40 * x)], -1)
    return picture(ground + disc)


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    values = np.asarray(image) + np.random.default_rng(3).normal(0, sigma, (*image.size[::-1], 3))
    return picture(np.clip(values, 0, 255))


def reference_ms_ssim(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """Wang et al. 2003, equation 7, with weights that sum to 1: contrast and structure, and luminance at the last."""
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    product = 1.0
    for i, weight in enumerate(weights / weights.sum()):
        if i:
            a, b = (z.reshape(len(z) // 2, 2, len(z[0]) // 2, 2, 3).mean((1, 3)) for z in (a, b))
        product *= reference_ssim(a, b, contrast_only=i < scales - 1) ** weight
    return product


@pytest.mark.parametrize(("size", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4), (176, 5)])
def test_ms_ssim_against_numpy(size: int, scales: int) -> None:
    y, x = np.mgrid[:size, :size]
    a = 120 + 80 * np.sin(x / 5)[..., None] * np.cos(y / 9)[..., None] + noise(0, size) / 10
    b = np.clip(a + np.random.default_rng(1).normal(0, 15, a.shape), 0, 255)
    a, b = np.floor(a), np.floor(b)
    assert ms_ssim(picture(a), picture(b)) == pytest.approx(reference_ms_ssim(a, b, scales), abs=2e-4)


@pytest.mark.parametrize("side", [11, 21, 22, 43, 44, 98, 99, 175, 176])
def test_ms_ssim_at_the_sizes_where_the_scales_change(side: int) -> None:
    a = picture(noise(0, side))
    assert ms_ssim(a, a) == pytest.approx(1.0, abs=1e-6)
    assert ms_ssim(a, picture(noise(1, side))) < 0.5


def test_ms_ssim_refuses_what_no_window_fits_into() -> None:
    with pytest.raises(UsageError, match="at least 11 pixels"):
        ms_ssim(picture(noise(0, 10)), picture(noise(0, 10)))


class Edges(Extractor):
    """A network of two stages that can be computed by hand: the image, and its 4 x 4 means."""

    name = "edges"

    @classmethod
    def load(cls) -> "Edges":
        return cls()

    def features(self, images: torch.Tensor) -> Features:
        return Features(images.mean((2, 3)), images[:, :, ::8, ::8].flatten(1), None)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, torch.nn.functional.avg_pool2d(images, 4)]


def test_feature_distance_against_numpy(apple: Image.Image) -> None:
    other = noisy(apple, 20)
    distances = []
    for block in (1, 4):
        a, b = (np.asarray(z) / 255 for z in (apple, other))
        a, b = (z.reshape(96 // block, block, 96 // block, block, 3).mean((1, 3)) for z in (a, b))
        a, b = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
        distances.append(np.mean(np.sum((a - b) ** 2, -1)))
    assert feature_distance(apple, other, Edges()) == pytest.approx(np.mean(distances), rel=1e-4)


def test_feature_distance_is_zero_for_identical_pictures_and_grows_with_noise(apple: Image.Image) -> None:
    values = [feature_distance(apple, noisy(apple, sigma), Edges()) for sigma in (0, 5, 20, 60)]
    assert values[0] == 0
    assert values == sorted(values)
    assert len(set(values)) == 4


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for torchvision with an untrained AlexNet; returns the folder where its weights are looked for."""

    def alexnet(weights: object) -> ModuleType:
        torch.manual_seed(0)
        relu, pool, conv = torch.nn.ReLU, lambda: torch.nn.MaxPool2d(3, 2), torch.nn.Conv2d
        stub = ModuleType("alexnet")
        stub.features = torch.nn.Sequential(  # type: ignore[attr-defined]
            conv(3, 64, 11, 4, 2), relu(), pool(), conv(64, 192, 5, 1, 2), relu(), pool(),
            conv(192, 384, 3, 1, 1), relu(), conv(384, 256, 3, 1, 1), relu(), conv(256, 256, 3, 1, 1), relu(), pool(),
        )  # fmt: skip
        return stub

    package = ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", None)
    package.models = SimpleNamespace(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT=None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fidelity, "_lpips_network", cache(fidelity._lpips_network.__wrapped__))
    return tmp_path / "checkpoints"


def test_lpips_runs_where_the_weights_are(torchvision: Path, apple: Image.Image) -> None:
    torchvision.mkdir()
    (torchvision / "alexnet-owt-7be5be79.pth").touch()
    values = [lpips(apple, noisy(apple, sigma)) for sigma in (0, 5, 20, 60)]
    assert values[0] == 0
    assert values == sorted(values)
    assert len(set(values)) == 4


def test_lpips_without_weights_says_where_they_are_looked_for(torchvision: Path, apple: Image.Image) -> None:
    with pytest.raises(MissingWeights, match="alexnet-owt") as error:
        lpips(apple, apple)
    assert str(torchvision) in str(error.value)
    assert "the package" not in str(error.value)


def test_lpips_without_torchvision_names_it(monkeypatch: pytest.MonkeyPatch, apple: Image.Image) -> None:
    monkeypatch.setattr(fidelity, "find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match="the package torchvision"):
        lpips(apple, apple)


def test_latent_sqnr_by_step_is_that_of_each_step() -> None:
    z = torch.randn(2, 3, 4, 8, 8)
    other = z + torch.tensor([0.0, 0.01, 0.1])[:, None, None, None] * torch.randn(z.shape)
    found = latent_sqnr_by_step(z, other)
    assert found.shape == (2, 3)
    assert torch.equal(found[:, 0], torch.full((2,), 100.0, dtype=torch.float64))
    for i in range(2):
        for step in (1, 2):
            a, b = z[i, step].double().numpy(), other[i, step].double().numpy()
            assert found[i, step] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=1e-9)
            assert latent_sqnr_db(z[i, step], other[i, step]) == found[i, step]


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="one shape"):
        latent_sqnr_by_step(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))


@pytest.mark.parametrize("function", [psnr_db, ssim, ms_ssim, lpips, lambda a, b: feature_distance(a, b, Edges())])
def test_pictures_of_two_sizes_are_refused(function: Callable[[Image.Image, Image.Image], float]) -> None:
    with pytest.raises(UsageError, match="one size"):
        function(picture(noise(0, 24)), picture(noise(0, 32)))
