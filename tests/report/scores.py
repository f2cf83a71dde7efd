"""Made-up sensitivity scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditq.allocation.scores import PREDICTION, MetricKind, Scores

STEPS = [999.0 - 100 * i for i in range(10)]
KINDS = {
    PREDICTION: MetricKind(kind="error", higher_is_better=False, title="prediction error"),
    "psnr_db": MetricKind(kind="decibel", higher_is_better=True, title="PSNR"),
    "ssim": MetricKind(kind="paired", higher_is_better=True, title="SSIM"),
    "clip_score": MetricKind(kind="own", higher_is_better=True, title="CLIPScore"),
}
REFERENCE = 0.5


def scores(genes: int = 12, prompts: int = 4, metrics: tuple[str, ...] = (PREDICTION,), **update: Any) -> Scores:
    """Scores of weights of blocks at 8, 4 and 3 bits. Block ``genes - 2`` is the worst one at every width.

    Every prompt is measured at all timesteps. The error of a block falls from the first timestep to the last.
    """
    rng = np.random.default_rng(genes)
    names = [f"transformer_blocks.{i}" for i in range(genes)]
    depth = np.linspace(1, 2, genes)
    depth[genes - 2] = 6
    width = np.array([1e-5, 4e-3, 3e-2])
    noise = rng.uniform(0.9, 1.1, (genes, 3, prompts))
    of_prompt = depth[:, None, None] * width[None, :, None] * noise
    time = np.linspace(1.5, 0.5, len(STEPS))
    error = (of_prompt[..., None] * time).reshape(genes, 3, -1)
    values = {
        PREDICTION: error, "psnr_db": -10 * np.log10(of_prompt), "ssim": 1 - of_prompt,
        "clip_score": REFERENCE * (1 - of_prompt),
    }  # fmt: skip
    data = {
        "part": "weights", "unit": "block", "genes": names, "roles": [["self_attn.q", "ffn.up"]] * genes,
        "parameters": [1000] * genes, "choices": ("w8", "w4", "w3"),
        "metrics": {name: KINDS[name] for name in metrics},
        "values": {name: values[name].tolist() for name in metrics},
        "reference": {"clip_score": [REFERENCE] * prompts},
        "prompts": [p for p in range(prompts) for _ in STEPS], "timesteps": STEPS * prompts, "steps": STEPS,
        "rows": {}, "info": {"recipe": "rtn-w4a8", "component": "transformer", "seed": 0},
    }  # fmt: skip
    return Scores.model_validate({**data, **update})


def renamed(of: Scores, names: list[str], unit: str) -> Scores:
    return of.model_copy(update={"genes": tuple(names), "unit": unit})
