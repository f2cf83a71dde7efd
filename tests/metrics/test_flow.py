"""Optical flow of images moved by known amounts; warping against scipy; occlusion of known flows."""

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import map_coordinates

from ditq.errors import UsageError
from ditq.metrics.flow import _dis, flow, occluded, warp
from ditq.metrics.networks import MissingWeights

pytest.importorskip("cv2")

Place = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def texture(x: np.ndarray, y: np.ndarray, shortest: float, longest: float) -> np.ndarray:
    """An image that is defined between the pixels too: 24 waves of these lengths in pixels."""
    rng = np.random.default_rng(0)
    total = np.zeros_like(x)
    for wave, angle, phase in rng.uniform((shortest, 0, 0), (longest, 2 * np.pi, 2 * np.pi), (24, 3)):
        total += np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wave + phase)
    return 128 + 20 * total


def seen_at(place: Place, size: tuple[int, int] = (64, 64), waves: tuple[float, float] = (7, 40)) -> Image.Image:
    """The texture, every pixel taken from ``place`` (x, y)."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float64)
    return Image.fromarray(texture(*place(x, y), *waves).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def linear(matrix: np.ndarray) -> Place:
    """Places turned or scaled about the middle of 64 px."""

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v = np.einsum("ij,jhw->ihw", matrix, np.stack([x, y]) - 31.5) + 31.5
        return u, v

    return place


def interior(error: np.ndarray) -> float:
    return float(error[8:-8, 8:-8].mean())


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (160, 144)], ids=str)
@pytest.mark.parametrize("shift", [(1.0, 0.0), (0.0, -2.0), (0.5, 0.25), (-3.5, 2.0)], ids=str)
def test_flow_of_a_shift(shift: tuple[float, float], size: tuple[int, int]) -> None:
    still = seen_at(lambda x, y: (x, y), size)
    moved = seen_at(lambda x, y: (x - shift[0], y - shift[1]), size)
    w = flow(still, moved)
    assert w.shape == (size[1], size[0], 2)
    assert w.dtype == np.float32
    assert interior(np.linalg.norm(w - np.float32(shift), axis=-1)) < 0.05


def test_small_frames_are_matched_at_full_resolution() -> None:
    still = seen_at(lambda x, y: (x, y), waves=(4, 12))
    w = flow(still, seen_at(lambda x, y: (x - 0.5, y - 0.25), waves=(4, 12)))
    assert interior(np.linalg.norm(w - np.float32([0.5, 0.25]), axis=-1)) < 0.04  # 0.09 at half the resolution


@pytest.mark.parametrize("angle", [3, -6])
def test_flow_of_a_turn(angle: float) -> None:
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[c, -s], [s, c]])
    w = flow(seen_at(lambda x, y: (x, y)), seen_at(linear(turn.T)))
    y, x = np.mgrid[:64, :64] - 31.5
    true = np.einsum("ij,jhw->hwi", turn - np.eye(2), np.stack([x, y]))
    assert interior(np.linalg.norm(w - true, axis=-1)) < 0.15


@pytest.mark.parametrize("zoom", [0.92, 1.08])
def test_flow_of_a_zoom(zoom: float) -> None:
    w = flow(seen_at(lambda x, y: (x, y)), seen_at(linear(np.eye(2) / zoom)))
    y, x = np.mgrid[:64, :64] - 31.5
    assert interior(np.linalg.norm(w - (zoom - 1) * np.stack([x, y], -1), axis=-1)) < 0.15


def test_flow_of_a_sprite_on_flat_ground() -> None:
    def sprite(x: float) -> Image.Image:
        image = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((60 + x, 80, 160 + x, 180), (250, 200, 60), (90, 60, 10), 8)
        draw.rectangle((95 + x, 110, 125 + x, 150), (40, 70, 200))
        return image.resize((64, 64), Image.Resampling.LANCZOS)

    w = flow(sprite(0), sprite(8))  # two pixels
    inside = np.hypot(*(np.mgrid[:64, :64] - np.array([32.5, 27.5])[:, None, None])) < 12
    assert np.linalg.norm(w - np.float32([2, 0]), axis=-1)[inside].mean() < 0.2


def test_nothing_moves_between_equal_or_darker_frames() -> None:
    image = seen_at(lambda x, y: (x, y))
    darker = Image.fromarray((np.array(image) * 0.95).astype(np.uint8))
    assert np.abs(flow(image, image)).max() == 0
    assert np.abs(flow(image, darker)).mean() < 0.05


@pytest.mark.parametrize("sizes", [((64, 64), (64, 32)), ((8, 64), (8, 64))], ids=str)
def test_frames_that_cannot_be_compared_are_refused(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(UsageError, match="one size, at least 16 px"):
        flow(*(Image.new("RGB", size) for size in sizes))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    _dis.cache_clear()
    with pytest.raises(MissingWeights, match=r"ditq\[metrics\]"):
        flow(Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32)))


def test_warp_against_scipy() -> None:
    rng = np.random.default_rng(0)
    frame, w = rng.random((3, 20, 28)), rng.normal(0, 4, (20, 28, 2)).astype(np.float32)
    y, x = np.mgrid[:20, :28] + np.moveaxis(w[..., ::-1], -1, 0).astype(np.float64)
    warped, inside = warp(torch.from_numpy(frame).float(), w)
    expected = [map_coordinates(channel, [y, x], order=1, mode="nearest") for channel in frame]
    np.testing.assert_allclose(warped.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(inside.numpy(), (x >= 0) & (x <= 27) & (y >= 0) & (y <= 19))


def constant(x: float, y: float, size: int = 32) -> np.ndarray:
    return np.broadcast_to(np.float32([x, y]), (size, size, 2)).copy()


def test_only_what_leaves_the_frame_is_occluded_where_flows_agree() -> None:
    expected = np.zeros((32, 32), bool)
    expected[:, -3:] = expected[:2] = True
    np.testing.assert_array_equal(occluded(constant(3, -2), constant(-3, 2)).numpy(), expected)


def test_what_another_thing_covers_is_occluded() -> None:
    backward = constant(-4, 0)
    backward[10:20, 12:18] = 0  # something at rest lies there in the second frame
    hidden = occluded(constant(4, 0), backward).numpy()
    expected = np.zeros((32, 32), bool)
    expected[:, -4:] = expected[10:20, 8:14] = True
    np.testing.assert_array_equal(hidden, expected)


@pytest.mark.parametrize(("mismatch", "hidden"), [(0.9, False), (1.2, True)])
def test_occlusion_allows_a_hundredth_of_the_motion_and_a_half(mismatch: float, hidden: bool) -> None:
    # 0.01 (25 + (5 - m)^2) + 0.5 is 0.92 and 0.89; m^2 is 0.81 and 1.44
    middle = occluded(constant(5, 0), constant(mismatch - 5, 0))[16, 16]
    assert bool(middle) is hidden
