"""True average bits of the mixed-precision layouts that ViDiT-Q shipped, on the models that they are made for.

``python benchmarks/quality/layouts.py`` plans each layout on a model of the published size (without weights), prints a
table and writes ``benchmarks/results/layouts.json``. Bits of weights are averages over the quantized layers and over
the timesteps of the run; memory counts every copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, write

from ditq import architectures
from ditq import recipe as recipes
from ditq.conversion.draft import draft, estimate
from ditq.conversion.policy import with_policy
from ditq.models.opensora import STDiT, STDiT3

TIMES = tuple(float(t) for t in range(999, -1, -50))  # 20 steps

LAYOUTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "viditq-mp-w4a8": ("Open-Sora 1.0 (STDiT-XL/2)", STDiT),
    "viditq-mp-opensora-w4a8": ("Open-Sora 1.2 (STDiT3-XL/2)", STDiT3),
    "viditq-mp-pixart-w4a8": (
        "PixArt-Sigma XL/2",
        lambda: diffusers.PixArtTransformer2DModel(
            num_layers=28, caption_channels=4096, sample_size=128, cross_attention_dim=1152
        ),
    ),
}


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'recipe':26} {'model':28} {'weights':>8} {'whole':>6} {'inputs':>7} {'memory':>7}")
    for name, (title, make) in LAYOUTS.items():
        with torch.device("meta"):
            model = make()
        architecture, recipe = architectures.match(model), recipes.load(name)
        layers = with_policy(draft(model, architecture, recipe), recipe, TIMES)
        plan = estimate(model, architecture, recipe).model_copy(update={"layers": tuple(layers), "trajectory": TIMES})
        bits = sum(x.average_weight_bits(TIMES) * x.parameters for x in plan.quantized)
        row = {
            "model": title,
            "weights": bits / sum(x.parameters for x in plan.quantized),
            "average_bits": plan.average_bits,
            "inputs": plan.average_activation_bits,
            "memory": plan.memory()[0] / plan.memory()[1],
        }
        rows[name] = row
        numbers = f"{row['weights']:8.2f} {row['average_bits']:6.2f} {row['inputs']:7.2f} {row['memory']:7.3f}"
        print(f"{name:26} {title:28} {numbers}")
    print("written to", write("layouts", {**environment(), "rows": rows}))


if __name__ == "__main__":
    main()
