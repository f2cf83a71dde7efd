"""How images and videos are sampled: everything that decides them besides the pipeline and the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ditq.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """Settings of one sampling run.

    Attributes:
        seed: number i of a list of prompts starts from the noise of seed ``seed + i``.
        steps: sampling steps; None: the pipeline's default.
        guidance_scale: of classifier-free guidance; None: the pipeline's default.
        batch_size: prompts in one call of the pipeline, at most. Results do not depend on it, up to rounding.
        arguments: more of the pipeline's call, e.g. ``{"height": 256, "width": 256, "num_frames": 17}``.

    Raises:
        UsageError: less than one step, or a batch of less than one.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Sampling needs {name} of at least 1, got {value}.")

    def shifted(self, by: int) -> Sampling:
        """The same with other noise: ``by`` is added to the seed."""
        return replace(self, seed=self.seed + by)

    def batch(self, size: int) -> Sampling:
        """The same with ``size`` prompts in one call."""
        return replace(self, batch_size=size)

    @property
    def sampler(self) -> dict[str, Any]:
        """What decides an image besides its noise, as keywords of :class:`Sampling` and the pipeline's own."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, **self.arguments}


DEFAULT = Sampling()
"""As the pipeline's own defaults are, from seed 0."""
