"""ImageReward (Xu et al. 2023): a learned preference for an image given its prompt, from the authors' package.

The package pins its dependencies, so it is not an extra of ditq: install it with ``pip install image-reward`` where
its pins allow. It reads its checkpoint with ``torch.load``. Before torch 2.6 this can execute code in the file, so use
only the authors' file (``THUDM/ImageReward`` on the Hub).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ditq.metrics.metric import Description
from ditq.metrics.networks.base import MissingWeights

FILES = ("ImageReward.pt", "med_config.json")

IMAGE_REWARD = Description(
    "image_reward", "ImageReward", "", True, "alignment",
    "Human preference for an image given its prompt, as learned by a reward model (Xu et al. 2023): about -2 to 2, "
    "mean 0 on its training set.",
)  # fmt: skip


class ImageReward:
    """The reward model. Its weights are read from a folder and never downloaded.

    The files ``ImageReward.pt`` and ``med_config.json`` are read from the folder in the environment variable
    ``DITQ_WEIGHTS``, else from ``~/.cache/ImageReward``, where the package itself stores them. The package takes the
    vocabulary of ``bert-base-uncased`` from the Hub's cache, or downloads it.

    Raises:
        MissingWeights: the package or a file is not on this machine.
    """

    name = "ImageReward-v1.0"

    def __init__(self, device: str = "cpu") -> None:
        checkpoint, config = _files()
        try:
            from ImageReward import load
        except ImportError as e:
            raise MissingWeights(
                f"ImageReward needs the package image-reward, which is not installed or cannot be imported ({e}). "
                "Install it: pip install image-reward."
            ) from e
        try:
            self.model = load(str(checkpoint), device=device, med_config=str(config))
        except OSError as e:  # raised by transformers if the tokenizer is missing
            raise MissingWeights(
                f"ImageReward needs the tokenizer of bert-base-uncased in the Hub's cache: {e}"
            ) from e

    def score(self, item: Image.Image | Sequence[Image.Image], prompt: str) -> float:
        """The reward of an image for its prompt, or the mean over the frames of a video."""
        frames = [item] if isinstance(item, Image.Image) else item
        return float(sum(self.model.score(prompt, frame) for frame in frames) / len(frames))


def _files() -> tuple[Path, Path]:
    folders = [Path(os.environ["DITQ_WEIGHTS"])] if os.environ.get("DITQ_WEIGHTS") else []
    folders.append(Path.home() / ".cache" / "ImageReward")
    for folder in folders:
        if all((folder / name).is_file() for name in FILES):
            return folder / FILES[0], folder / FILES[1]
    raise MissingWeights(
        f"ImageReward needs {' and '.join(FILES)} of THUDM/ImageReward in one folder; looked in "
        f"{', '.join(map(str, folders))}. Fetch them with `hf download THUDM/ImageReward {' '.join(FILES)} "
        "--local-dir FOLDER`, and set DITQ_WEIGHTS to FOLDER."
    )
