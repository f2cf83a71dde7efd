"""Feature networks: found by name, the same numbers for any batch size, and one clear message where weights miss."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics import extractors
from ditq.metrics.extractors import Extractor, MissingWeights
from ditq.metrics.extractors.emoji import EmojiClassifier

LABELS = ["red apple", "cat", "rain"]


def pictures(n: int = 5, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures [n, 3, size, size] in [0, 1]."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def as_images(batch: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in batch]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained classifier in the layout of the bundled one."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], layer_type="basic",
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("network")
    ResNetForImageClassification(config).half().save_pretrained(path)
    preprocessor = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "size": {"height": 64, "width": 64},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return path


@pytest.fixture(scope="module")
def emoji(folder: Path) -> EmojiClassifier:
    return EmojiClassifier(folder)


def test_registry_names_and_errors() -> None:
    assert {"emoji-classifier"} <= set(extractors.names())
    with pytest.raises(UsageError, match="Did you mean 'emoji-classifier'"):
        extractors.load("emoji-clasifier")


def test_emoji_features_are_those_of_the_stock_network(emoji: EmojiClassifier, folder: Path) -> None:
    from transformers import ResNetForImageClassification

    network = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    images = pictures()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    with torch.no_grad():
        output = network(((images.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2), output_hidden_states=True)
    features = emoji.features(images)
    torch.testing.assert_close(features.probabilities, output.logits.softmax(1))
    torch.testing.assert_close(features.pooled, output.hidden_states[-1].mean((2, 3)))
    torch.testing.assert_close(features.spatial, output.hidden_states[2][:, :7].reshape(5, 7 * 8 * 8))
    assert emoji.labels == LABELS
    assert [tuple(stage.shape[1:]) for stage in emoji.stages(images)] == [
        (8, 16, 16),
        (12, 8, 8),
        (16, 4, 4),
        (24, 2, 2),
    ]


def test_emoji_takes_other_sizes(emoji: EmojiClassifier) -> None:
    small = pictures(2)
    large = torch.nn.functional.interpolate(small, (128, 192), mode="bilinear")
    a, b = emoji.features(small), emoji.features(large)
    assert a.spatial.shape == b.spatial.shape
    torch.testing.assert_close(a.pooled, b.pooled, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batch_size_does_not_matter(emoji: Extractor, batch_size: int) -> None:
    images = pictures()
    features, at_once = emoji(as_images(images), batch_size), emoji.features((images * 255).round() / 255)
    torch.testing.assert_close(features.pooled, at_once.pooled)
    torch.testing.assert_close(features.spatial, at_once.spatial)
    torch.testing.assert_close(features.probabilities, at_once.probabilities)


def test_rows_and_cat_are_inverse(emoji: EmojiClassifier) -> None:
    features = emoji.features(pictures())
    again = extractors.Features.cat([features[:2], features[torch.tensor([2, 3, 4])]])
    assert len(again) == 5
    assert torch.equal(again.pooled, features.pooled)
    assert torch.equal(again.probabilities, features.probabilities)


@pytest.mark.parametrize("bundled", [None, ModuleType("ditq_bundled")], ids=["absent", "without-networks"])
def test_missing_bundle_names_the_extra(bundled: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ditq_bundled", bundled)
    with pytest.raises(MissingWeights, match=r"ditq\[demo\]"):
        EmojiClassifier.load()
