"""Metrics of images with a value for each prompt, as sensitivity measurements take them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics.measure import MEASURES, measure
from ditq.metrics.per_image import DECIBELS, image_metrics
from ditq.sampling import Samples


def samples(noise: float = 0.0, n: int = 3) -> Samples:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    pixels = rng.uniform(0, 255, (n, 24, 24, 3)) + noise * rng.standard_normal((n, 24, 24, 3))
    images = [Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in pixels]
    trajectory = torch.randn(n, 2, 4, 2, 2, generator=generator)
    trajectory = trajectory + 0.01 * noise * torch.randn(trajectory.shape, generator=generator)
    return Samples([f"prompt {i}" for i in range(n)], list(range(n)), images, trajectory, [900.0, 100.0], [0.1] * n)


def test_values_of_every_prompt_are_those_of_compare() -> None:
    names = ["psnr_db", "ssim", "latent_sqnr_db"]
    metrics = image_metrics(names)
    assert metrics.measure is not None
    found = metrics.measure(samples(), samples(20))
    assert list(found) == names
    assert found == measure(samples(), {"other": samples(20)}, metrics=names).values["other"]
    assert all(len(values) == 3 for values in found.values())
    for i, (image, clean) in enumerate(zip(samples(20).images, samples().images, strict=True)):
        error = np.mean((np.asarray(image, float) - np.asarray(clean, float)) ** 2)
        assert found["psnr_db"][i] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "higher"),
    [
        ("psnr_db", "decibel", True),
        ("latent_sqnr_db", "decibel", True),
        ("ssim", "paired", True),
        ("lpips", "paired", False),
        ("clip_score", "own", True),
        ("warping_error", "own", False),
    ],
)
def test_kinds(name: str, kind: str, higher: bool) -> None:
    made = image_metrics([name]).kinds[name]
    assert (made.kind, made.higher_is_better) == (kind, higher)
    assert made.title == next(m.description.title for m in MEASURES if m.description.name == name)


def test_every_metric_with_a_value_for_each_prompt_is_known() -> None:
    names = [m.description.name for m in MEASURES if m.kind != "set"]
    kinds = image_metrics(names).kinds
    assert list(kinds) == names
    assert {name for name, kind in kinds.items() if kind.kind == "decibel"} == set(DECIBELS)
    assert {name for name in names if name.endswith("_db")} == set(DECIBELS)


@pytest.mark.parametrize("name", [m.description.name for m in MEASURES if m.kind == "set"])
def test_metrics_of_whole_sets_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} has one value for all images.*psnr_db, ") as error:
        image_metrics(["psnr_db", name])
    assert f" {name}," not in str(error.value)


def test_unknown_metrics_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Unknown metric 'psnr'.*psnr_db"):
        image_metrics(["psnr"])


def test_no_metric_is_none() -> None:
    assert image_metrics([]).kinds == {}
