"""Drawn images and videos on disk, one file each, so that metrics, reports and searches never draw twice."""

from __future__ import annotations

import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditq import digests
from ditq.files import atomic
from ditq.folders import cache_root

Video = list[Image.Image]

# The oldest files go when the cache grows beyond this; DITQ_CACHE_BYTES sets another limit.
LIMIT = 20 * 1024**3


@dataclass
class Sample:
    """One drawn image or video.

    Attributes:
        image: an image, or the frames of a video.
        trajectory: float32 [steps, ...], the latents after every step.
        seconds: wall time of the batch divided by its size, measured when it was drawn.
    """

    picture: Image.Image | Video
    trajectory: Tensor
    timesteps: list[float]
    seconds: float


class PictureCache:
    """A folder of samples. A file that is damaged counts as absent and is drawn again."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_root() / "pictures"
        self.limit = limit if limit is not None else int(os.environ.get("DITQ_CACHE_BYTES", LIMIT))

    @staticmethod
    def key(fingerprint: str, condition: Any, seed: int, sampler: dict[str, Any]) -> str:
        """The name of one sample: changes with the pipeline, what to draw, its noise and how it is sampled."""
        content = json.dumps([fingerprint, condition, seed, sampler], sort_keys=True, default=repr)
        return digests.of_text(content, 32)

    def get(self, key: str) -> Sample | None:
        """The sample of this name, if it is there and whole."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["sample"])
                frames, trajectory = file.get_tensor("frames"), file.get_tensor("trajectory")
            if info["checksum"] != _checksum(frames, trajectory):
                return None
            images = [Image.fromarray(frame.numpy()) for frame in frames]
            with suppress(OSError):
                os.utime(path)  # the oldest to be used is the first to go
            return Sample(
                images if info["video"] else images[0], trajectory, list(info["timesteps"]), float(info["seconds"])
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError):
            return None

    def put(self, key: str, sample: Sample) -> None:
        """Adds a sample; a cache that cannot be written (full disk, read-only) is no reason to stop drawing."""
        video = not isinstance(sample.picture, Image.Image)
        images = sample.picture if isinstance(sample.picture, list) else [sample.picture]
        frames = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        trajectory = sample.trajectory.contiguous()
        info = {
            "video": video,
            "timesteps": sample.timesteps,
            "seconds": sample.seconds,
            "checksum": _checksum(frames, trajectory),
        }
        path = self._path(key)
        with suppress(OSError, SafetensorError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                save_file({"frames": frames, "trajectory": trajectory}, temporary, {"sample": json.dumps(info)})

    def prune(self) -> None:
        """Deletes the samples that were not used for longest, until the rest fits the limit."""
        files = [(path.stat(), path) for path in self.folder.rglob("*.safetensors")]
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda entry: entry[0].st_mtime):
            if total <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
                total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _checksum(*tensors: Tensor) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.contiguous().numpy().tobytes(), checksum)
    return checksum
