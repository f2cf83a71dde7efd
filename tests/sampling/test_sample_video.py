"""Videos sampled in a batch equal those sampled one by one."""

from __future__ import annotations

import torch
import videos
from helpers import PROMPTS, tiny_pixart

from ditq import architectures
from ditq.numerics import sqnr_db
from ditq.sampling import Sampling, batches, sample

LATTE = architectures.load("latte")
TWO_AND_ONE = ["a red cat", "the big dog on the sea", "a blue tree"]  # words


def test_only_texts_of_one_length_go_together_in_latte() -> None:
    assert batches(videos.latte(), TWO_AND_ONE, 8) == [[0, 2], [1]]
    assert batches(videos.latte(), TWO_AND_ONE * 2, 2) == [[0, 2], [3, 5], [1, 4]]
    assert batches(videos.latte(), [" A red   CAT ", "a red cat"], 8) == [[0, 1]]
    assert batches(tiny_pixart(), TWO_AND_ONE, 2) == [[0, 1], [2]]


def test_a_video_does_not_depend_on_its_neighbours() -> None:
    """LattePipeline itself pads the texts of a list, without a mask, and cuts that of a single prompt."""
    options = {"steps": 2, "guidance_scale": 3.0}
    together = sample(videos.latte(), LATTE, TWO_AND_ONE, Sampling(seed=5, batch_size=3, **options))
    for i, prompt in enumerate(TWO_AND_ONE):
        alone = sample(videos.latte(), LATTE, [prompt], Sampling(seed=5 + i, **options))
        assert sqnr_db(alone.latents[0], together.latents[i]) > 90


def test_a_video_is_that_of_the_stock_call() -> None:
    for guidance in (3.0, 1.0):
        samples = sample(videos.latte(), LATTE, PROMPTS[:1], Sampling(steps=2, guidance_scale=guidance, seed=5))
        stock = videos.latte()(
            PROMPTS[0], video_length=3, height=None, width=None, num_inference_steps=2, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(5), output_type="latent",
        ).frames  # fmt: skip
        assert sqnr_db(stock[0], samples.latents[0]) > 90
