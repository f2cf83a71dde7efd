"""Inception v3 as used for published FID (Heusel et al. 2017), in torch-fidelity's port of the TensorFlow graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.metrics.networks.base import Extractor, Features, MissingWeights
from ditq.trace.hooks import all_hooked, hooked

FILE = "weights-inception-2015-12-05-6726825d.pth"
# "mixed_6/conv:0" of the graph, after its ReLU: the layer that ADM's evaluator uses for sFID.
SPATIAL = "Mixed_6d.branch1x1"
STAGES = ("MaxPool_1", "MaxPool_2", "Mixed_5d", "Mixed_6e", "Mixed_7c")


class InceptionV3(Extractor):
    """The network of published FID, sFID, KID and Inception Score values.

    It resizes 8-bit images itself, to 299 x 299, bilinear without antialias, as in TensorFlow 1. As in the evaluators
    of the papers, ``pooled`` has 2048 features, ``spatial`` 7 x 17 x 17 (Nash et al. 2021), and ``probabilities`` are
    the softmax of the 1008 logits without their bias.
    """

    name: ClassVar[str] = "inception-v3"

    def __init__(self, weights: str | Path) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
        self.network.eval().requires_grad_(False)

    @classmethod
    def load(cls) -> InceptionV3:
        folders = [Path(torch.hub.get_dir()) / "checkpoints"]
        if weights_folder := os.environ.get("DITQ_WEIGHTS"):
            folders.insert(0, Path(weights_folder))
        file = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
        try:
            import torch_fidelity  # noqa: F401

            missing = []
        except ImportError as e:
            missing = [f"the package torch-fidelity ({e})"]
        if file is None:
            missing.append(f"the file {FILE}")
        if file is None or missing:
            raise MissingWeights(
                f"The feature network {cls.name!r} needs torch-fidelity and its weights; missing: "
                f"{' and '.join(missing)}. ditq downloads nothing: put the file, from torch-fidelity's release 0.2.0, "
                f"into {' or '.join(map(str, folders))}, or set DITQ_WEIGHTS to its folder."
            )
        return cls(file)

    def features(self, images: Tensor) -> Features:
        (pooled, logits), maps = self._run(images, [SPATIAL])
        spatial = maps[0][:, :7].flatten(1)
        return Features(pooled.cpu(), spatial.cpu(), logits.softmax(1).cpu())

    def stages(self, images: Tensor) -> list[Tensor]:
        return self._run(images, STAGES)[1]

    def _run(self, images: Tensor, layers: list[str] | tuple[str, ...]) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        """Pooled features and logits, and the outputs of the named layers."""
        maps: list[Tensor] = []
        network = self.network.to(images.device)

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            maps.append(output)

        with all_hooked(hooked(network.get_submodule(name), after=keep) for name in layers):
            return network((images * 255).round().byte()), maps


NETWORK = InceptionV3
