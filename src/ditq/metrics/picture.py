"""Images as tensors, the input of every metric and every network."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditq.errors import UsageError


def to_tensor(image: Image.Image) -> Tensor:
    """An image as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def pair(reference: Image.Image, other: Image.Image) -> tuple[Tensor, Tensor]:
    """Two images as float32 [1, 3, H, W] in [0, 1].

    Raises:
        UsageError: they differ in size.
    """
    if reference.size != other.size:
        raise UsageError(f"two images must have one size, got {reference.size} and {other.size}")
    return to_tensor(reference)[None], to_tensor(other)[None]
