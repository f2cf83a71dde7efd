"""Finds the engines (packages of ``ditq.engines`` with an ``ENGINE``) and chooses one for each job."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ditq.engines import proofs
from ditq.engines.base import Engine, FusingEngine
from ditq.errors import DitqError, unknown
from ditq.numerics import Grid
from ditq.plan import Plan

_forced: ContextVar[str | None] = ContextVar("ditq_engine", default=None)
_fusion: ContextVar[bool] = ContextVar("ditq_fusion", default=True)


@cache
def engines() -> dict[str, Engine]:
    """All engines by name, the preferred ones first. Importing one must not import its heavy libraries."""
    loaded = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.ispkg:
            loaded.append(importlib.import_module(f"{__package__}.{info.name}").ENGINE)
    return {engine.name: engine for engine in sorted(loaded, key=lambda e: -e.priority)}


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Runs everything inside with this engine. A layer that it cannot run raises; nothing falls back silently.

    Raises:
        UsageError: no engine has this name.
    """
    if name not in engines():
        raise unknown("engine", name, engines())
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The engine that :func:`use_engine` selects here, if any."""
    return _forced.get()


@contextmanager
def fusion(on: bool) -> Iterator[None]:
    """Whether layers inside defer their results (the default), so that an engine can fuse operations."""
    token = _fusion.set(on)
    try:
        yield
    finally:
        _fusion.reset(token)


def fuses(device: torch.device) -> bool:
    """Whether layers should defer their results on this device: an engine there can fuse the next operation."""
    if not _fusion.get():
        return False
    try:
        return isinstance(choose(*_COMMON, device), FusingEngine)
    except DitqError:
        return False


# Formats that every fusing engine must support.
_COMMON = (
    Grid(bits=8, granularity="channel"), Grid(bits=8, granularity="token", dynamic=True)
)  # fmt: skip


def choose(weight: Grid, activation: Grid | None, device: torch.device, name: str | None = None) -> Engine:
    """The preferred engine that can run these formats on this device. Compiled code keeps the one it was traced with.

    An engine is proved first (:meth:`Engine.prove`). If the proof fails, ditq warns once and the next engine runs on
    this device; an engine selected by name raises instead.

    Args:
        name: of the layer's engine; :func:`use_engine` takes precedence.

    Raises:
        DitqError: no engine can run the formats (the message gives the reason of each); or a CUDA graph is being
            recorded and the engine is not proved yet.
    """
    return _chosen[_choose_name(weight, activation, device, name)]


_chosen: dict[str, Engine] = {}


def _choose_name(weight: Grid, activation: Grid | None, device: torch.device, name: str | None) -> str:
    engine = _choose(weight, activation, device, _forced.get() or name)
    _chosen[engine.name] = engine
    return engine.name


# torch.compile treats the result as a constant; tracing the search would break the graph at each layer.
# The decorator torch.compiler.assume_constant_result sets this too, and imports the whole compiler.
_choose_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _choose(weight: Grid, activation: Grid | None, device: torch.device, forced: str | None) -> Engine:
    candidates = [engines()[forced]] if forced else list(engines().values())
    reasons: dict[str, str] = {}
    failed: list[str] = []
    for engine in candidates:
        reason = engine.why_unavailable() or engine.why_unsupported(weight, activation, device)
        if reason is None:
            reason = proofs.failure(engine, device)
            if reason is None:
                for name in failed:
                    proofs.warn_once(name, device, reasons[name], engine.name)
                return engine
            failed.append(engine.name)
        reasons[engine.name] = reason
    raise DitqError(
        f"No engine can run weights {weight} with activations {activation or '16 bit'} on {device}: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    )


class EngineReport(NamedTuple):
    """What one engine can do on one device.

    Attributes:
        available: whether it can run there.
        reason: why it cannot run, or a note on its state.
        proved: whether its kernels agreed with their references there; None: it has no proof, or cannot run.
    """

    name: str
    available: bool
    reason: str
    proved: bool | None


def report(device: torch.device) -> list[EngineReport]:
    """All engines on a device, the preferred ones first. Runs the proofs that have not run in this process yet."""
    reports = []
    for engine in engines().values():
        reason, proved = engine.why_unavailable() or engine.why_unsupported(*_COMMON, device), None
        if reason is None and proofs.has_one(engine):
            reason = proofs.failure(engine, device)
            proved = reason is None
        note = (engine.note or "ready") + ("; its kernels agree with their references here" if proved else "")
        reports.append(EngineReport(engine.name, reason is None, reason or note, proved))
    return reports


def forget() -> None:
    """Clears the caches of choices, proofs and warnings."""
    _choose.cache_clear()
    proofs.forget()


def describe(plan: Plan, device: torch.device) -> str:
    """The engines that run the formats of a plan on a device, as text."""
    pairs = dict.fromkeys((x.weight, grid) for x in plan.quantized for grid in x.activations)
    chosen = {choose(w, a, device).name for w, a in pairs if w and a}
    return f"{' and '.join(sorted(chosen)) or 'dequantized weights, 16-bit products'} on {device}"
