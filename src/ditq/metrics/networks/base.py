"""The base class of the feature networks of metrics. A network's name is always printed beside the number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ditq.errors import DitqError
from ditq.metrics.picture import to_tensor


class MissingWeights(DitqError):  # noqa: N818
    """A network or package that a metric needs is not on this machine. The message says how to install it."""


@dataclass(frozen=True)
class Features:
    """A network's features of n images, float32 on the CPU.

    Attributes:
        pooled: [n, d], for FID, KID, precision and recall.
        spatial: [n, s], a few channels of an earlier layer at all positions, for sFID (Nash et al. 2021).
        probabilities: [n, classes], for the Inception Score; None if the network has no classes.
    """

    pooled: Tensor
    spatial: Tensor
    probabilities: Tensor | None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Features:
        return Features(*(None if part is None else part[rows] for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    @staticmethod
    def cat(batches: Sequence[Features]) -> Features:
        """The features of several batches, in order."""
        columns = zip(*(batch._parts() for batch in batches), strict=True)
        return Features(*(None if c[0] is None else torch.cat([t for t in c if t is not None]) for c in columns))  # type: ignore[arg-type]


class Extractor(ABC):
    """A network that computes features of images, on the device of the images. It returns them on the CPU.

    Attributes:
        name: printed beside every number it is used for, e.g. ``"emoji-classifier"``.
        labels: the names of the classes of ``probabilities``; empty if classes have no names.
    """

    name: ClassVar[str]
    labels: Sequence[str] = ()

    @classmethod
    @abstractmethod
    def load(cls) -> Self:
        """The network with its trained weights.

        Raises:
            MissingWeights: its package or its weights are not on this machine.
        """

    @abstractmethod
    def features(self, images: Tensor) -> Features:
        """Features of one batch [n, 3, H, W] float32 in [0, 1]; resizes and normalises it for the network."""

    @abstractmethod
    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps [n, c_i, h_i, w_i] from early to late, for distances between two images."""

    def __call__(self, images: Sequence[Image.Image], batch_size: int = 64) -> Features:
        """Features of any number of images of one size, batch by batch, without gradients."""
        with torch.no_grad():
            return Features.cat([
                self.features(torch.stack([to_tensor(image) for image in images[i : i + batch_size]]))
                for i in range(0, len(images), batch_size)
            ])  # fmt: skip


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes bilinearly with antialias, in [0, 1]. Images of the right size are returned unchanged."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
