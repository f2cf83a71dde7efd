"""The papers' video models at their real size, with random weights: one denoising step on integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditq
from ditq import architectures
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("stdit", "STDiT-XL/2 (Open-Sora v1.0)"), ("latte", "Latte-1")])
def test_one_quantized_step_at_real_size(name: str, size: str) -> None:
    """In bfloat16, 2 to 3 GB; two small frames, since the size of the weights is what matters here."""
    arch = architectures.load(name)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = arch.model_class()(**{**arch.sizes[size], **({"video_length": 2} if name == "latte" else {})}).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 5, 4096, dtype=torch.bfloat16),
        "timestep": torch.tensor([500]),
    }
    if name == "latte":
        model.temp_pos_embed = model.temp_pos_embed[:, :2]
    with torch.no_grad():
        exact = model(**inputs).sample
        result = ditq.quantize(model, "rtn-w8a8")
        step = model(**inputs).sample
    assert all(isinstance(model.get_submodule(layer.name), QuantizedLinear) for layer in result.plan.quantized)
    assert result.plan.memory()[0] < 0.53 * result.plan.memory()[1]
    assert step.shape == exact.shape
    assert sqnr_db(exact, step) > 20
