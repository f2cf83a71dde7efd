"""VBench (Huang et al. 2024), run by its own package in its own environment.

VBench pins versions that no current pipeline runs with. Install it in a separate environment, run it there once to
download its weights, and name that environment's Python::

    python3.10 -m venv vbench-env && vbench-env/bin/pip install vbench==0.1.5
    export DITQ_VBENCH_PYTHON=vbench-env/bin/python

VBench downloads missing weights and reads them with pickle, which can execute code: use it only if you trust it.
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

# The dimensions that VBench computes from the video alone; six of the other nine need its own prompts and labels.
DIMENSIONS = {
    "subject_consistency": "Cosine of DINO features with the first and the previous frame.",
    "background_consistency": "Cosine of CLIP features with the first and the previous frame.",
    "temporal_flickering": "1 minus the mean absolute difference of consecutive frames; meant for static videos.",
    "motion_smoothness": "1 minus the mean absolute difference of every second frame and AMT's interpolation.",
    "dynamic_degree": "Share of videos with large optical flow (RAFT).",
    "aesthetic_quality": "LAION's predictor of aesthetic ratings, mean over frames.",
    "imaging_quality": "MUSIQ's predictor of technical quality, mean over frames.",
}
VBENCH = tuple(
    Description(f"vbench_{name}", f"VBench {name.replace('_', ' ')}", "", True, "temporal", about)
    for name, about in DIMENSIONS.items()
)
RUN = "ditq"  # the name of the run, with which VBench's files start
TAIL = 15  # the number of output lines in the error of a failed run

# The program that runs in VBench's environment. It calls the API, because `vbench evaluate` exits with status 0 even
# when it failed.
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
    """VBench's result for one dimension, from 0 to 1.

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
    """VBench's results for videos of any prompts, by its ``custom_input`` mode.

    Videos are written losslessly (FFV1 in MP4, which VBench can read): MPEG-4 at 64 px would change them more than
    quantization does.

    Args:
        videos: the frames of each video.
        fps: frames per second of the videos; VBench's dynamic degree samples 8 per second.
        dimensions: names of :data:`DIMENSIONS`.
        python: the Python of an environment with VBench; by default the environment variable DITQ_VBENCH_PYTHON.

    Raises:
        UsageError: an unknown dimension, no videos, or frames with an odd side or of several sizes.
        MissingWeights: there is no such environment, or OpenCV is not installed.
        DitqError: VBench failed, or its output is not that of version 0.1.5.
    """
    for dimension in dimensions:
        if dimension not in DIMENSIONS:
            raise unknown("VBench dimension", dimension, DIMENSIONS, "The others need VBench's own prompts.")
    if not videos:
        raise UsageError("there are no videos for VBench to evaluate")
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
            raise DitqError(f"VBench exited with status {run.returncode}. The end of its output:\n{tail}")
        result = output / f"{RUN}_eval_results.json"
        if not result.exists():
            raise DitqError(f"VBench succeeded but wrote no {result.name}; this adapter supports VBench 0.1.5.")
        return parse(json.loads(result.read_text(encoding="utf-8")), names, dimensions)


def write_video(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """Writes frames losslessly, as FFV1 in MP4.

    Raises:
        UsageError: a side is odd (OpenCV would silently cut off a line), or sizes differ.
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
    """Reads VBench's result file: ``{dimension: [mean, [{"video_path": ..., "video_results": ...}, ...]]}``.

    Args:
        results: the content of the file; its rows may be in any order.
        names: the files of the videos, in the order of the values to return.
        dimensions: the dimensions to read.

    Raises:
        DitqError: the file has another format, or lacks a dimension or a video.
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
        # For imaging quality VBench divides the mean by 100, but not the values of the videos.
        scale = 100 if dimension == "imaging_quality" else 1
        out[dimension] = Dimension([value / scale for value in values], float(mean))
    return out


def _python(python: str | Path | None) -> str:
    chosen = python or os.environ.get("DITQ_VBENCH_PYTHON")
    if not chosen:
        raise MissingWeights(
            "VBench runs in a separate environment, and none is set. Create one, run `pip install vbench==0.1.5` in "
            "it, and set DITQ_VBENCH_PYTHON to its python."
        )
    executable = shutil.which(chosen)
    if executable is None:
        raise MissingWeights(f"There is no {chosen}, which should be the python of an environment with VBench.")
    return str(Path(executable).absolute())
