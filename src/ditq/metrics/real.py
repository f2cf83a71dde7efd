"""Real pictures that distribution metrics compare with: a folder of one's own, or features that come with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ditq.errors import CheckpointError, UsageError
from ditq.metrics.extractors import Extractor, Features

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class Real:
    """Real pictures, or what networks saw in them."""

    name: str
    images: Sequence[Image.Image] = ()
    features: Mapping[str, Features] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images) or max(map(len, self.features.values()), default=0)

    def seen_by(self, network: Extractor) -> Features:
        """Features of the real pictures; computed once.

        Raises:
            UsageError: there are only features of other networks.
        """
        if network.name not in self.features:
            if not self.images:
                seen = ", ".join(self.features)
                raise UsageError(f"the real pictures {self.name!r} were seen by {seen} only, not by {network.name}")
            self.features = {**self.features, network.name: network(self.images)}
        return self.features[network.name]


def from_folder(folder: Path, size: tuple[int, int]) -> Real:
    """All pictures of a folder (not of folders inside), resized and cropped from the middle to ``size`` (w, h).

    Raises:
        UsageError: there is no such folder, it has fewer than two pictures, or a file is no picture.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder of real pictures {folder}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise UsageError(f"The folder of real pictures {folder} has {len(paths)} pictures ({', '.join(SUFFIXES)}).")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))
        except (OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} is no picture that can be read: {error}.") from error
    return Real(folder.name, images)


def from_features(name: str, network: str, path: Path) -> Real:
    """Features that were computed before, from a safetensors file with ``pooled`` and ``spatial`` [n, ...].

    Raises:
        CheckpointError: the file is damaged, or its tensors do not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        pooled, spatial = tensors["pooled"].float(), tensors["spatial"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} holds no features of real pictures: {error}.") from error
    probabilities = tensors["probabilities"].float() if "probabilities" in tensors else None
    parts = [t for t in (pooled, spatial, probabilities) if t is not None]
    if any(t.ndim != 2 or len(t) != len(pooled) or not bool(torch.isfinite(t).all()) for t in parts):
        raise CheckpointError(f"The features of real pictures in {path} are damaged or do not fit together.")
    return Real(name, features={network: Features(pooled, spatial, probabilities)})
