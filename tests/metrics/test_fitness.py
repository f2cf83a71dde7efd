"""Distances to real images as a fitness."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ditq.errors import UsageError
from ditq.metrics import distribution
from ditq.metrics.fitness import distance_to_real
from ditq.metrics.networks import Extractor, Features
from ditq.metrics.real import Real
from ditq.sampling import Samples


class Corners(Extractor):
    """Sees the colours of two pixels."""

    name = "corners"

    @classmethod
    def load(cls) -> Corners:
        return cls()

    def features(self, images: Tensor) -> Features:
        seen = images[:, :, [0, -1], [0, -1]].flatten(1)
        return Features(seen, seen.clone(), None)

    def stages(self, images: Tensor) -> list[Tensor]:
        return [images]


def pictures(seed: int, n: int = 30, brightness: float = 1.0) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    arrays = (torch.rand(n, 4, 4, 3, generator=generator) * 255 * brightness).byte().numpy()
    return [Image.fromarray(array) for array in arrays]


def drawn(images: list[Image.Image], latents: Tensor | None = None) -> Samples:
    n = len(images)
    trajectory = torch.zeros(n, 1, 4) if latents is None else latents
    return Samples([""] * n, list(range(n)), images, trajectory, [0.0], [0.0] * n)


@pytest.mark.parametrize("metric", ["kid", "fid", "sfid"])
def test_fitness_is_the_metric_and_ranks_by_it(metric: str) -> None:
    real = Real("noise", pictures(0))
    fitness = distance_to_real(metric, real, Corners())
    near, far = pictures(1), pictures(1, brightness=0.25)
    expected = getattr(distribution, metric)(Corners()(real.images), Corners()(far)).value  # type: ignore[arg-type]
    assert fitness.score(drawn(near), drawn(far)) == pytest.approx(expected)
    assert fitness.score(drawn(near), drawn(near)) < expected
    assert fitness.sees == "pictures"


def test_pictures_from_nan_are_the_worst() -> None:
    fitness = distance_to_real("kid", Real("noise", pictures(0)), Corners())
    assert fitness.score(drawn(pictures(1)), drawn(pictures(1), torch.full((30, 1, 4), float("nan")))) == math.inf


def test_its_name_changes_with_the_real_pictures(tmp_path: Path) -> None:
    names = {distance_to_real("kid", Real("noise", pictures(seed)), Corners()).name for seed in (0, 1)}
    assert len(names) == 2
    for i, image in enumerate(pictures(0)):
        image.resize((8, 8)).save(tmp_path / f"{i:02d}.png")
    folder = distance_to_real("kid", tmp_path, Corners())
    (tmp_path / "00.png").unlink()
    assert distance_to_real("kid", tmp_path, Corners()).name != folder.name
    assert math.isfinite(folder.score(drawn(pictures(1)), drawn(pictures(1))))


def test_unknown_metric_names_the_known() -> None:
    with pytest.raises(UsageError, match="Known: fid, kid, sfid"):
        distance_to_real("beauty", Real("noise", pictures(0)), Corners())
