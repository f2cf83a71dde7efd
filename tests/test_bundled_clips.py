"""The clips that emoji-video learns, and its training: what moves where, what is held out, what the pipeline sees."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import ditq_bundled
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LattePipeline
from PIL import Image
from transformers import PreTrainedTokenizerFast

TRAINING = Path(__file__).parents[1] / "bundled" / "training"
sys.path.insert(0, str(TRAINING))
import clips  # noqa: E402
import diffusion  # noqa: E402
import video  # noqa: E402

sys.path.remove(str(TRAINING))


@pytest.fixture(scope="module")
def pictures() -> dict[str, torch.Tensor]:
    """Opaque squares, one red with a blue upper half and one green, in place of artwork."""
    two = torch.zeros(2, 4, clips.SOURCE, clips.SOURCE)
    inside = slice(8, clips.SOURCE - 8)
    two[:, 3, inside, inside] = 1
    two[0, 0, inside, inside] = two[1, 1, inside, inside] = 1
    two[0, 0, 8:48, inside], two[0, 2, 8:48, inside] = 0, 1
    return {"panda": two[0], "owl": two[1]}


def coverage(frames: torch.Tensor) -> torch.Tensor:
    """How much each pixel of [F, 3, H, W] on white differs from it, [F, H, W]."""
    return (1 - frames).amax(1)


def centres(frames: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The x and y of the ink's centre of mass in every frame, in pixels."""
    ink = coverage(frames)
    at = torch.arange(clips.PIXELS) + 0.5
    total = ink.sum((1, 2))
    return (ink.sum(1) @ at / total).numpy(), (ink.sum(2) @ at / total).numpy()


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 0, -1), ("moving right", 0, 1), ("moving up", 1, -1), ("moving down", 1, 1)],
)
def test_moving_goes_straight_by_a_latent_each_frame(
    pictures: dict[str, torch.Tensor], motion: str, axis: int, sign: int
) -> None:
    path = centres(clips.clip(pictures, ("panda",), motion))
    np.testing.assert_allclose(np.diff(path[axis]) * sign, clips.GRID, atol=0.1)
    assert np.ptp(path[1 - axis]) < 0.1


def test_pictures_of_a_path_are_one_shifted_by_latents(pictures: dict[str, torch.Tensor]) -> None:
    frames = clips.clip(pictures, ("panda",), "moving right", lane=1)
    for i in range(1, clips.FRAMES):
        torch.testing.assert_close(frames[i], frames[0].roll(i * clips.GRID, -1), atol=1e-4, rtol=0)


def test_lane_moves_the_path_sideways(pictures: dict[str, torch.Tensor]) -> None:
    x, y = centres(clips.clip(pictures, ("panda",), "moving left", lane=2))
    plain = centres(clips.clip(pictures, ("panda",), "moving left"))
    np.testing.assert_allclose(x, plain[0], atol=0.1)
    np.testing.assert_allclose(y - plain[1], 8, atol=0.1)


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1)])
def test_size_changes_fourfold(pictures: dict[str, torch.Tensor], motion: str, sign: int) -> None:
    side = (coverage(clips.clip(pictures, ("owl",), motion)) > 1).sum((1, 2)).sqrt().numpy()[::sign]
    assert (np.diff(side) > 0).all()
    assert side[-1] / side[0] > 4


def test_opacity_changes_from_nothing_to_all(pictures: dict[str, torch.Tensor]) -> None:
    shown = clips.clip(pictures, ("owl",), "appearing", "blue")
    ink = (shown - shown[:1]).abs().mean((1, 2, 3))
    assert ink[0] == 0
    assert (ink.diff() > 0).all()
    torch.testing.assert_close(clips.clip(pictures, ("owl",), "disappearing", "blue"), shown.flip(0))
    expected = torch.tensor(clips.BACKGROUNDS["blue"]) / 127.5 - 1
    torch.testing.assert_close(shown[0], expected[:, None, None].expand(3, 64, 64))


def test_rotation_is_clockwise_about_the_centre(pictures: dict[str, torch.Tensor]) -> None:
    frames = clips.clip(pictures, ("panda",), "rotating")
    x, y = centres(frames)
    np.testing.assert_allclose([x, y], 32, atol=0.3)
    blue = centres(1 - (frames[:, 2:] - frames[:, :1]).clamp(min=0).expand(-1, 3, -1, -1))
    np.testing.assert_allclose(blue[0][[0, 2, 4, 6]] - 32, [0, 8, 0, -8], atol=1.5)
    np.testing.assert_allclose(blue[1][[0, 2, 4, 6]] - 32, [-8, 0, 8, 0], atol=1.5)


def test_bounces_twice(pictures: dict[str, torch.Tensor]) -> None:
    _, y = centres(clips.clip(pictures, ("panda",), "bouncing"))
    assert np.argsort(y)[-2:].tolist() in ([2, 6], [6, 2])
    assert y[2] - y[0] > 25


def test_crossing_objects_pass_each_other(pictures: dict[str, torch.Tensor]) -> None:
    frames = clips.clip(pictures, ("panda", "owl"), clips.CROSSING)
    drawn = {c: clips.clip(pictures, (c,), clips.CROSSING) for c in ("panda", "owl")}
    assert (np.diff(centres(drawn["panda"])[0]) > 0).all()
    second = [clips.pose(clips.CROSSING, i, 0, 1)[0] for i in range(clips.FRAMES)]
    assert (np.diff(second) < 0).all()
    assert coverage(frames).sum() > 1.8 * coverage(drawn["panda"]).sum()


def test_unknown_motion_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'flying'; known: moving left"):
        clips.pose("flying", 0, 0)


def test_training_never_sees_what_is_held_out() -> None:
    closed = clips.held_out()
    assert len(set(closed)) == len(closed) == 3 * len(clips.CONCEPTS)
    chosen = clips.plan(2048, 0)
    assert not {(concepts, motion) for concepts, motion, *_ in chosen} & set(closed)
    assert chosen[:100] == clips.plan(100, 0)
    assert {concepts for concepts, motion, *_ in chosen if motion != clips.CROSSING} == {(c,) for c in clips.CONCEPTS}
    assert np.mean([motion == clips.CROSSING for _, motion, *_ in chosen]) == pytest.approx(1 / 8, abs=0.01)


def test_every_picture_of_a_held_out_clip_occurs_in_its_reverse() -> None:
    closed = set(clips.held_out())
    assert set(clips.MOTIONS) == {motion for _, motion in closed} - {clips.CROSSING}
    reverse = dict(zip(clips.MOTIONS[:4], clips.MOTIONS[5:9], strict=True))
    for concepts, motion in closed:
        assert (concepts, reverse.get(motion)) not in closed
    for one, other in reverse.items():
        forth = [clips.pose(one, i, 1) for i in range(clips.FRAMES)]
        back = [clips.pose(other, i, 1) for i in reversed(range(clips.FRAMES))]
        np.testing.assert_allclose(forth, back)


def test_prompts_share_no_pair_and_evaluation_is_held_out() -> None:
    splits = {split: ditq_bundled.prompts("emoji-video", split) for split in ditq_bundled.SPLITS}
    plain = {split: {text.split(" on a ")[0] for text in texts} for split, texts in splits.items()}
    assert plain["evaluation"] <= {clips.caption(*pair) for pair in clips.held_out()}
    assert not plain["calibration"] & {clips.caption(*pair) for pair in clips.held_out()}
    assert {split: len(texts) for split, texts in plain.items()} == {"calibration": 64, "evaluation": 48}
    every = set(clips.captions())
    assert all(set(texts) <= every for texts in splits.values())


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TRAINING.parents[1] / "benchmarks" / "quality"))
    return importlib.import_module("video_motion")


@pytest.mark.parametrize("motion", [*clips.MOTIONS, clips.CROSSING])
@pytest.mark.parametrize("background", ["white", "pink"])
def test_judge_sees_the_motion_of_a_noisy_clip(
    pictures: dict[str, torch.Tensor], judge: ModuleType, motion: str, background: str
) -> None:
    concepts = ("panda", "owl") if motion == clips.CROSSING else ("panda",)
    frames = (clips.clip(pictures, concepts, motion, background, lane=1) + 1) / 2
    noise = 0.03 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    assert judge.shown((frames + noise).clamp(0, 1)) == motion
    frozen = frames[4:5].expand_as(frames)
    assert judge.shown(frozen) == judge.STILL


def test_judge_sees_nothing_in_an_empty_clip(judge: ModuleType) -> None:
    assert judge.shown(torch.full((clips.FRAMES, 3, 64, 64), 0.9)) == "nothing"


def test_judge_counts(pictures: dict[str, torch.Tensor], judge: ModuleType) -> None:
    def video(motion: str) -> list[Image.Image]:
        drawn = (clips.clip(pictures, ("panda",), motion) + 1).mul(127.5).byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(frame) for frame in drawn]

    prompts = ["a panda growing", "a panda moving left on a blue background", "a panda growing"]
    found = judge.tally(prompts, [video("growing"), video("moving left"), video("bouncing")])
    assert (found["right"], found["of"]) == (2, 3)
    assert found["by_motion"] == {"growing": [1, 2], "moving left": [1, 1]}
    assert found["mistakes"] == {"growing: bouncing": 1}
    low, high = found["interval"]
    assert (low, high) == pytest.approx((0.2077, 0.9385), abs=1e-3)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return diffusion.tokenizer(clips.captions())


@pytest.fixture(scope="module")
def model(words: PreTrainedTokenizerFast) -> video.TextToVideo:
    torch.manual_seed(0)
    return video.TextToVideo(len(words)).eval()


def test_every_caption_leaves_room_for_padding(words: PreTrainedTokenizerFast) -> None:
    tokens = video.encode(words, clips.captions())
    assert not (tokens == words.unk_token_id).any()
    with pytest.raises(ValueError, match="no room for padding"):
        video.encode(words, ["a red apple and " * 4])


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_training_shows_text_as_the_stock_pipeline_does(
    model: video.TextToVideo, words: PreTrainedTokenizerFast, count: int
) -> None:
    """The pipeline cuts the text of one prompt, pads the texts of several to 120 tokens, and masks nothing."""
    texts = ["a panda bouncing", "a red apple moving left on a blue background"][:count]
    pipe = LattePipeline(words, model.text_encoder, None, model.transformer, DPMSolverMultistepScheduler())
    prompt, negative = pipe.encode_prompt(texts if count > 1 else texts[0], clean_caption=False)
    x, t = torch.randn(2 * count, clips.FRAMES, 4, 16, 16), torch.full((2 * count,), 500)
    expected = model.transformer(x.transpose(1, 2), t, torch.cat([negative, prompt]), return_dict=False)[0]

    tokens = video.encode(words, texts)
    length = (tokens != 0).sum(1).repeat(2)
    total = length if count == 1 else torch.full_like(length, video.PIPELINE_TOKENS)
    both = torch.cat([video.encode(words, [""]).expand_as(tokens), tokens])
    torch.testing.assert_close(model(x, t, both, length, total).transpose(1, 2), expected[:, :4], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_starts_as_the_image_model_frame_by_frame(words: PreTrainedTokenizerFast) -> None:
    old = diffusion.tokenizer(["a fluent style emoji of a red apple", "an emoji of a lemon"])
    image, started = diffusion.TextToImage(len(old)), video.TextToVideo(len(words)).eval()
    started.start_from(image.state_dict(), old, words)
    rows, learned = started.text_encoder.shared.weight, image.text_encoder.shared.weight
    assert torch.equal(rows[words.convert_tokens_to_ids("apple")], learned[old.convert_tokens_to_ids("apple")])
    torch.testing.assert_close(
        rows[words.convert_tokens_to_ids("panda")], learned[old("panda").input_ids[:-1]].mean(0)
    )

    tokens = video.encode(words, ["a panda bouncing"])
    length = (tokens != 0).sum(1)
    x = torch.randn(1, clips.FRAMES, 4, 16, 16)
    other = x.clone()
    other[:, 1:] += 1
    t = torch.tensor([500])
    one, two = (started(v, t, tokens, length, length) for v in (x, other))
    torch.testing.assert_close(one[:, 0], two[:, 0])
    assert (one[:, 1:] - two[:, 1:]).abs().max() > 0.01
