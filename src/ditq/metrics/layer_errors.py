"""Where the error comes from: every quantized linear's output against the 16-bit one, step by step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.metrics.fidelity import MAX_DB
from ditq.plan import Plan
from ditq.sampling import sample


class LayerErrors(BaseModel):
    """Error of every quantized linear's output at every timestep, both models fed the same transformer input.

    Errors of earlier layers in the same call are carried over: it is what reaches this point of the network.

    Attributes:
        layers: names, in the order of the plan.
        sqnr_db: [layers][timesteps], 10 log10(|y|^2 / |y - y_q|^2), at most 100.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    layers: list[str]
    roles: list[str]
    timesteps: list[float]
    sqnr_db: list[list[float]]
    prompts: int


class StepTime(BaseModel):
    """Wall time of one transformer call; the models take turns on the same inputs in one run.

    ``ratio_to_reference`` is the speed-up: median time of the 16-bit model over that of this one.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ms_median: float
    ms_min: float
    runs: int
    batch: int
    ratio_to_reference: float


@torch.no_grad()
def layer_errors(
    reference: Any,
    quantized: nn.Module,
    plan: Plan,
    architecture: Architecture,
    conditions: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    runs: int = 7,
    on_step: Callable[[int], None] | None = None,
) -> tuple[LayerErrors, StepTime, StepTime]:
    """Draws ``conditions`` by the 16-bit pipeline and gives each of its transformer calls to ``quantized`` too.

    Layers kept in 16 bit are left out: a fold may have moved a scale into their weights.

    Args:
        quantized: the quantized transformer; on the device of the reference.
        arguments: of the pipeline's call.
        runs: how often one call is timed for each model.
        on_step: called with 1 after every transformer call.

    Returns:
        The errors, and the times of one transformer call of the reference and of the quantized model.
    """
    model: nn.Module = reference.transformer
    rows = {layer.name: layer.role for layer in plan.quantized}
    rescaled = _carriers(architecture, model, plan)
    signal: dict[float, dict[str, Tensor]] = {}
    noise: dict[float, dict[str, Tensor]] = {}
    gains: dict[str, Tensor] = {}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not calls:
            calls.append((args, kwargs))
        outputs = dict(recorded)
        recorded.clear()
        quantized(*args, **kwargs)
        value = kwargs.get(architecture.forward.time)
        t = float(value.flatten()[0]) if isinstance(value, Tensor) else float(value if value is not None else -1)
        at_signal, at_noise = signal.setdefault(t, {}), noise.setdefault(t, {})
        for name, y in outputs.items():
            yq = recorded_quantized.pop(name)
            if name in rescaled:
                if name not in gains:
                    gains[name] = (y * yq).sum(0) / yq.square().sum(0).clamp_min(1e-30)
                yq = yq * gains[name]
            at_signal[name] = at_signal.get(name, torch.zeros(())) + y.square().sum().cpu()
            at_noise[name] = at_noise.get(name, torch.zeros(())) + (y - yq).square().sum().cpu()
        if on_step:
            on_step(1)

    with _recording(model, rows) as recorded, _recording(quantized, rows) as recorded_quantized:
        handle = model.register_forward_hook(compare, with_kwargs=True)
        try:
            sample(
                reference, architecture, conditions, seed=seed, steps=steps, guidance_scale=guidance_scale,
                batch_size=len(conditions), **(arguments or {}),
            )  # fmt: skip
        finally:
            handle.remove()
    times = list(signal)
    errors = LayerErrors(
        layers=list(rows),
        roles=list(rows.values()),
        timesteps=times,
        sqnr_db=[[_db(signal[t].get(name), noise[t].get(name)) for t in times] for name in rows],
        prompts=len(conditions),
    )
    return errors, *step_times(model, quantized, *calls[0], runs=runs)


def step_times(
    reference: nn.Module, quantized: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runs: int = 7
) -> tuple[StepTime, StepTime]:
    """Times one call of both models in turn: what slows this machine down slows both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs + 1):
        for model, found in zip((reference, quantized), seconds, strict=True):
            begin = time.perf_counter()
            model(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                found.append(time.perf_counter() - begin)
    batch = next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 1)
    base = statistics.median(seconds[0])
    first, second = (
        StepTime(
            ms_median=statistics.median(found) * 1e3, ms_min=min(found) * 1e3, runs=runs, batch=batch,
            ratio_to_reference=base / statistics.median(found),
        )
        for found in seconds
    )  # fmt: skip
    return first, second


def _carriers(architecture: Architecture, model: nn.Module, plan: Plan) -> set[str]:
    """Linears that a scale was folded into: their outputs differ by a fixed factor per channel."""
    folded = {layer.name for layer in plan.quantized if layer.smooth is not None and layer.smooth.folded}
    return {
        f"{group.block}.{path}"
        for group in architecture.groups(model)
        for path in group.input.carriers
        if any(linear.name in folded for linear in group.linears)
    }


@contextmanager
def _recording(model: nn.Module, names: Sequence[str] | dict[str, str]) -> Iterator[dict[str, Tensor]]:
    """The outputs [rows, N] float32 of these layers in the latest call."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            outputs[name] = output.detach().flatten(0, -2).float()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _db(signal: Tensor | None, noise: Tensor | None) -> float:
    if signal is None or noise is None or float(noise) == 0:
        return MAX_DB
    return min(MAX_DB, 10 * math.log10(max(float(signal), 1e-30) / float(noise)))
