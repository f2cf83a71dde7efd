"""VBench (Huang et al. 2024), run by its own package in its own environment.

VBench pins versions that no current pipeline runs with, so it never shares ours: install it in an environment of its
own, fetch its weights there by running it once, and name that environment's Python::

    python3.10 -m venv vbench-env && vbench-env/bin/pip install vbench==0.1.5
    export DITQ_VBENCH_PYTHON=vbench-env/bin/python

VBench downloads the weights that it lacks, and reads them with pickle; that is between you and its package.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from ditq.errors import DitqError, UsageError, unknown
from ditq.metrics.metric import Description
from ditq.metrics.networks.base import MissingWeights

# The dimensions that VBench judges by the video alone; of the other nine, six need its own prompts and labels.
DIMENSIONS = {
    "subject_consistency": "Cosine of DINO features with the first and the previous frame.",
    "background_consistency": "Cosine of CLIP features with the first and the previous frame.",
    "temporal_flickering": "1 minus the mean absolute difference of consecutive frames; meant for videos at rest.",
    "motion_smoothness": "1 minus the mean absolute difference of every second frame and AMT's interpolation.",
    "dynamic_degree": "Share of videos with large optical flow (RAFT).",
    "aesthetic_quality": "LAION's predictor of aesthetic ratings, mean over frames.",
    "imaging_quality": "MUSIQ's predictor of technical quality, mean over frames.",
}
VBENCH = tuple(
    Description(f"vbench_{name}", f"VBench {name.replace('_', ' ')}", "", True, "temporal", about)
    for name, about in DIMENSIONS.items()
)
RUN = "ditq"  # VBench names its files after it
TAIL = 15  # lines of a failed run that are shown

# What runs over there. The command `vbench evaluate` ends with status 0 even where it failed, so this calls its API.
DRIVER = """
import json, sys, torch
from vbench import VBench
job = json.load(open(sys.argv[1]))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
bench = VBench(device, job["full_info"], job["output"])
bench.evaluate(videos_path=job["videos"], name=job["name"], dimension_list=job["dimensions"], mode="custom_input")
"""


@dataclass(frozen=True)
class Dimension:
    """What VBench says of some videos, from 0 to 1.

    Attributes:
        values: one for each video, in order.
        mean: as VBench prints it.
    """

    values: list[float]
    mean: float


def evaluate(
    videos: Sequence[Sequence[Image.Image]],
    fps: float,
    dimensions: Sequence[str] = tuple(DIMENSIONS),
    python: str | Path | None = None,
) -> dict[str, Dimension]:
    """VBench's numbers for videos of any prompts, as its ``custom_input`` mode gives them.

    Videos are written without loss (FFV1 in MP4, which VBench's readers understand): MPEG-4 at 64 px would change
    them more than quantization does.

    Args:
        fps: frames a second of the videos; VBench's dynamic degree looks at 8 a second.
        python: the Python of an environment with VBench; by default the environment variable DITQ_VBENCH_PYTHON.

    Raises:
        UsageError: an unknown dimension, no videos, or frames with an odd side or of several sizes.
        MissingWeights: there is no such environment, or OpenCV is not installed.
        DitqError: VBench failed (with the end of what it printed), or wrote something else than its version 0.1.5.
    """
    for dimension in dimensions:
        if dimension not in DIMENSIONS:
            raise unknown("VBench dimension", dimension, DIMENSIONS, "The others need VBench's own prompts.")
    if not videos:
        raise UsageError("there are no videos for VBench to judge")
    executable = _python(python)
    with TemporaryDirectory(prefix="ditq-vbench-") as folder:
        clips, output = Path(folder, "videos"), Path(folder, "results")
        clips.mkdir()
        names = [f"{i:06d}.mp4" for i in range(len(videos))]
        for name, frames in zip(names, videos, strict=True):
            write_video(clips / name, frames, fps)
        job = {
            "videos": str(clips), "output": str(output), "name": RUN, "dimensions": list(dimensions), "full_info": "",
        }  # fmt: skip
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        run = subprocess.run(
            [executable, "-c", DRIVER, "job.json"], cwd=folder, capture_output=True, text=True, errors="replace"
        )
        if run.returncode:
            tail = "\n".join((run.stderr or run.stdout).splitlines()[-TAIL:])
            raise DitqError(f"VBench ended with status {run.returncode}. The end of what it printed:\n{tail}")
        result = output / f"{RUN}_eval_results.json"
        if not result.exists():
            raise DitqError(f"VBench ended well but wrote no {result.name}; this adapter is for VBench 0.1.5.")
        return parse(json.loads(result.read_text(encoding="utf-8")), names, dimensions)


def write_video(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """Writes frames without loss, as FFV1 in MP4.

    Raises:
        UsageError: a side is odd (OpenCV would cut off a line in silence), or sizes differ.
        MissingWeights: OpenCV is not installed.
        DitqError: this OpenCV cannot write video.
    """
    try:
        import cv2
    except ImportError as e:
        raise MissingWeights(
            f"Writing videos needs OpenCV (cv2), which is not installed ({e}). "
            "Install the extra: pip install 'ditq[metrics]'."
        ) from e
    width, height = frames[0].size
    if width % 2 or height % 2 or any(frame.size != (width, height) for frame in frames):
        raise UsageError(f"VBench needs frames of one size with even sides, got {[f.size for f in frames][:3]} ...")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), fps, (width, height))
    if not writer.isOpened():
        raise DitqError("This OpenCV cannot write FFV1 video: it was built without FFmpeg.")
    for frame in frames:
        writer.write(cv2.cvtColor(np.array(frame.convert("RGB")), cv2.COLOR_RGB2BGR))
    writer.release()


def parse(results: Any, names: Sequence[str], dimensions: Sequence[str]) -> dict[str, Dimension]:
    """VBench's result file: ``{dimension: [mean, [{"video_path": ..., "video_results": ...}, ...]]}``, in any order.

    Raises:
        DitqError: it is of another form, or lacks a dimension or a video.
    """
    out = {}
    for dimension in dimensions:
        try:
            mean, rows = results[dimension]
            by_name = {Path(row["video_path"]).name: float(row["video_results"]) for row in rows}
            values = [by_name[name] for name in names]
            if not np.isfinite([mean, *values]).all():
                raise ValueError(f"not finite: {mean}, {values[:5]}")
        except (KeyError, TypeError, ValueError) as e:
            raise DitqError(
                f"VBench's result for {dimension} is not what version 0.1.5 writes, or lacks a video: {e!r}"
            ) from e
        # Of this one VBench divides the mean by 100, but not the values of the videos.
        scale = 100 if dimension == "imaging_quality" else 1
        out[dimension] = Dimension([value / scale for value in values], float(mean))
    return out


def _python(python: str | Path | None) -> str:
    chosen = python or os.environ.get("DITQ_VBENCH_PYTHON")
    if not chosen:
        raise MissingWeights(
            "VBench runs in an environment of its own, and none is named. Create one, `pip install vbench==0.1.5` in "
            "it, and set DITQ_VBENCH_PYTHON to its python."
        )
    found = shutil.which(chosen)
    if found is None:
        raise MissingWeights(f"There is no {chosen}, which should be the python of an environment with VBench.")
    return str(Path(found).absolute())
