"""A sensitivity measurement of a tiny pipeline, in this process or as a worker."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from helpers import CLASSES, tiny_dit

from ditq import architectures
from ditq.allocation import Scores, measure_sensitivity, sensitivity, study
from ditq.allocation.choices import Choices
from ditq.allocation.space import Genome
from ditq.recipe import load
from ditq.sampling import Sampling

PROMPTS = CLASSES[:2]
SAMPLING: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "batch_size": 2}
TRIALS = 12 * 2 + 1  # layers, widths, and the 16-bit model


def measured(
    storage: Path | str | None, pipe: Any = None, recipe: str = "rtn-w4a8", part: Any = "weights", unit: Any = "layer",
    bits: tuple[int, ...] = (8, 4), prompts: list[str] = PROMPTS, sampling: dict[str, Any] | None = None,
    **options: Any,
) -> Scores:  # fmt: skip
    pipe = pipe or tiny_dit()
    return measure_sensitivity(
        pipe, architectures.match(pipe.transformer), load(recipe), prompts,
        Sampling(**{**SAMPLING, **(sampling or {})}), part=part, choices=Choices(**{part: bits}, unit=unit),
        storage=storage, **options,
    )  # fmt: skip


def logged(log: Path | str, seconds: float = 0.0, last: int = 0) -> Any:
    """``_Laboratory.measured``, which logs every genome that it starts with, and takes ``seconds`` longer.

    It never returns from its evaluation number ``last``.
    """
    original, count = sensitivity._Laboratory.measured, 0

    def slow(self: Any, genome: Genome) -> study.Measured:
        nonlocal count
        count += 1
        with open(log, "a") as file:
            file.write(" ".join(map(str, genome)) + "\n")
        time.sleep(1e6 if count == last else seconds)
        return original(self, genome)

    return slow


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    sensitivity._Laboratory.measured = logged(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))  # type: ignore[method-assign]
    measured(sys.argv[1])
