"""Sampling settings: everything besides the pipeline and the prompts that determines an image or a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ditq.errors import UsageError

LARGEST_SEED = 2**62  # torch takes seeds below 2^64; ditq adds the number of the prompt and offsets
_LARGEST_SUM = 2**63


def check_seed(seed: int, largest: int = LARGEST_SEED) -> None:
    """Refuses a seed that torch does not take, or takes as another number.

    Raises:
        UsageError: it is negative or too large.
    """
    if not 0 <= seed <= largest:
        raise UsageError(f"seed must be 0 to 2^62 ({LARGEST_SEED}), got {seed}.")


@dataclass(frozen=True)
class Sampling:
    """Settings of one sampling run.

    Attributes:
        seed: number i of a list of prompts starts from the noise of seed ``seed + i``.
        steps: sampling steps; None: the pipeline's default.
        guidance_scale: of classifier-free guidance; None: the pipeline's default.
        batch_size: largest number of prompts in one pipeline call. It changes results by rounding only.
        arguments: further arguments of the pipeline's call, e.g. ``{"height": 256, "width": 256, "num_frames": 17}``.

    Raises:
        UsageError: ``steps`` or ``batch_size`` is less than 1, or the seed is out of range.
    """

    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int = 8
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seed(self.seed, _LARGEST_SUM)  # it may have offsets
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")

    def shifted(self, by: int) -> Sampling:
        """A copy with other noise: ``by`` is added to the seed."""
        return replace(self, seed=self.seed + by)

    def batch(self, size: int) -> Sampling:
        """A copy with batch size ``size``."""
        return replace(self, batch_size=size)

    @property
    def sampler(self) -> dict[str, Any]:
        """The settings that affect an image besides its noise, by keyword of :class:`Sampling` and the pipeline."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, **self.arguments}


DEFAULT = Sampling()
"""The pipeline's defaults, from seed 0."""
