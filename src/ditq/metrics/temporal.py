"""Motion and its faults in a video: flow, flicker, consistency, FVD.

Every function takes one video: its frames, their `Motion`, or their features in a network (``Features.pooled``, one
row per frame). Motion and features are computed once for all metrics.

Papers use other networks: RAFT for flow, AMT for smoothness, DINO for subjects, I3D for FVD. Our metrics detect the
same faults and rank models alike, but their values are not comparable with published ones. The name of the network is
printed beside each number. For published numbers of VBench, see `ditq.metrics.adapters.vbench`.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ditq.errors import UsageError
from ditq.metrics.distribution import Estimate, fid, kid
from ditq.metrics.flow import Flow, flow, occluded, warp
from ditq.metrics.metric import Description
from ditq.metrics.networks.base import Features
from ditq.metrics.picture import to_tensor

Video = Sequence[Image.Image]

TEMPORAL = (
    Description(
        "delta_flow", "ΔFlow", "px", False, "temporal",
        "Absolute difference of the mean optical flow to the 16-bit model's, in pixels per frame (as in ViDiT-Q).",
    ),
    Description(
        "flow_score", "Flow score", "px", True, "temporal",
        "Mean optical flow in pixels per frame (EvalCrafter, Liu et al. 2024; here DIS flow, there RAFT). It measures "
        "the amount of motion, not its quality.",
    ),
    Description(
        "dynamic_degree", "Dynamic degree", "", True, "temporal",
        "Share of videos with large motion (VBench, Huang et al. 2024; here DIS flow, there RAFT).",
    ),
    Description(
        "warping_error", "Warping error", "", False, "temporal",
        "Mean squared difference of each frame and the next one warped back along the optical flow, where nothing is "
        "occluded (Lai et al. 2018): flicker and tearing.",
    ),
    Description(
        "motion_smoothness", "Motion smoothness", "", True, "temporal",
        "1 minus the mean absolute difference of every second frame and its interpolation from its neighbours "
        "(VBench; here along DIS flow, there by AMT).",
    ),
    Description(
        "clip_temp", "CLIP-temp", "", True, "temporal",
        "Mean cosine of CLIP embeddings of consecutive frames (EvalCrafter).",
    ),
    Description(
        "subject_consistency", "Subject consistency", "", True, "temporal",
        "Mean cosine of each frame's features with those of the first and of the previous frame (VBench; there DINO).",
    ),
    Description(
        "background_consistency", "Background consistency", "", True, "temporal",
        "The same as subject consistency, with CLIP embeddings (VBench).",
    ),
    Description(
        "scene_consistency", "Scene consistency", "", True, "temporal",
        "Share of frames in which the prompt's concept is among the first five classes of a classifier (VBench's "
        "scene; there a captioner, Tag2Text).",
    ),
    Description(
        "fvd", "Frame-FVD", "", False, "temporal",
        "Fréchet distance to real videos, on the mean of frame features over time and on their mean change (after "
        "Unterthiner et al. 2019; there I3D).",
    ),
    Description(
        "kvd", "Frame-KVD", "", False, "temporal",
        "Kernel distance to real videos on the same features (Unterthiner et al. 2019): unbiased on small sets.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Motion:
    """Optical flow between consecutive frames, T - 1 of each.

    Attributes:
        forward: from frame t to t + 1.
        backward: from frame t + 1 to t.
    """

    forward: list[Flow]
    backward: list[Flow]


def motion(frames: Video) -> Motion:
    """Optical flow of a video, both ways.

    Raises:
        UsageError: fewer than two frames, or they differ in size or are smaller than 16 pixels.
        MissingWeights: OpenCV is not installed.
    """
    _check(frames, 2)
    return Motion([flow(a, b) for a, b in pairwise(frames)], [flow(b, a) for a, b in pairwise(frames)])


def flow_score(motion: Motion) -> float:
    """Mean length of the forward flow over pixels and pairs of frames, in pixels per frame (EvalCrafter)."""
    return float(np.mean([np.linalg.norm(w, axis=-1).mean() for w in motion.forward]))


def delta_flow(reference: Motion, other: Motion) -> float:
    """|flow score - the 16-bit model's flow score| of two videos of one prompt and seed, in pixels per frame."""
    return abs(flow_score(other) - flow_score(reference))


def dynamic_degree(motion: Motion) -> float:
    """1.0 if a video has large motion, else 0.0, by the rule of VBench.

    A pair of frames counts as moving if the mean of its largest 5 % of flow lengths exceeds 6 pixels at a side of 256
    (scaled for other sizes). A video of T frames counts as moving if at least T / 4 pairs do. The limits are meant for
    8 frames per second.
    """
    limit = 6 * min(motion.forward[0].shape[:2]) / 256
    lengths = [np.sort(np.linalg.norm(w, axis=-1), axis=None) for w in motion.forward]
    moving = sum(x[-max(1, x.size // 20) :].mean() > limit for x in lengths)
    return float(moving >= max(1, round((len(lengths) + 1) / 4)))


def warping_error(frames: Video, motion: Motion) -> float:
    """Mean over pairs of frames of mean (V_t - warp(V_{t+1}))^2 over the pixels of V_t that V_{t+1} shows, in [0, 1].

    Lai et al. 2018, frames in [0, 1], with `occluded` as mask. EvalCrafter's code, which papers use, sums the three
    channels of frames at half size and also masks motion boundaries. We do not mask them, because that hides tearing.
    For a pair without a common pixel, such as a cut, all pixels count.
    """
    errors = []
    for (a, b), forward, backward in zip(pairwise(frames), motion.forward, motion.backward, strict=True):
        error = (warp(to_tensor(b), forward)[0] - to_tensor(a)).square().mean(0)  # [H, W]
        visible = ~occluded(forward, backward)
        errors.append((error[visible] if visible.any() else error).mean().item())
    return float(np.mean(errors))


def motion_smoothness(frames: Video) -> float:
    """1 - mean |V_t - V'_t| over every second frame t = 1, 3, ..., in [0, 1], as VBench.

    V'_t is interpolated from its neighbours V_0 and V_1 along the flow w between them. Halfway, Super SloMo's
    approximation (Jiang et al. 2018, eq. 4) is w_{t->0} = (w_{1->0} - w_{0->1}) / 4 = -w_{t->1}, and V'_t is the mean
    of both warped frames. VBench interpolates with a network, AMT.

    Raises:
        UsageError: fewer than three frames, or they differ in size or are smaller than 16 pixels.
        MissingWeights: OpenCV is not installed.
    """
    _check(frames, 3)
    errors = []
    for before, frame, after in zip(frames[:-2:2], frames[1:-1:2], frames[2::2], strict=True):
        half = (flow(after, before) - flow(before, after)) * np.float32(0.25)
        middle = (warp(to_tensor(before), half)[0] + warp(to_tensor(after), -half)[0]) / 2
        errors.append((middle - to_tensor(frame)).abs().mean().item())
    return 1 - float(np.mean(errors))


def clip_temp(features: Tensor) -> float:
    """Mean cosine of the features [T, d] of consecutive frames (EvalCrafter's CLIP-temp if the network is CLIP)."""
    _check(features, 2)
    return cosine_similarity(features[1:], features[:-1]).mean().item()


def consistency(features: Tensor) -> float:
    """Mean over frames t >= 1 of (cosine to frame t - 1 + cosine to frame 0) / 2, negative cosines as 0 (VBench).

    With DINO features it is VBench's subject consistency, with CLIP features its background consistency.

    Args:
        features: [T, d].
    """
    _check(features, 2)
    previous = cosine_similarity(features[1:], features[:-1]).clamp(min=0)
    first = cosine_similarity(features[1:], features[:1]).clamp(min=0)
    return ((previous + first) / 2).mean().item()


def scene_consistency(probabilities: Tensor, concept: int, top: int = 5) -> float:
    """Share of frames with the class ``concept`` among the first ``top``; ``probabilities``: [T, classes].

    VBench's scene metric is the share of frames whose caption by Tag2Text contains the words of the scene.
    """
    first = probabilities.topk(min(top, probabilities.shape[1]), dim=1).indices  # [T, top]
    return (first == concept).any(1).float().mean().item()


def video_features(videos: Sequence[Features]) -> Features:
    """One row per video, from the features of its frames: the mean over time, and the mean |change| between frames.

    The second half is sensitive to motion; shuffled or flickering frames do not change the first half.
    """
    rows = [torch.cat([f.pooled.mean(0), f.pooled.diff(dim=0).abs().mean(0)]) for f in videos]
    return Features(torch.stack(rows), torch.empty(len(rows), 0), None)


def fvd(real: Sequence[Features], fake: Sequence[Features], seed: int = 0) -> Estimate:
    """Fréchet distance of `video_features` of real and generated videos (after Unterthiner et al. 2019).

    The paper uses I3D. This is "frame-FVD": the features are those of single frames.

    Raises:
        UsageError: there are fewer videos than four times the network's feature size.
    """
    return fid(video_features(real), video_features(fake), seed)


def kvd(real: Sequence[Features], fake: Sequence[Features], seed: int = 0) -> Estimate:
    """Kernel distance of `video_features` (Unterthiner et al. 2019): unbiased, for small sets.

    Raises:
        UsageError: fewer than 20 real or generated videos.
    """
    return kid(video_features(real), video_features(fake), seed)


def _check(frames: Sized, least: int) -> None:
    if len(frames) < least:
        raise UsageError(f"this metric needs a video of at least {least} frames, got {len(frames)}")
