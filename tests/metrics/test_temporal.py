"""Temporal metrics against closed forms, on drawn clips with known motion, and on clips with known faults."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from torch import Tensor

from ditq.errors import UsageError
from ditq.metrics.flow import occluded
from ditq.metrics.networks import Features
from ditq.metrics.picture import to_tensor
from ditq.metrics.temporal import (
    Motion,
    clip_temp,
    consistency,
    delta_flow,
    dynamic_degree,
    flow_score,
    fvd,
    kvd,
    motion,
    motion_smoothness,
    scene_consistency,
    video_features,
    warping_error,
)

pytest.importorskip("cv2")

Clip = list[Image.Image]


def waves(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """A coloured texture that is defined between the pixels too: [H, W, 3]."""
    rng = np.random.default_rng(seed)
    total = np.full((*x.shape, 3), 128.0)
    for wave, angle, phase in rng.uniform((7, 0, 0), (40, 2 * np.pi, 2 * np.pi), (16, 3)):
        height = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wave + phase)
        total += 15 * height[..., None] * rng.uniform(0.5, 1.5, 3)
    return total


def to_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.clip(0, 255).round().astype(np.uint8))


@cache
def pan(speed: float, frames: int = 9) -> Clip:
    """The whole frame moves to the right by ``speed`` pixels a frame."""
    y, x = np.mgrid[:64, :64].astype(np.float64)
    return [to_image(waves(x - speed * t, y, 0)) for t in range(frames)]


@cache
def wheel(frames: int = 9, seed: int = 0) -> Clip:
    """A textured disc that turns by 5 degrees a frame and rolls over a textured ground."""
    y, x = np.mgrid[:64, :64].astype(np.float64)
    ground, out = waves(x, y, seed), []
    for t in range(frames):
        u, v, angle = x - 20 - 2 * t, y - 32, np.radians(5 * t)
        turned = waves(u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle), seed + 1)
        out.append(to_image(np.where(np.hypot(u, v)[..., None] < 18, 255 - turned, ground)))
    return out


def shuffled(clip: Clip, seed: int = 3) -> Clip:
    return [clip[i] for i in np.random.default_rng(seed).permutation(len(clip))]


def flickering(clip: Clip, levels: int = 16) -> Clip:
    """Every second frame is brighter."""
    return [to_image(np.array(frame, float) + levels * (i % 2)) for i, frame in enumerate(clip)]


def noisy(clip: Clip) -> Clip:
    rng = np.random.default_rng(0)
    return [to_image(np.array(frame) + rng.normal(0, 8, (64, 64, 3))) for frame in clip]


def constant(*vectors: tuple[float, float], size: int = 64) -> list[np.ndarray]:
    return [np.broadcast_to(np.float32(v), (size, size, 2)).copy() for v in vectors]


def error_of(clip: Clip) -> float:
    return warping_error(clip, motion(clip))


def test_a_still_video_has_no_motion_and_no_fault() -> None:
    clip = pan(0)
    moves = motion(clip)
    assert flow_score(moves) == 0
    assert dynamic_degree(moves) == 0
    assert warping_error(clip, moves) == pytest.approx(0, abs=1e-9)
    assert motion_smoothness(clip) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("speed", [0.5, 1, 2, 4])
def test_flow_score_is_the_speed_of_a_pan(speed: float) -> None:
    assert flow_score(motion(pan(speed, 4))) == pytest.approx(speed, rel=0.05, abs=0.02)


def test_flow_score_of_given_flows() -> None:
    moves = Motion(constant((3, 4), (0, -1)), constant((9, 9), (9, 9)))
    assert flow_score(moves) == pytest.approx((5 + 1) / 2)


def test_delta_flow_counts_more_and_less_motion_alike() -> None:
    slow, fast = Motion(constant((1, 0)), []), Motion(constant((0, 3)), [])
    assert delta_flow(slow, fast) == delta_flow(fast, slow) == pytest.approx(2)
    assert delta_flow(fast, fast) == 0


@pytest.mark.parametrize(("moving", "degree"), [(3, 0.0), (4, 1.0)])
@pytest.mark.parametrize(("speed", "share", "counts"), [(1.6, 0.06, True), (1.4, 0.06, False), (1.6, 0.02, False)])
def test_dynamic_degree_is_the_rule_of_vbench(
    moving: int, degree: float, speed: float, share: float, counts: bool
) -> None:
    flows = constant(*[(0, 0)] * 15)  # 16 frames: 4 pairs must move
    for w in flows[:moving]:
        w.reshape(-1, 2)[: int(share * 64 * 64)] = 0, speed  # the limit is 6 * 64 / 256 = 1.5 pixels, in 5 % of them
    assert dynamic_degree(Motion(flows, flows)) == degree * counts


def test_warping_error_against_scipy() -> None:
    clip = wheel(3)
    moves = motion(clip)
    errors = []
    for (a, b), forward, backward in zip(pairwise(clip), moves.forward, moves.backward, strict=True):
        y, x = np.mgrid[:64, :64] + np.moveaxis(forward[..., ::-1], -1, 0).astype(np.float64)
        channels = np.moveaxis(np.array(b, float) / 255, -1, 0)
        warped = np.stack([map_coordinates(c, [y, x], order=1, mode="nearest") for c in channels], -1)
        visible = ~occluded(forward, backward).numpy()
        assert 0.5 < visible.mean() < 1
        errors.append(((warped - np.array(a) / 255) ** 2)[visible].mean())
    assert warping_error(clip, moves) == pytest.approx(np.mean(errors), rel=1e-4)


def test_warping_error_leaves_out_what_is_hidden() -> None:
    a, b = np.full((64, 64, 3), 100.0), np.full((64, 64, 3), 151.0)
    b[:, 62:] = 0  # leads nowhere: every pixel of the first frame went two to the left
    moves = Motion(constant((-2, 0)), constant((2, 0)))
    a[:, :2] = 255  # left the frame
    assert warping_error([to_image(a), to_image(b)], moves) == pytest.approx(0.04, abs=1e-6)


def test_warping_error_of_a_pair_without_a_common_pixel_counts_whole() -> None:
    frames = [Image.new("L", (64, 64), level).convert("RGB") for level in (0, 51)]
    assert warping_error(frames, Motion(constant((99, 0)), constant((99, 0)))) == pytest.approx(0.04, abs=1e-6)


def test_flicker_at_rest_is_its_square_in_warping_error_and_itself_in_smoothness() -> None:
    clip = flickering(pan(0), 16)
    assert error_of(clip) == pytest.approx((16 / 255) ** 2, rel=0.05)
    assert motion_smoothness(clip) == pytest.approx(1 - 16 / 255, abs=2e-3)


@pytest.mark.parametrize("fault", [shuffled, flickering, noisy])
def test_faults_raise_warping_error_and_lower_smoothness(fault: Callable[[Clip], Clip]) -> None:
    for clip in (wheel(), pan(2)):
        assert error_of(fault(clip)) > 1.2 * error_of(clip)
        assert motion_smoothness(fault(clip)) < motion_smoothness(clip) - 0.005


def test_smoothness_of_even_motion_is_nearly_one_and_a_jerk_lowers_it() -> None:
    even = pan(2)
    y, x = np.mgrid[:64, :64].astype(np.float64)
    jerky = [to_image(waves(x - 2 * t - 1.5 * (t % 2), y, 0)) for t in range(9)]
    assert motion_smoothness(even) > 0.99
    assert motion_smoothness(jerky) < motion_smoothness(even) - 0.02


def test_smoothness_judges_only_frames_between_two_others() -> None:
    clip = pan(1, 4)
    assert motion_smoothness(clip) == motion_smoothness(clip[:3])
    assert motion_smoothness([*clip[:3], *shuffled(wheel(2))]) < motion_smoothness(clip[:3])


def angles(*degrees: float) -> Tensor:
    """Features of frames at these angles, of different lengths: [T, 2]."""
    turned = torch.tensor(degrees).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


def test_clip_temp_is_the_mean_cosine_of_neighbours() -> None:
    assert clip_temp(angles(0, 60, 60, 150)) == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-6)
    assert clip_temp(angles(0, 180)) == pytest.approx(-1)


def test_consistency_looks_at_the_first_and_the_previous_frame_and_counts_negatives_as_none() -> None:
    # cosines to the previous frame: 1/2, 1, -1; to the first: 1/2, 1/2, -1/2
    assert consistency(angles(0, 60, 60, 240)) == pytest.approx((0.5 + 0.75 + 0) / 3, abs=1e-6)
    assert consistency(angles(30, 30, 30)) == pytest.approx(1)


def test_scene_consistency_is_the_share_of_frames_that_name_it() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    assert scene_consistency(probabilities, 0, top=1) == 0.5
    assert scene_consistency(probabilities, 0, top=2) == 0.5
    assert scene_consistency(probabilities, 1, top=2) == 1


def thumbnails(clip: Clip) -> Tensor:
    """4 x 4 mean colours of every frame, around zero: [frames, 48]."""
    frames = torch.stack([to_tensor(frame) for frame in clip])
    return torch.nn.functional.adaptive_avg_pool2d(frames, 4).flatten(1) - 0.5


def test_flicker_lowers_both_cosines_and_shuffling_that_of_neighbours() -> None:
    plain, flicker, mixed = map(thumbnails, (wheel(), flickering(wheel(), 40), shuffled(wheel())))
    assert clip_temp(flicker) < clip_temp(plain) - 0.05
    assert consistency(flicker) < consistency(plain) - 0.05
    assert clip_temp(mixed) < clip_temp(plain) - 0.01


def test_video_features_are_the_mean_and_the_mean_change() -> None:
    pooled = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 4.0]])
    seen = video_features([Features(pooled, torch.empty(3, 0), None)] * 2)
    torch.testing.assert_close(seen.pooled, torch.tensor([[1.0, 2.0, 1.5, 1.5]] * 2))


def random_videos(n: int, seed: int, jump: float = 0.1, d: int = 3) -> list[Features]:
    """Random walks of 8 frames with d features."""
    g = torch.Generator().manual_seed(seed)
    walks = torch.randn(n, 1, d, generator=g) + jump * torch.randn(n, 8, d, generator=g).cumsum(1)
    return [Features(walk, torch.empty(8, 0), None) for walk in walks]


def test_kvd_and_fvd_tell_jumping_videos_from_equal_ones() -> None:
    real, same, jumping = random_videos(60, 0), random_videos(60, 1), random_videos(60, 2, jump=1)
    low, high = kvd(real, same).interval().ci95
    assert low < 0 < high
    assert kvd(real, jumping).interval().ci95[0] > high
    assert fvd(real, jumping).value > 2 * fvd(real, same).value
    assert fvd(real, real).value == pytest.approx(0, abs=1e-6)


def test_kvd_sees_the_order_of_frames() -> None:
    real = random_videos(60, 0)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    assert kvd(real, [v[order] for v in real]).value > kvd(real, real).value + 1e-3


def test_fvd_of_few_videos_is_refused() -> None:
    with pytest.raises(UsageError, match="KID needs far fewer"):
        fvd(random_videos(47, 0, d=12), random_videos(47, 1, d=12))  # needs 2 * 24


@pytest.mark.parametrize(
    "call",
    [lambda: motion(pan(1, 1)), lambda: motion_smoothness(pan(1, 2)), lambda: clip_temp(angles(0)),
     lambda: consistency(angles(0))],
    ids=["motion", "motion_smoothness", "clip_temp", "consistency"],
)  # fmt: skip
def test_too_few_frames_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=r"at least \d frames, got \d"):
        call()


def test_a_video_whose_frames_differ_in_size_is_refused() -> None:
    with pytest.raises(UsageError, match="one size"):
        motion([Image.new("RGB", (64, 64)), Image.new("RGB", (32, 32))])
