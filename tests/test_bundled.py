"""The bundled trained models, end to end: stock pipelines load them, quantize, save, load, and stay close."""

from __future__ import annotations

import importlib
from pathlib import Path

import ditq_bundled
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import alphas

import ditq
from ditq import api, architectures
from ditq.comparison import compare
from ditq.sampling import Sampling, sample

PICTURES = ["emoji-class", "emoji-t2i"]
SHORT = ("calibration.prompts=8", "calibration.steps=6", "calibration.rows=512")


def few(name: str) -> list[str]:
    return ditq_bundled.prompts(name, "evaluation")[:4]


def test_the_models_are_here() -> None:
    assert ditq_bundled.names() == [*PICTURES, "emoji-video"]


@pytest.mark.parametrize("name", PICTURES)
def test_stock_pipeline_draws_something(name: str) -> None:
    """Images of a trained model: white corners, and ink in the middle."""
    pipe = api.load(f"bundled:{name}")
    assert type(pipe).__module__.startswith("diffusers.")
    drawn = sample(pipe, architectures.match(pipe.transformer), few(name), Sampling(steps=8))
    for image in drawn.images:
        assert image.size == (64, 64)
        assert min(image.crop((0, 0, 2, 2)).convert("L").getextrema()) > 150
        assert min(image.crop((16, 16, 48, 48)).convert("L").getextrema()) < 220


def listed(drawn: list) -> list:
    """Images, or the frames of all videos."""
    return [frame for video in drawn for frame in (video if isinstance(video, list) else [video])]


def test_stock_pipeline_moves_what_was_asked_for_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight frames before the background that the prompt names; how many clips show the motion, is on the card."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks" / "quality"))
    judge = importlib.import_module("video_motion")
    pipe = api.load("bundled:emoji-video")
    assert type(pipe).__name__ == "LattePipeline"
    assert 10e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 25e6
    prompts = ditq_bundled.prompts("emoji-video", "evaluation")[:8]
    drawn = sample(
        pipe, architectures.match(pipe.transformer), prompts, Sampling(steps=20, guidance_scale=4.0, batch_size=4)
    ).images
    colours = {"white": (255, 255, 255), **judge.clips.BACKGROUNDS}
    for prompt, frames in zip(prompts, drawn, strict=True):
        assert len(frames) == 8
        assert {frame.size for frame in frames} == {(64, 64)}
        asked = next((colour for name, colour in colours.items() if f"on a {name} " in prompt), colours["white"])
        beside = np.median([np.asarray(frame)[:, 4:8] for frame in frames], (0, 1, 2))  # within the pale fringe
        np.testing.assert_allclose(beside, asked, atol=25)
    assert judge.tally(prompts, drawn)["right"] >= 5


@pytest.mark.parametrize(
    ("name", "recipe", "psnr", "size"),
    [
        ("emoji-t2i", "viditq-w8a8", 38, 0.56),
        ("emoji-t2i", "viditq-w4a8", 22, 0.33),
        ("emoji-class", "rtn-w8a8", 35, 0.80),
        ("emoji-video", "viditq-w8a8", 38, 0.56),
    ],
)
def test_quantized_checkpoint_draws_the_same_as_in_memory_and_stays_close(
    name: str, recipe: str, psnr: float, size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "cache"))
    pipe = api.load(f"bundled:{name}")
    arch = architectures.match(pipe.transformer)
    options = {"steps": 8, "batch_size": 4}
    reference = sample(pipe, arch, few(name), Sampling(**options))
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    result = ditq.quantize(
        pipe, recipe, prompts=ditq_bundled.prompts(name, "calibration"), overrides=[*SHORT, *alphas(recipe)]
    )
    quantized = sample(pipe, arch, few(name), Sampling(**options))
    assert compare(reference, quantized).metrics["psnr_db"].mean > psnr

    ditq.save(pipe, tmp_path / "out", source=f"bundled:{name}")
    files = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    on_disk = sum(f.stat().st_size for f in files)
    assert on_disk < size * 2 * parameters
    assert on_disk == pytest.approx(result.plan.memory()[0], rel=0.03)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded = sample(again, arch, few(name), Sampling(**options))
    assert torch.equal(quantized.latents, loaded.latents)
    frames = [[image.tobytes() for image in listed(drawn)] for drawn in (quantized.images, loaded.images)]
    assert frames[0] == frames[1]
