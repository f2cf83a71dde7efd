"""Agreement of an image or a video with its prompt: CLIPScore, and scores of a concept classifier.

Every function takes the features of one image or video, one row per frame (an image has one), and averages over
frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ditq.errors import UsageError
from ditq.metrics.metric import Description
from ditq.metrics.networks.base import MissingWeights

CLIP = "openai/clip-vit-base-patch32"  # the model of CLIPScore and of CLIPSIM
BETWEEN_WORDS = re.compile(r"[\W_]+")

ALIGNMENT = (
    Description(
        "clip_score", "CLIPScore", "", True, "alignment",
        "100 times the cosine of CLIP's embeddings of image and prompt, without the factor 2.5 of Hessel et al. "
        "2021; for videos the mean over frames, 100 times CLIPSIM (Wu et al. 2021).",
    ),
    Description(
        "concept_score", "Concept score", "", True, "alignment",
        "Probability that a classifier assigns to the concept named by the prompt; for videos the mean over frames.",
    ),
    Description(
        "concept_accuracy", "Concept accuracy", "", True, "alignment",
        "Share of images (or frames) whose most probable class is the concept named by the prompt.",
    ),
)  # fmt: skip


class Clip:
    """CLIP (Radford et al. 2021) of ``transformers``, from a folder or the Hub's cache; nothing is downloaded.

    Args:
        source: a folder or a Hub id; by default the environment variable ``DITQ_CLIP``, else
            ``openai/clip-vit-base-patch32``.

    Attributes:
        name: printed beside every number, e.g. ``clip-vit-base-patch32``.

    Raises:
        MissingWeights: the model is not on this machine.
    """

    def __init__(self, source: str | Path | None = None) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        source = str(source or os.environ.get("DITQ_CLIP") or CLIP)
        self.name = Path(source).name
        try:
            self.model = CLIPModel.from_pretrained(source, local_files_only=True).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
            # Pillow's resampling even where torchvision is installed, for the same numbers on all machines.
            self.processor = AutoImageProcessor.from_pretrained(source, local_files_only=True, backend="pil")
        except OSError as e:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise MissingWeights(
                f"CLIP needs the weights of {source}, which are not on this machine: there is no such folder, and the "
                f"Hub cache {HF_HUB_CACHE} does not have all of them. Fetch them with `hf download {source}`, or set "
                "DITQ_CLIP to a folder with a CLIP model."
            ) from e

    def images(self, images: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Embeddings of images: [n, d], not normalised."""
        rows = []
        for i in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[i : i + batch_size]]
            pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
            rows.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return torch.cat(rows)

    def text(self, prompt: str) -> Tensor:
        """Embedding of a prompt [d], truncated to the 77 tokens that CLIP can read."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=limit, return_tensors="pt")
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)[0]


def clip_score(images: Tensor, text: Tensor) -> float:
    """100 cos(image, text), mean over frames; ``images``: [frames, d], ``text``: [d].

    This is the scale of torchmetrics and of most tables. Hessel et al. 2021 report 2.5 max(cos, 0). Tables of videos
    report CLIPSIM, the mean cosine itself.
    """
    return 100 * cosine_similarity(images, text[None]).mean().item()


@cache
def _words(text: str) -> str:
    """Lower-case words with a space before and after each: "red-apple" and "Red apple." become equal."""
    return f" {BETWEEN_WORDS.sub(' ', text.lower()).strip()} "


def concept(prompt: str, labels: Sequence[str]) -> int:
    """The class that a prompt names: the longest label that occurs in it as whole words.

    "a noto style emoji of a red apple" and "red-apple" name "red-apple", not "apple".

    Raises:
        UsageError: it names no class.
    """
    prompt_words = _words(prompt)
    matches = [i for i, label in enumerate(labels) if _words(label) in prompt_words]
    if not matches:
        raise UsageError(f"The prompt {prompt!r} names none of the {len(labels)} classes of this network.")
    return max(matches, key=lambda i: len(_words(labels[i])))


def concept_score(probabilities: Tensor, concept: int) -> float:
    """Probability of class ``concept``, mean over frames; ``probabilities``: [frames, classes]."""
    return probabilities[:, concept].mean().item()


def concept_accuracy(probabilities: Tensor, concept: int) -> float:
    """Share of frames whose most probable class is ``concept``; ``probabilities``: [frames, classes]."""
    return (probabilities.argmax(1) == concept).float().mean().item()
