"""The bundled feature network: its folder, its reference features, and that it sees what the models draw."""

from __future__ import annotations

import json
import re

import ditq_bundled
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ditq.metrics.networks.emoji import EmojiClassifier

PICTURES = 885
FOLDER = ditq_bundled.network("emoji-classifier")


@pytest.fixture(scope="module")
def network() -> EmojiClassifier:
    return EmojiClassifier(FOLDER)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "reference.safetensors")


@pytest.fixture(scope="module")
def named() -> list[str]:
    """``style/concept`` of every reference image."""
    with safe_open(FOLDER / "reference.safetensors", "pt") as file:
        return json.loads(file.metadata()["pictures"])


def taught() -> set[str]:
    index = json.loads((ditq_bundled.path("emoji-class") / "model_index.json").read_text())
    return {concept.replace("-", " ") for concept in index["id2label"].values()}


def test_the_network_is_here_and_small() -> None:
    assert ditq_bundled.networks() == ["emoji-classifier"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


def test_it_knows_every_concept_of_the_models(network: EmojiClassifier) -> None:
    assert len(taught()) == 307
    assert taught() <= set(network.labels)
    assert len(set(network.labels)) == len(network.labels)


def test_reference_holds_finite_features_of_named_pictures(
    network: EmojiClassifier, reference: dict[str, torch.Tensor], named: list[str]
) -> None:
    shapes = {key: tuple(value.shape) for key, value in reference.items()}
    assert shapes == {
        "pooled": (PICTURES, 256), "spatial": (PICTURES, 448), "probabilities": (PICTURES, len(network.labels)),
    }  # fmt: skip
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in reference.values())
    assert len(set(named)) == PICTURES
    assert {name.split("/")[1].replace("-", " ") for name in named} == taught()
    blank = network.features(torch.ones(1, 3, 64, 64))
    assert blank.pooled.shape[1] == 256
    assert blank.spatial.shape[1] == 448


def test_reference_is_of_this_network(network: EmojiClassifier, reference: dict[str, torch.Tensor]) -> None:
    """A network trained again without its reference would give other probabilities for these features."""
    again = network.network.classifier(reference["pooled"].float()).softmax(1)
    torch.testing.assert_close(again, reference["probabilities"].float(), atol=1e-3, rtol=0)


def test_reference_pictures_are_seen_as_what_they_are(
    network: EmojiClassifier, reference: dict[str, torch.Tensor], named: list[str]
) -> None:
    best = [network.labels[i] for i in reference["probabilities"].argmax(1).tolist()]
    right = [name.split("/")[1].replace("-", " ") == label for name, label in zip(named, best, strict=True)]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("model", ["emoji-class", "emoji-t2i"])
def test_drawn_pictures_are_seen_as_what_was_asked_for(network: EmojiClassifier, model: str) -> None:
    """The 32 images on the model's card, eight to a row of 100-pixel cells, named in the text below them."""
    card = (ditq_bundled.path(model) / "README.md").read_text()
    listed = re.search(r"not selected: (.*)\.", card)[1].split(", ")
    asked = [re.sub(r".* emoji of an? ", "", text).replace("-", " ") for text in listed]
    with Image.open(ditq_bundled.path(model) / "samples.png") as page:
        cells = [(i % 8 * 100, i // 8 * 100) for i in range(len(asked))]
        pictures = [page.convert("RGB").crop((x, y, x + 96, y + 96)) for x, y in cells]
    seen = network(pictures).probabilities
    assert seen is not None
    rows = [network.labels.index(concept) for concept in asked]
    probability = seen[:, rows]  # [image, asked concept]
    assert probability.diagonal().mean() > 0.6
    assert probability.diagonal().mean() > 100 * probability.roll(1, 1).diagonal().mean()
