"""CLIPScore of a tiny random CLIP against its own forward pass; concepts of a stand-in classifier."""

import json
import math
import re
import string
from collections.abc import Callable
from pathlib import Path

import ditq_bundled
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ditq.errors import UsageError
from ditq.metrics.alignment import (
    ALIGNMENT,
    Clip,
    clip_score,
    concept,
    concept_accuracy,
    concept_score,
)
from ditq.metrics.networks import MissingWeights
from ditq.metrics.picture import to_tensor

MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP that knows single letters, saved as the Hub's folders are."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("models") / "tiny-clip"
    symbols = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        *(c + "</w>" for c in string.ascii_lowercase),
    ]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(symbols), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text},
            vision_config={**tower, "image_size": SIDE, "patch_size": 8},
            projection_dim=8,
        )
    )
    model.save_pretrained(path)
    CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN.tolist(), "image_std": STD.tolist(),
            "do_convert_rgb": True,
        })
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip(folder)


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def logits(folder: Path, images: list[Image.Image], prompt: str) -> Tensor:
    """100 cos by CLIP's own forward pass, on pixels prepared by Pillow and numpy: [images]."""
    from transformers import CLIPModel, CLIPTokenizer

    pixels = []
    for image in images:
        scale = SIDE / min(image.size)
        resized = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - SIDE) // 2 for side in resized.size)
        array = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE))) / 255
        pixels.append(torch.from_numpy((array - MEAN) / STD).permute(2, 0, 1).float())
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=torch.stack(pixels), **tokens)
        return 100 * out.logits_per_image[:, 0] / model.logit_scale.exp()


def test_clip_score_is_that_of_clips_own_forward_pass(clip: Clip, folder: Path) -> None:
    images, prompts = [picture(0), picture(1, (48, 64))], ["a red hen", "sun"]
    scores = [
        clip_score(clip.images([image]), clip.text(prompt)) for image, prompt in zip(images, prompts, strict=True)
    ]
    expected = [logits(folder, [image], prompt).item() for image, prompt in zip(images, prompts, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-3)


def test_clip_score_of_a_video_is_the_mean_over_frames_of_several_batches(clip: Clip, folder: Path) -> None:
    frames = [picture(i) for i in range(5)]
    score = clip_score(clip.images(frames), clip.text("a hen"))
    assert score == pytest.approx(logits(folder, frames, "a hen").mean().item(), abs=1e-3)
    torch.testing.assert_close(clip.images(frames, batch_size=2), clip.images(frames))


def test_clip_score_is_a_hundred_times_the_cosine_without_clipping() -> None:
    text = torch.tensor([3.0, 0.0])
    angles = torch.tensor([0.0, math.pi / 3, math.pi])
    images = 7 * torch.stack([angles.cos(), angles.sin()], 1)
    assert [clip_score(image[None], text) for image in images] == pytest.approx([100, 50, -100], abs=1e-3)
    assert clip_score(images, text) == pytest.approx(100 * 0.5 / 3, abs=1e-3)


def test_clip_reads_what_it_can_of_a_long_prompt(clip: Clip) -> None:
    torch.testing.assert_close(clip.text("a b c d e f g h i j k l m"), clip.text("a b c d e f g h i j"))
    assert not torch.equal(clip.text("a b c"), clip.text("a b d"))


def test_missing_clip_names_the_model_where_it_is_looked_for_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITQ_CLIP", "nobody/no-such-clip")
    with pytest.raises(MissingWeights, match=r"nobody/no-such-clip.*Hub cache.*hf download.*DITQ_CLIP"):
        Clip()


def test_clip_is_the_folder_of_the_variable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("DITQ_CLIP", str(folder))
    assert Clip().name == "tiny-clip"


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a noto style emoji of a red apple", "red-apple"),
        ("red-apple", "red-apple"),
        ("An Apple, please.", "apple"),
        ("a bowl and red_apple", "red-apple"),
        ("1st place medal", "1st-place-medal"),
    ],
)
def test_a_prompt_names_the_longest_label_in_whole_words(prompt: str, named: str) -> None:
    labels = ["apple", "red-apple", "bow", "1st-place-medal"]
    assert labels[concept(prompt, labels)] == named


@pytest.mark.parametrize("prompt", ["a pineapple", "", "a bowl"])
def test_a_prompt_without_a_concept_is_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="none of the 3 classes"):
        concept(prompt, ["apple", "red-apple", "bow"])


def test_concept_score_and_accuracy_of_given_probabilities() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]])
    assert concept_score(probabilities, 1) == pytest.approx(0.3)
    assert concept_accuracy(probabilities, 1) == pytest.approx(1 / 3)
    assert concept_score(probabilities[:1], 0) == pytest.approx(0.7)
    assert concept_accuracy(probabilities[:1], 0) == 1.0


LABELS = ["red-square", "green-square", "blue-square"]


def probabilities(image: Image.Image) -> Tensor:
    """Of a classifier that tells red, green and blue images apart by their mean colour: [1, 3]."""
    return (to_tensor(image)[None].mean((2, 3)) * 8).softmax(1)


def squares() -> tuple[list[Image.Image], list[str]]:
    colours = {"red": (220, 60, 40), "green": (50, 190, 60), "blue": (40, 50, 210)}
    items = [(Image.new("RGB", (16, 16), rgb), f"a drawing of a {name} square") for name, rgb in colours.items()]
    return [image for image, _ in items], [prompt for _, prompt in items]


def scored(function: Callable[[Tensor, int], float], images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [function(probabilities(x), concept(p, LABELS)) for x, p in zip(images, prompts, strict=True)]


def test_a_shuffled_caption_lowers_alignment() -> None:
    images, prompts = squares()
    mixed = prompts[1:] + prompts[:1]
    assert scored(concept_accuracy, images, prompts) == [1.0] * 3
    assert scored(concept_accuracy, images, mixed) == [0.0] * 3
    assert min(scored(concept_score, images, prompts)) > max(scored(concept_score, images, mixed))


def test_noise_lowers_the_concept_score() -> None:
    images, prompts = squares()
    rng = np.random.default_rng(0)
    noisy = [Image.fromarray((np.array(x) // 2 + rng.integers(0, 128, (16, 16, 3))).astype(np.uint8)) for x in images]
    clean, drowned = (np.mean(scored(concept_score, some, prompts)) for some in (images, noisy))
    assert drowned < clean - 0.1


def test_a_video_scores_the_mean_over_its_frames() -> None:
    images, prompts = squares()
    frames = torch.cat([probabilities(image) for image in images])
    assert concept_accuracy(frames, 0) == pytest.approx(1 / 3)
    assert concept_score(frames, 0) == pytest.approx(frames[:, 0].mean().item())
    assert concept(prompts[0], LABELS) == 0


def test_descriptions_are_of_this_family() -> None:
    assert {x.name for x in ALIGNMENT} == {"clip_score", "concept_score", "concept_accuracy"}
    assert all(x.higher_is_better and x.family == "alignment" for x in ALIGNMENT)


@pytest.mark.parametrize("model", ditq_bundled.names())
def test_every_bundled_prompt_names_the_concept_that_was_asked_for(model: str) -> None:
    config = json.loads((ditq_bundled.network("emoji-classifier") / "config.json").read_text())
    labels = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    for split in ditq_bundled.SPLITS:
        for prompt in ditq_bundled.prompts(model, split):
            named = labels[concept(prompt, labels)].replace("-", " ")
            if model == "emoji-video":  # of two that cross, one is named
                assert re.match(rf"(an? [\w ]+ and )?an? {named} ", prompt)
            else:
                assert prompt.replace("-", " ").endswith(named)
