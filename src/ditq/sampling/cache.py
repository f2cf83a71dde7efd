"""Generated images and videos on disk, one file each, so that metrics, reports and searches reuse them."""

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
from ditq.errors import UsageError
from ditq.files import atomic
from ditq.folders import cache_root

Video = list[Image.Image]

# Above this size, the least recently used files are deleted. DITQ_CACHE_BYTES overrides it.
LIMIT = 20 * 1024**3


@dataclass
class Sample:
    """One generated image or video.

    Attributes:
        image: an image, or the frames of a video.
        trajectory: float32 [steps, ...], the latents after every step.
        timesteps: the timestep of every step.
        seconds: wall time of the batch divided by its size, measured when it was generated.
    """

    image: Image.Image | Video
    trajectory: Tensor
    timesteps: list[float]
    seconds: float


class PictureCache:
    """A folder of samples. A damaged file counts as missing, and its sample is generated again."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_root() / "pictures"
        self.limit = limit if limit is not None else _limit()

    @staticmethod
    def key(fingerprint: str, condition: Any, seed: int, sampler: dict[str, Any]) -> str:
        """The name of one sample, a hash of the pipeline, the condition, the seed and the sampler settings."""
        content = json.dumps([fingerprint, condition, seed, sampler], sort_keys=True, default=repr)
        return digests.of_text(content, 32)

    def get(self, key: str) -> Sample | None:
        """The sample of this name; None if its file is missing or damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["sample"])
                frames, trajectory = file.get_tensor("frames"), file.get_tensor("trajectory")
            if info["checksum"] != _checksum(frames, trajectory):
                return None
            images = [Image.fromarray(frame.numpy()) for frame in frames]
            with suppress(OSError):
                os.utime(path)  # prune() deletes by this time
            return Sample(
                images if info["video"] else images[0], trajectory, list(info["timesteps"]), float(info["seconds"])
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError):
            return None

    def put(self, key: str, sample: Sample) -> None:
        """Adds a sample. A cache that cannot be written (full disk, read-only) does not stop the sampling."""
        video = not isinstance(sample.image, Image.Image)
        images = sample.image if isinstance(sample.image, list) else [sample.image]
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
        """Deletes the least recently used samples until the cache is within its limit."""
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


def _limit() -> int:
    """``DITQ_CACHE_BYTES``, or the default if it is unset or empty.

    Raises:
        UsageError: it is not a whole number of bytes.
    """
    text = os.environ.get("DITQ_CACHE_BYTES", "").strip()
    if not text:
        return LIMIT
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"DITQ_CACHE_BYTES must be a whole number of bytes, at least 0, e.g. {LIMIT}; got {text!r}.")
    return int(text)


def _checksum(*tensors: Tensor) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.contiguous().numpy().tobytes(), checksum)
    return checksum
