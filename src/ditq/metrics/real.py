"""Real images or videos that distribution metrics compare with: the user's folder, or stored features."""

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
    """Real images, their features by network, or real videos."""

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
            UsageError: there are images only.
        """
        if not self.videos:
            raise UsageError(
                f"{self.name!r} are real images, not videos: pass --real FOLDER, a folder of GIF or MP4 files"
            )
        if network.name not in self._video_features:
            self._video_features[network.name] = [network(frames) for frames in self.videos]
        return self._video_features[network.name]

    def seen_by(self, network: Extractor) -> Features:
        """Features of the real images; computed once.

        Raises:
            UsageError: there are features of other networks only.
        """
        if network.name not in self.features:
            if not self.images:
                available = ", ".join(self.features)
                raise UsageError(
                    f"the real images {self.name!r} have features of {available} only, not of {network.name}"
                )
            self.features = {**self.features, network.name: network(self.images)}
        return self.features[network.name]


def from_folder(folder: Path, size: tuple[int, int]) -> Real:
    """All images of a folder, not of its subfolders, resized and centre-cropped to ``size`` (width, height).

    Raises:
        UsageError: the folder does not exist, it has fewer than two images, or an image cannot be read.
    """
    images = []
    for path in _files(folder, "image", SUFFIXES):
        try:
            with Image.open(path) as image:
                images.append(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))
        except (OSError, Image.DecompressionBombError) as error:
            raise UsageError(f"{path} is not a readable image: {error}.") from error
    return Real(folder.name, images)


def videos_from_folder(folder: Path, size: tuple[int, int]) -> Real:
    """All GIF and MP4 files of a folder, with frames resized and centre-cropped to ``size`` (width, height).

    Raises:
        UsageError: the folder does not exist, it has fewer than two videos, or a video cannot be read.
        MissingWeights: there is an MP4 file, but OpenCV is not installed.
    """
    videos = []
    for path in _files(folder, "video", VIDEO_SUFFIXES):
        frames = _gif(path) if path.suffix.lower() == ".gif" else _mp4(path)
        if not frames:
            raise UsageError(f"{path} is not a readable video.")
        videos.append([ImageOps.fit(frame, size, Image.Resampling.LANCZOS) for frame in frames])
    return Real(folder.name, videos=videos)


def _files(folder: Path, medium: str, suffixes: Sequence[str]) -> list[Path]:
    """The files of a folder with one of the suffixes, sorted.

    Raises:
        UsageError: the folder does not exist, or has fewer than two such files.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder of real {medium}s {folder}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(paths) < 2:
        count = f"{len(paths)} {medium}{'' if len(paths) == 1 else 's'}"
        raise UsageError(
            f"The folder of real {medium}s {folder} must have at least 2 ({', '.join(suffixes)}), it has {count}."
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
        has_frame, pixels = reader.read()
        if not has_frame:
            return frames
        frames.append(Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))


def from_features(name: str, network: str, path: Path) -> Real:
    """Stored features, from a safetensors file with ``pooled`` and ``spatial`` [n, ...].

    Raises:
        CheckpointError: the file is damaged, or its tensors differ in length.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        pooled, spatial = tensors["pooled"].float(), tensors["spatial"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} does not hold features of real images: {error}.") from error
    probabilities = tensors["probabilities"].float() if "probabilities" in tensors else None
    parts = [t for t in (pooled, spatial, probabilities) if t is not None]
    if any(t.ndim != 2 or len(t) != len(pooled) or not bool(torch.isfinite(t).all()) for t in parts):
        raise CheckpointError(f"The features of real images in {path} are damaged or do not fit together.")
    return Real(name, features={network: Features(pooled, spatial, probabilities)})
