"""Sensitivity scores: what quantizing one gene alone does to the model, for every prompt, by metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ditq.errors import CheckpointError, UsageError, unknown
from ditq.files import write_text
from ditq.plan import first_error
from ditq.reading import read_json

PREDICTION: Literal["prediction"] = "prediction"
"""The metric that is always there: the error of the transformer's output along the 16-bit trajectory."""

LATENT_ERROR: Literal["latent"] = "latent"
"""The error of the final latents of whole sampling runs. Errors that repeat from step to step add up in it."""

ErrorName = Literal["latent", "prediction"]
ERRORS: tuple[ErrorName, ...] = get_args(ErrorName)

Array = NDArray[np.float64]


class MetricKind(BaseModel):
    """How the values of a metric become a harm, which is larger if the model is worse.

    ``error``: relative squared errors, as they are. ``decibel``: 10 log10 of one over such an error. ``paired``:
    values against the 16-bit image. ``own``: values of the image itself; the harm is the relative drop from the 16-bit
    image's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["error", "decibel", "paired", "own"]
    higher_is_better: bool
    title: str


class Scores(BaseModel):
    """Sensitivity of every gene at every choice, measured with all other layers in 16 bit, on paired seeds.

    Attributes:
        part: what was quantized alone: weights or activations.
        unit: what a gene is: layer, block or role.
        genes: names.
        roles: of the layers of each gene.
        parameters: number of weights of each gene.
        choices: widths, e.g. ``("w8", "w4", "w3")``; 16 bit is the reference and is not listed.
        metrics: by name.
        values: by metric, [genes][choices][rows]. A row is a prompt; for ``prediction`` a call of the transformer.
        reference: by metric of kind "own": the 16-bit model's value of each prompt.
        prompts: the prompt of each row of ``prediction`` (numbers from 0); other rows are prompts in order.
        timesteps: of each row of ``prediction``.
        steps: the timesteps of the whole sampling run, in order.
        rows: tokens that each layer reads per image, by layer name.
        info: what was measured: recipe, model, seed, steps ..., for tables and files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    part: Literal["weights", "activations"]
    unit: Literal["layer", "block", "role"]
    genes: tuple[str, ...]
    roles: tuple[tuple[str, ...], ...]
    parameters: tuple[int, ...]
    choices: tuple[str, ...]
    metrics: dict[str, MetricKind]
    values: dict[str, tuple[tuple[tuple[float, ...], ...], ...]]
    reference: dict[str, tuple[float, ...]]
    prompts: tuple[int, ...]
    timesteps: tuple[float, ...]
    steps: tuple[float, ...]
    rows: dict[str, float]
    info: dict[str, Any] = {}

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        n = max(self.prompts, default=-1) + 1
        if not len(self.genes) == len(self.roles) == len(self.parameters) or len(self.prompts) != len(self.timesteps):
            raise ValueError("genes, roles and parameters, or prompts and timesteps, differ in length")
        for name, values in self.values.items():
            if name not in self.metrics:
                raise ValueError(f"metric {name!r} is not described")
            wanted = (len(self.genes), len(self.choices), len(self.prompts) if name == PREDICTION else n)
            shape = {(len(values), len(of_gene), len(rows)) for of_gene in values for rows in of_gene}
            if shape != {wanted}:
                raise ValueError(f"values of {name!r} must be {wanted}, got {sorted(shape)[:3]}")
            if self.metrics[name].kind == "own" and len(self.reference.get(name, ())) != n:
                raise ValueError(f"the reference of {name!r} must have {n} values")
        return self

    @property
    def error(self) -> ErrorName:
        """The error that allocations sum up: that of the final latents if it was measured."""
        return LATENT_ERROR if LATENT_ERROR in self.metrics else PREDICTION

    def harms(self, metric: str = PREDICTION, between: tuple[float, float] | None = None) -> Array:
        """The harm of every gene at every choice for every prompt, [genes, choices, prompts]; larger is worse.

        Args:
            metric: by name.
            between: of ``prediction``: the mean over the timesteps in this range (any order), by default over all.
                NaN for a prompt without a call in the range.

        Raises:
            UsageError: an unknown metric, or a range for a metric other than ``prediction``.
        """
        if metric not in self.values:
            raise unknown("metric of these scores", metric, self.values)
        values, kind = np.asarray(self.values[metric]), self.metrics[metric]
        if metric == PREDICTION:
            return self._by_prompt(values, between)
        if between is not None:
            raise UsageError(f"Only {PREDICTION!r} is known by timestep, not {metric!r}.")
        if kind.kind == "decibel":
            return np.asarray(10 ** (-values / 10))
        sign = 1.0 if kind.higher_is_better else -1.0
        if kind.kind == "own":
            reference = np.asarray(self.reference[metric])
            return np.asarray(sign * (reference - values) / max(float(np.abs(reference).mean()), 1e-12))
        return values if kind.kind == "error" else -sign * values

    def _by_prompt(self, values: Array, between: tuple[float, float] | None) -> Array:
        times, prompts = np.asarray(self.timesteps), np.asarray(self.prompts)
        inside = np.ones(len(times), bool)
        if between is not None:
            inside = (times >= min(between)) & (times <= max(between))
        out = np.full((*values.shape[:2], int(prompts.max(initial=-1)) + 1), np.nan)
        for prompt in range(out.shape[2]):
            chosen = inside & (prompts == prompt)
            if chosen.any():
                out[:, :, prompt] = values[:, :, chosen].mean(2)
        return out

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file, replacing an earlier one only when it is complete."""
        write_text(Path(path), self.model_dump_json() + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads and validates.

        Raises:
            CheckpointError: the file is missing, or a field is invalid (which is named).
        """
        data = read_json(Path(path), CheckpointError)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise CheckpointError(f"{path} holds no sensitivity scores: {first_error(error)}.") from error


def mean_and_error(harms: Array) -> tuple[Array, Array]:
    """Mean over prompts and its standard error.

    Args:
        harms: float64 [..., prompts]. A prompt without a value is NaN and is left out.

    Returns:
        float64 [...] each. The mean of no value is NaN, and so is the error of fewer than two.

    Example:
        >>> import numpy as np
        >>> mean_and_error(np.array([[1.0, 3.0, np.nan], [2.0, np.nan, np.nan]]))
        (array([2., 2.]), array([ 1., nan]))
    """
    known = ~np.isnan(harms)
    n = known.sum(-1)
    mean = np.where(n > 0, np.where(known, harms, 0.0).sum(-1) / np.maximum(n, 1), np.nan)
    squares = np.square(np.where(known, harms - mean[..., None], 0.0)).sum(-1)
    return mean, np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1)), np.nan)


def listed(values: Sequence[object]) -> str:
    """Values in a message."""
    return ", ".join(map(str, values))
