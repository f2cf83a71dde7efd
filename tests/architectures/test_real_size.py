"""The papers' video models at their real size, with random weights: one denoising step on integers.

``pytest -m slow -s tests/architectures/test_real_size.py`` also prints what each took.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest
import torch

import ditq
from ditq import architectures
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db

# Its architecture, what is smaller than published, and frames and side of the latents: as published for two.
MODELS: dict[str, tuple[str, dict[str, int], int, int]] = {
    "STDiT-XL/2 (Open-Sora v1.0)": ("stdit", {}, 16, 32),
    "STDiT3-XL/2 (Open-Sora v1.2)": ("stdit3", {}, 2, 8),
    "Latte-1": ("latte", {"video_length": 2}, 2, 8),
    "Latte-XL/2 (UCF-101)": ("latte-class", {}, 16, 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rtn-w8a8", "rtn-w4a8"])
@pytest.mark.parametrize("size", MODELS)
def test_one_quantized_step_at_real_size(size: str, recipe: str) -> None:
    """In bfloat16, 2 to 4 GB."""
    name, smaller, frames, side = MODELS[size]
    arch = architectures.load(name)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = arch.model_class()(**{**arch.sizes[size], **smaller}).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    latents = torch.randn(1, 4, frames, side, side).bfloat16()
    inputs: dict[str, Any] = {"hidden_states": latents, "timestep": torch.tensor([500])}
    if name == "latte-class":
        inputs["class_labels"] = torch.tensor([7])
    else:
        inputs["encoder_hidden_states"] = torch.randn(1, 5, 4096).bfloat16()
    if name == "latte":
        model.temp_pos_embed = model.temp_pos_embed[:, :2]
    with torch.no_grad():
        exact = model(**inputs).sample
        before = time.perf_counter()
        result = ditq.quantize(model, recipe)
        between = time.perf_counter()
        step = model(**inputs).sample
    took = time.perf_counter() - between
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    quantized, sixteen = result.plan.memory()
    print(
        f"\n{size}, {recipe}, {frames} frames of {side}: {len(result.plan.quantized)} layers in "
        f"{between - before:.0f} s, one step {took:.1f} s, {quantized / 1e9:.2f} of {sixteen / 1e9:.2f} GB, "
        f"peak of the process so far {peak:.1f} GiB, SQNR {sqnr_db(exact, step):.1f} dB"
    )
    assert all(isinstance(model.get_submodule(layer.name), QuantizedLinear) for layer in result.plan.quantized)
    assert quantized < (0.7 if name == "latte-class" else 0.53) * sixteen  # a modulation in every block, in 16 bit
    assert step.shape == exact.shape
    assert sqnr_db(exact, step) > (30 if recipe == "rtn-w8a8" else 20)
