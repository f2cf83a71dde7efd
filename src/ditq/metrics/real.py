"""Real images or videos that distribution metrics compare with: a folder of one's own, or features of a model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps, ImageSequence

from ditq.errors import CheckpointError, UsageError
from ditq.metrics.networks import Extractor, Features, MissingWeights

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".gif", ".mp4")


@dataclass
class Real:
    """Real images, or what networks saw in them; or real videos."""

    name: str
    images: Sequence[Image.Image] = ()
    features: Mapping[str, Features] = field(default_factory=dict)
    videos: Sequence[Sequence[Image.Image]] = ()
    _video_features: dict[str, list[Features]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.videos) or len(self.images) or max(map(len, self.features.values()), default=0)

    def videos_seen_by(self, network: Extractor) -> list[Features]:
        """Features of the frames of each real video; computed once.

        Raises:
            UsageError: these are images.
        """
        if not self.videos:
            raise UsageError(f"{self.name!r} are real images, not videos: --real FOLDER with GIF or MP4 files")
        if network.name not in self._video_features:
            self._video_features[network.name] = [network(frames) for frames in self.videos]
        return self._video_features[network.name]

    def seen_by(self, network: Extractor) -> Features:
        """Features of the real images; computed once.

        Raises:
            UsageError: there are only features of other networks.
        """
        if network.name not in self.features:
            if not self.images:
                seen = ", ".join(self.features)
                raise UsageError(f"the real images {self.name!r} were seen by {seen} only, not by {network.name}")
            self.features = {**self.features, network.name: network(self.images)}
        return self.features[network.name]


def from_folder(folder: Path, size: tuple[int, int]) -> Real:
    """All images of a folder (not of folders inside), resized and cropped from the middle to ``size`` (w, h).

    Raises:
        UsageError: there is no such folder, it has fewer than two images, or a file is no image.
    """
    images = []
    for path in _files(folder, "picture", SUFFIXES):
        try:
            with Image.open(path) as image:
                images.append(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))
        except (OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} is no image that can be read: {error}.") from error
    return Real(folder.name, images)


def videos_from_folder(folder: Path, size: tuple[int, int]) -> Real:
    """All GIF and MP4 files of a folder, frames resized and cropped from the middle to ``size`` (w, h).

    Raises:
        UsageError: there is no such folder, it has fewer than two videos, or one has no frames that can be read.
        MissingWeights: there is an MP4 file, and no OpenCV.
    """
    videos = []
    for path in _files(folder, "video", VIDEO_SUFFIXES):
        frames = _gif(path) if path.suffix.lower() == ".gif" else _mp4(path)
        if not frames:
            raise UsageError(f"{path} is no video that can be read.")
        videos.append([ImageOps.fit(frame, size, Image.Resampling.LANCZOS) for frame in frames])
    return Real(folder.name, videos=videos)


def _files(folder: Path, thing: str, suffixes: Sequence[str]) -> list[Path]:
    """Those of a folder that have one of the suffixes, sorted.

    Raises:
        UsageError: there is no such folder, or it has fewer than two.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder of real {thing}s {folder}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(paths) < 2:
        count = f"{len(paths)} {thing}{'' if len(paths) == 1 else 's'}"
        raise UsageError(
            f"The folder of real {thing}s {folder} must have at least 2 ({', '.join(suffixes)}), it has {count}."
        )
    return paths


def _gif(path: Path) -> list[Image.Image]:
    try:
        with Image.open(path) as image:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    except (OSError, Image.DecompressionBombError):
        return []


def _mp4(path: Path) -> list[Image.Image]:
    try:
        import cv2
    except ImportError as error:
        raise MissingWeights(f"Reading {path} needs OpenCV: pip install 'ditq[metrics]' ({error}).") from error
    reader = cv2.VideoCapture(str(path))
    frames: list[Image.Image] = []
    while True:
        more, pixels = reader.read()
        if not more:
            return frames
        frames.append(Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))


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
        raise CheckpointError(f"{path} holds no features of real images: {error}.") from error
    probabilities = tensors["probabilities"].float() if "probabilities" in tensors else None
    parts = [t for t in (pooled, spatial, probabilities) if t is not None]
    if any(t.ndim != 2 or len(t) != len(pooled) or not bool(torch.isfinite(t).all()) for t in parts):
        raise CheckpointError(f"The features of real images in {path} are damaged or do not fit together.")
    return Real(name, features={network: Features(pooled, spatial, probabilities)})
