"""Generated images and videos on disk, one file each, so that metrics, reports and searches reuse them."""

from __future__ import annotations

import json
import os
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
from ditq.errors import UsageError, warn
from ditq.files import atomic
from ditq.folders import cache_root
from ditq.reading import cut, short

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
    """A folder of samples. A damaged file causes a warning, and its sample is generated again."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_root() / "pictures"
        self._warned = False
        self.limit = limit if limit is not None else _limit()

    @staticmethod
    def key(fingerprint: str, condition: Any, seed: int, sampler: dict[str, Any], batch: int) -> str:
        """The name of one sample, a hash of everything that its values depend on.

        Args:
            fingerprint: of the pipeline.
            batch: number of samples in its call. With it, and with the number of threads, the order of float sums
                changes, and with few bits a rounding error becomes another code.
        """
        content = [fingerprint, condition, seed, sampler, batch, torch.get_num_threads()]
        return digests.of_text(json.dumps(content, sort_keys=True, default=repr), 32)

    def get(self, key: str) -> Sample | None:
        """The sample of this name; None, with a warning if its file is damaged, if there is none."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                info = json.loads(file.metadata()["sample"])
                frames, trajectory = file.get_tensor("frames"), file.get_tensor("trajectory")
            if info.pop("checksum") != _checksum(key, info, frames, trajectory):
                raise ValueError("its checksum is another")
            images = [Image.fromarray(frame.numpy()) for frame in frames]
            sample = Sample(
                images if info["video"] else images[0], trajectory, list(info["timesteps"]), float(info["seconds"])
            )
        except _DAMAGES as error:
            warn(f"{path} in the image cache is damaged ({cut(str(error))}); the image is generated again.")
            return None
        with suppress(OSError):
            os.utime(path)  # prune() deletes by this time
        return sample

    def put(self, key: str, sample: Sample) -> None:
        """Adds a sample. A cache that cannot be written (full disk, read-only) is a warning; the sampling goes on."""
        video = not isinstance(sample.image, Image.Image)
        images = sample.image if isinstance(sample.image, list) else [sample.image]
        frames = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        trajectory = sample.trajectory.contiguous()
        info = {"video": video, "timesteps": sample.timesteps, "seconds": sample.seconds}
        info["checksum"] = _checksum(key, info, frames, trajectory)
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as temporary:
                save_file({"frames": frames, "trajectory": trajectory}, temporary, {"sample": json.dumps(info)})
        except (OSError, SafetensorError) as error:
            if not self._warned:
                self._warned = True
                warn(
                    f"The image cache {self.folder} cannot be written ({getattr(error, 'strerror', None) or error}): "
                    "images are not kept. Free some space, set DITQ_CACHE to another folder, or leave the cache out "
                    "(--no-cache)."
                )

    def prune(self) -> None:
        """Deletes the least recently used samples until the cache is within its limit."""
        files = []
        for path in self.folder.rglob("*.safetensors"):
            with suppress(OSError):  # another process has deleted it
                files.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda entry: entry[0].st_mtime):
            if total <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
                total -= stat.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


_DAMAGES = (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError)


def _checksum(key: str, info: dict[str, Any], frames: Tensor, trajectory: Tensor) -> str:
    """Covers all of a file, and its name: a renamed file would be another image."""
    return digests.of_json([key, info, digests.of_tensor(frames), digests.of_tensor(trajectory)])


def _limit() -> int:
    """``DITQ_CACHE_BYTES``, or the default if it is unset or empty.

    Raises:
        UsageError: it is not a whole number of bytes.
    """
    text = os.environ.get("DITQ_CACHE_BYTES", "").strip()
    if not text:
        return LIMIT
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError(
            f"DITQ_CACHE_BYTES must be a whole number of bytes, at least 0, e.g. {LIMIT}; got {short(text)}."
        )
    return int(text)
