"""Motion and its faults in a video: flow, flicker, consistency, FVD.

Every function takes one video as what was computed of its frames once: the frames themselves, their `Motion`, or what
a feature network saw in them (``Features.pooled``, one row a frame).

The numbers of papers look through other networks: RAFT for flow, AMT for smoothness, DINO for subjects, I3D for FVD.
Ours see the same faults and order models alike, but do not compare with published values; the network's name stands
beside each of them. For published numbers of VBench, see `ditq.metrics.adapters.vbench`.
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
        "How far the mean optical flow is from the 16-bit model's, in pixels a frame, either way (as in ViDiT-Q).",
    ),
    Description(
        "flow_score", "Flow score", "px", True, "temporal",
        "Mean optical flow in pixels a frame (EvalCrafter, Liu et al. 2024; here DIS flow, there RAFT). More motion, "
        "not better motion.",
    ),
    Description(
        "dynamic_degree", "Dynamic degree", "", True, "temporal",
        "Share of videos with large motion (VBench, Huang et al. 2024; here DIS flow, there RAFT).",
    ),
    Description(
        "warping_error", "Warping error", "", False, "temporal",
        "Mean squared difference of each frame and the next one warped back along the optical flow, where both show "
        "the same (Lai et al. 2018): flicker and tearing.",
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
        "Mean cosine of each frame's features with the first and with the previous frame's (VBench; there DINO).",
    ),
    Description(
        "background_consistency", "Background consistency", "", True, "temporal",
        "As subject consistency, of CLIP embeddings (VBench).",
    ),
    Description(
        "scene_consistency", "Scene consistency", "", True, "temporal",
        "Share of frames in which a classifier names what the prompt names among its first five (VBench's scene; "
        "there a captioner, Tag2Text).",
    ),
    Description(
        "fvd", "Frame-FVD", "", False, "temporal",
        "Fréchet distance to real videos of frame features averaged over time and of their mean change (after "
        "Unterthiner et al. 2019; there I3D).",
    ),
    Description(
        "kvd", "Frame-KVD", "", False, "temporal",
        "Kernel distance to real videos of the same features (Unterthiner et al. 2019): unbiased on small sets.",
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
    """Mean length of the forward flow over pixels and pairs of frames, in pixels a frame (EvalCrafter)."""
    return float(np.mean([np.linalg.norm(w, axis=-1).mean() for w in motion.forward]))


def delta_flow(reference: Motion, other: Motion) -> float:
    """|flow score - the 16-bit model's flow score| of two videos of one prompt and seed, in pixels a frame."""
    return abs(flow_score(other) - flow_score(reference))


def dynamic_degree(motion: Motion) -> float:
    """1.0 where a video moves, else 0.0, by the rule of VBench.

    A pair of frames moves where the mean of its largest 5 % of flow lengths exceeds 6 pixels at 256 (in proportion
    at other sizes); a video of T frames where at least T / 4 pairs move. Meant for 8 frames a second.
    """
    limit = 6 * min(motion.forward[0].shape[:2]) / 256
    lengths = [np.sort(np.linalg.norm(w, axis=-1), axis=None) for w in motion.forward]
    moving = sum(x[-max(1, x.size // 20) :].mean() > limit for x in lengths)
    return float(moving >= max(1, round((len(lengths) + 1) / 4)))


def warping_error(frames: Video, motion: Motion) -> float:
    """Mean over pairs of frames of mean (V_t - warp(V_{t+1}))^2 over the pixels of V_t that V_{t+1} shows, in [0, 1].

    Lai et al. 2018, frames in [0, 1], with `occluded` as mask. EvalCrafter's code, which papers use, sums the three
    channels of frames at half size and also masks motion boundaries. That hides tearing, so we do not. A pair that
    shares no pixel, such as a cut, counts whole.
    """
    errors = []
    for (a, b), forward, backward in zip(pairwise(frames), motion.forward, motion.backward, strict=True):
        error = (warp(to_tensor(b), forward)[0] - to_tensor(a)).square().mean(0)  # [H, W]
        visible = ~occluded(forward, backward)
        errors.append((error[visible] if visible.any() else error).mean().item())
    return float(np.mean(errors))


def motion_smoothness(frames: Video) -> float:
    """1 - mean |V_t - V'_t| over every second frame t = 1, 3, ..., in [0, 1], as VBench.

    V'_t is made from its neighbours V_0 and V_1 along the flow w between them: halfway, Super SloMo's approximation
    (Jiang et al. 2018, eq. 4) is w_{t->0} = (w_{1->0} - w_{0->1}) / 4 = -w_{t->1}, and V'_t the mean of both
    warped frames. VBench interpolates with a network, AMT.

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
    """Mean cosine of consecutive frames' features [T, d] (EvalCrafter's CLIP-temp where the network is CLIP)."""
    _check(features, 2)
    return cosine_similarity(features[1:], features[:-1]).mean().item()


def consistency(features: Tensor) -> float:
    """Mean over frames t >= 1 of half the cosine to frame t - 1 and half that to frame 0; negatives count 0 (VBench).

    Of DINO features it is VBench's subject consistency, of CLIP's its background consistency. ``features``: [T, d].
    """
    _check(features, 2)
    previous = cosine_similarity(features[1:], features[:-1]).clamp(min=0)
    first = cosine_similarity(features[1:], features[:1]).clamp(min=0)
    return ((previous + first) / 2).mean().item()


def scene_consistency(probabilities: Tensor, concept: int, top: int = 5) -> float:
    """Share of frames with the class ``concept`` among the first ``top``; ``probabilities``: [T, classes].

    VBench's scene: the share of frames whose caption by Tag2Text holds the words of the scene.
    """
    first = probabilities.topk(min(top, probabilities.shape[1]), dim=1).indices  # [T, top]
    return (first == concept).any(1).float().mean().item()


def video_features(videos: Sequence[Features]) -> Features:
    """One row a video, from the features of its frames: the mean over time, and the mean |change| between frames.

    The second half sees motion: shuffled or flickering frames leave the first half as it is.
    """
    rows = [torch.cat([f.pooled.mean(0), f.pooled.diff(dim=0).abs().mean(0)]) for f in videos]
    return Features(torch.stack(rows), torch.empty(len(rows), 0), None)


def fvd(real: Sequence[Features], fake: Sequence[Features], seed: int = 0) -> Estimate:
    """Fréchet distance of `video_features` of real and generated videos (after Unterthiner et al. 2019).

    The paper's network is I3D; this is "frame-FVD" of the network that saw the frames.

    Raises:
        UsageError: fewer videos than four times the network's features.
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
