"""Images as numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics.picture import pair, to_tensor


def test_a_picture_becomes_rgb_between_0_and_1() -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    tensor = to_tensor(Image.fromarray(values))
    assert (tensor.shape, tensor.dtype) == ((3, 4, 6), torch.float32)
    np.testing.assert_array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), values)
    grey = to_tensor(Image.new("L", (2, 2), 51))
    assert grey.shape == (3, 2, 2)
    assert grey.unique().tolist() == pytest.approx([0.2])


def test_a_pair_has_one_size() -> None:
    a, b = pair(Image.new("RGB", (3, 2)), Image.new("RGB", (3, 2), "white"))
    assert a.shape == b.shape == (1, 3, 2, 3)
    assert (a.sum(), b.sum()) == (0, 18)
    with pytest.raises(UsageError, match="one size"):
        pair(Image.new("RGB", (3, 2)), Image.new("RGB", (2, 3)))
