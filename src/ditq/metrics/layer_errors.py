"""The error of every quantized linear's output against the 16-bit output, step by step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ditq.architectures import Architecture
from ditq.components import plan_of, prefixed, transformers
from ditq.errors import DitqError
from ditq.metrics.fidelity import MAX_DB
from ditq.plan import Plan
from ditq.sampling import Sampling, sample
from ditq.sampling.sampling import DEFAULT
from ditq.trace.calls import call_time
from ditq.trace.hooks import After, all_hooked, hooked


class LayerErrors(BaseModel):
    """Error of every quantized linear's output at every timestep; both models get the same transformer input.

    The error of a layer includes the errors of earlier layers in the same call.

    Attributes:
        layers: names, in the order of the plan.
        roles: role of each layer.
        timesteps: in sampling order.
        sqnr_db: [layers][timesteps], 10 log10(|y|^2 / |y - y_q|^2), at most 100. None at timesteps at which the
            transformer of the layer is not called (a pipeline of two experts).
        prompts: number of prompts.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    layers: list[str]
    roles: list[str]
    timesteps: list[float]
    sqnr_db: list[list[float | None]]
    prompts: int


class StepTime(BaseModel):
    """Wall time of one transformer call. Both models run in turn on the same inputs.

    ``ratio_to_reference`` is the speed-up: the median time of the 16-bit model over that of this model.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ms_median: float
    ms_min: float
    runs: int
    batch: int
    ratio_to_reference: float


@dataclass
class _Sums:
    """Energies of the output and of the error of every layer of one transformer, at every timestep."""

    signal: dict[float, dict[str, Tensor]] = field(default_factory=dict)
    noise: dict[float, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, t: float, name: str, y: Tensor, error: Tensor) -> None:
        for sums, value in ((self.signal, y), (self.noise, error)):
            by_layer = sums.setdefault(t, {})
            by_layer[name] = by_layer.get(name, torch.zeros(())) + value.square().sum().cpu()

    def sqnr_db(self, t: float, name: str) -> float | None:
        """SQNR of a layer at a timestep; None if the model was not called at that timestep."""
        return _db(self.signal[t].get(name), self.noise.get(t, {}).get(name)) if t in self.signal else None


@torch.no_grad()
def layer_errors(
    reference: Any,
    quantized: Any,
    architecture: Architecture,
    conditions: Sequence[str],
    sampling: Sampling = DEFAULT,
    *,
    runs: int = 7,
    on_step: Callable[[int], None] | None = None,
) -> tuple[LayerErrors, StepTime, StepTime]:
    """Samples ``conditions`` by the 16-bit pipeline and repeats each transformer call with the quantized transformer.

    Layers kept in 16 bit are left out: a fold may have moved a scale into their weights. In a pipeline with two
    transformers, each is compared with its counterpart, and names of layers of the second begin with its name.

    Args:
        reference, quantized: pipelines with transformers of the same names, on one device.
        architecture: of the transformers.
        conditions: prompts, or names or numbers of classes.
        sampling: its batch size is ignored; all conditions are sampled in one batch.
        runs: number of timed calls of each transformer in each pipeline.
        on_step: called with 1 after every transformer call.

    Returns:
        The errors, and the times of one transformer call of the reference and of the quantized pipeline.

    Raises:
        DitqError: a transformer is not called in these sampling steps.
    """
    sums: dict[str, _Sums] = {}
    roles: dict[str, dict[str, str]] = {}
    timed: list[TimedCall] = []
    with ExitStack() as comparing:
        for component, model in transformers(reference).items():
            if (other := transformers(quantized).get(component)) is None:
                continue
            plan = plan_of(other)
            roles[component] = {layer.name: layer.role for layer in plan.quantized} if plan else {}
            sums[component] = _Sums()
            rescaled = _carriers(architecture, model, plan) if plan else set()
            timed_call = _compared(model, other, architecture, roles[component], rescaled, sums[component], on_step)
            timed.append(comparing.enter_context(timed_call))
        sample(reference, architecture, conditions, sampling.batch(len(conditions)))
    if uncalled := [component for component, call in zip(sums, timed, strict=True) if not call.called]:
        raise DitqError(f"{uncalled[0]} is not called in these sampling steps; use more steps.")
    times = list(dict.fromkeys(t for one in sums.values() for t in one.signal))
    rows = [(component, name) for component in sums for name in roles[component]]
    errors = LayerErrors(
        layers=[prefixed(component, name) for component, name in rows],
        roles=[roles[component][name] for component, name in rows],
        timesteps=times,
        sqnr_db=[[sums[component].sqnr_db(t, name) for t in times] for component, name in rows],
        prompts=len(conditions),
    )
    return errors, *step_times(timed, runs=runs)


@contextmanager
def _compared(
    model: nn.Module,
    quantized: nn.Module,
    architecture: Architecture,
    names: Iterable[str],
    rescaled: Collection[str],
    sums: _Sums,
    on_step: Callable[[int], None] | None,
) -> Iterator[TimedCall]:
    """Repeats every call of ``model`` with ``quantized`` and adds up the errors, inside the ``with`` block.

    Yields:
        The first call; it is filled in when the model is called.
    """
    gains: dict[str, Tensor] = {}
    first = TimedCall(model, quantized)

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not first.called:
            first.args, first.kwargs = args, kwargs
        outputs = dict(recorded)
        recorded.clear()
        quantized(*args, **kwargs)
        t = call_time(architecture, kwargs)
        sums.signal.setdefault(t, {})
        for name, y in outputs.items():
            yq = recorded_quantized.pop(name)
            if name in rescaled:
                if name not in gains:
                    gains[name] = (y * yq).sum(0) / yq.square().sum(0).clamp_min(1e-30)
                yq = yq * gains[name]
            sums.add(t, name, y, y - yq)
        if on_step:
            on_step(1)

    with (
        _recording(model, names) as recorded,
        _recording(quantized, names) as recorded_quantized,
        hooked(model, after=compare),
    ):
        yield first


@dataclass
class TimedCall:
    """One call to time with a 16-bit transformer and with its quantized counterpart."""

    reference: nn.Module
    quantized: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> bool:
        """Whether the arguments of a call were recorded."""
        return bool(self.args or self.kwargs)


def step_times(calls: Sequence[TimedCall], runs: int = 7) -> tuple[StepTime, StepTime]:
    """Times calls of both sides in turn, so that other load on the machine affects both.

    Args:
        calls: one call of each transformer of the pipeline; the time of a call is their mean.
        runs: number of timed calls.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(runs + 1):
        for side, measured in zip(("reference", "quantized"), seconds, strict=True):
            begin = time.perf_counter()
            for call in calls:
                getattr(call, side)(*call.args, **call.kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first turn is a warm-up
                measured.append((time.perf_counter() - begin) / len(calls))
    inputs = (*calls[0].args, *calls[0].kwargs.values())
    batch = next(len(v) for v in inputs if isinstance(v, Tensor) and v.ndim > 1)
    base = statistics.median(seconds[0])
    first, second = (
        StepTime(
            ms_median=statistics.median(measured) * 1e3, ms_min=min(measured) * 1e3, runs=runs, batch=batch,
            ratio_to_reference=base / statistics.median(measured),
        )
        for measured in seconds
    )  # fmt: skip
    return first, second


def _carriers(architecture: Architecture, model: nn.Module, plan: Plan) -> set[str]:
    """Linears into which ditq 0.1 folded a scale: their outputs differ by a fixed factor per channel."""
    folded = {layer.name for layer in plan.quantized if layer.smooth is not None and layer.smooth.folded}
    return {
        f"{group.block}.{path}"
        for group in architecture.groups(model)
        for path in group.input.carriers
        if any(linear.name in folded for linear in group.linears)
    }


@contextmanager
def _recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the outputs [rows, N] float32 of the named layers in the latest call."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> After:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            outputs[name] = output.detach().flatten(0, -2).float()

        return hook

    with all_hooked(hooked(model.get_submodule(name), after=keep(name)) for name in names):
        yield outputs


def _db(signal: Tensor | None, noise: Tensor | None) -> float:
    if signal is None or noise is None or float(noise) == 0:
        return MAX_DB
    return min(MAX_DB, 10 * math.log10(max(float(signal), 1e-30) / float(noise)))
