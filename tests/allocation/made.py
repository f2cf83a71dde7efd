"""Made-up scores, and spaces of bits without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from helpers import layer_plan

from ditq.allocation import Choices, MetricKind, Scores, Segment, Space

WIDTHS = ("w8", "w6", "w4")
ERROR = MetricKind(kind="error", higher_is_better=False, title="error")
OWN = MetricKind(kind="own", higher_is_better=True, title="own")


def made_scores(
    prediction: Any,
    own: Mapping[str, Any] | None = None,
    *,
    roles: Sequence[Sequence[str]] | None = None,
    choices: Sequence[str] = WIDTHS,
    parameters: int = 768,
    times: Sequence[float] = (500.0,),
    **fields: Any,
) -> Scores:
    """Scores of genes g0, g1 ... from harms [genes, choices, prompts].

    Args:
        prediction: harms; with several ``times``, [genes, choices, times, prompts].
        own: harms of metrics of images whose 16-bit value is 1.
        roles: of each gene, by default ffn.up.
        choices: widths.
        parameters: of each gene.
        times: of prediction.
        fields: replace.
    """
    error = np.asarray(prediction, float)
    error = error.reshape(*error.shape[:2], len(times), -1)
    genes, _, _, prompts = error.shape
    values = {"prediction": error.reshape(genes, len(choices), -1)}
    values |= {name: 1 - np.asarray(harms, float) for name, harms in (own or {}).items()}
    data: dict[str, Any] = {
        "part": "weights" if choices[0][0] == "w" else "activations", "unit": "layer",
        "genes": [f"g{i}" for i in range(genes)], "roles": roles or [["ffn.up"]] * genes,
        "parameters": [parameters] * genes, "choices": choices,
        "metrics": {"prediction": ERROR} | dict.fromkeys(own or {}, OWN),
        "values": {name: x.tolist() for name, x in values.items()},
        "reference": {name: [1.0] * prompts for name in own or {}},
        "prompts": list(range(prompts)) * len(times), "timesteps": np.repeat(times, prompts).tolist(),
        "steps": list(times), "rows": {},
    }  # fmt: skip
    return Scores.model_validate({**data, **fields})


def bit_space(
    genes: int | Sequence[str],
    budget: str = "weights:5",
    *,
    bits: Sequence[int] = (8, 6, 4),
    sizes: Sequence[int] | None = None,
    activations: bool = False,
    segments: tuple[Segment, ...] = (),
) -> Space:
    """Genes g0, g1 ... of one linear each.

    Args:
        genes: their number, or the role of each.
        budget: one.
        bits: to choose.
        sizes: outputs of each linear; their inputs are 32.
        activations: choose their bits.
        segments: of activations.
    """
    roles = ["ffn.up"] * genes if isinstance(genes, int) else list(genes)
    layers = [
        layer_plan(f"g{i}", n=n, role=role)
        for i, (role, n) in enumerate(zip(roles, sizes or [24] * 999, strict=False))
    ]
    choices = Choices(activations=tuple(bits), segments=segments) if activations else Choices(weights=tuple(bits))
    return Space.of(layers, dict.fromkeys((x.name for x in layers), 1.0), choices=choices, budget=budget)


def falling(levels: Sequence[float], prompts: int = 16, noise: float = 0.05, seed: int = 0) -> Any:
    """Harms [genes, widths, prompts] of known sensitivity: about ``level`` at the fewest bits, a fifth for each width
    above.
    """
    generator = np.random.default_rng(seed)
    means = np.asarray(levels, float)[:, None] * np.array([0.04, 0.2, 1.0])
    return means[..., None] * np.exp(noise * generator.standard_normal((*means.shape, prompts)))
