"""The bundled trained models, end to end: stock pipelines load them, quantize, save, load, and stay close."""

from __future__ import annotations

from pathlib import Path

import ditq_bundled
import pytest
import torch
from diffusers import DiffusionPipeline

import ditq
from ditq import api, architectures
from ditq.comparison import compare
from ditq.sampling import sample

MODELS = ditq_bundled.names()
SHORT = ("calibration.prompts=8", "calibration.steps=6", "calibration.rows=512", "balance.alpha=[0.3, 0.6]")


def few(name: str) -> list[str]:
    return ditq_bundled.prompts(name, "evaluation")[:4]


def test_both_models_are_here() -> None:
    assert MODELS == ["emoji-class", "emoji-t2i"]


@pytest.mark.parametrize("name", MODELS)
def test_stock_pipeline_draws_something(name: str) -> None:
    """Pictures of a trained model: white corners, and ink in the middle."""
    pipe = api.load(f"bundled:{name}")
    assert type(pipe).__module__.startswith("diffusers.")
    drawn = sample(pipe, architectures.match(pipe.transformer), few(name), steps=8)
    for image in drawn.images:
        assert image.size == (64, 64)
        assert min(image.crop((0, 0, 2, 2)).convert("L").getextrema()) > 150
        assert min(image.crop((16, 16, 48, 48)).convert("L").getextrema()) < 220


@pytest.mark.parametrize(
    ("name", "recipe", "psnr", "size"),
    [
        ("emoji-t2i", "viditq-w8a8", 38, 0.56),
        ("emoji-t2i", "viditq-w4a8", 22, 0.33),
        ("emoji-class", "rtn-w8a8", 35, 0.80),
    ],
)
def test_quantized_checkpoint_draws_the_same_as_in_memory_and_stays_close(
    name: str, recipe: str, psnr: float, size: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "cache"))
    pipe = api.load(f"bundled:{name}")
    arch = architectures.match(pipe.transformer)
    options = {"steps": 8, "batch_size": 4}
    reference = sample(pipe, arch, few(name), **options)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    result = ditq.quantize(pipe, recipe, prompts=ditq_bundled.prompts(name, "calibration"), overrides=SHORT)
    quantized = sample(pipe, arch, few(name), **options)
    assert compare(reference, quantized).metrics["psnr_db"].mean > psnr

    ditq.save(pipe, tmp_path / "out", source=f"bundled:{name}")
    files = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    on_disk = sum(f.stat().st_size for f in files)
    assert on_disk < size * 2 * parameters
    assert on_disk == pytest.approx(result.plan.memory()[0], rel=0.03)
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded = sample(again, arch, few(name), **options)
    assert torch.equal(quantized.latents, loaded.latents)
    assert [a.tobytes() for a in quantized.images] == [b.tobytes() for b in loaded.images]
