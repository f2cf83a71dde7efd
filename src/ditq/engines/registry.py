"""Finds the engines (a package of ``ditq.engines`` that has ``ENGINE``) and picks one for a job, saying why."""

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
    found = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.ispkg:
            found.append(importlib.import_module(f"{__package__}.{info.name}").ENGINE)
    return {engine.name: engine for engine in sorted(found, key=lambda e: -e.priority)}


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Runs everything inside with this engine, or fails: nothing falls back in silence.

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
    """The engine that :func:`use_engine` asks for here, if any."""
    return _forced.get()


@contextmanager
def fusion(on: bool) -> Iterator[None]:
    """Whether layers inside wait for what follows them, so that an engine may do it in the same pass (the default)."""
    token = _fusion.set(on)
    try:
        yield
    finally:
        _fusion.reset(token)


def fuses(device: torch.device) -> bool:
    """Whether it is worth the while to wait for what follows a layer on this device: an engine there can do both."""
    if not _fusion.get():
        return False
    try:
        return isinstance(choose(*_COMMON, device), FusingEngine)
    except DitqError:
        return False


# What an engine that fuses has to run at the least.
_COMMON = (
    Grid(bits=8, granularity="channel"), Grid(bits=8, granularity="token", dynamic=True)
)  # fmt: skip


def choose(weight: Grid, activation: Grid | None, device: torch.device, wanted: str | None = None) -> Engine:
    """The preferred engine that can run these formats on this device. Compiled code keeps the one it was traced with.

    An engine is proved first (:meth:`Engine.prove`). Where that fails, the next one runs on this device, with one
    warning; an engine that was asked for by name raises instead.

    Args:
        wanted: a layer's own engine; :func:`use_engine` wins.

    Raises:
        DitqError: none can, and the reason of each is given; or a CUDA graph is being recorded and the engine is not
            proved yet.
    """
    return _chosen[_name(weight, activation, device, wanted)]


_chosen: dict[str, Engine] = {}


def _name(weight: Grid, activation: Grid | None, device: torch.device, wanted: str | None) -> str:
    engine = _choose(weight, activation, device, _forced.get() or wanted)
    _chosen[engine.name] = engine
    return engine.name


# torch.compile takes the answer as a constant; tracing the search would break the graph at each layer.
# The decorator torch.compiler.assume_constant_result sets this too, and imports the whole compiler.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        reason: why not, or a note on its state.
        proved: whether its kernels agreed with their references there; None: it has nothing to prove, or cannot run.
    """

    name: str
    available: bool
    reason: str
    proved: bool | None


def report(device: torch.device) -> list[EngineReport]:
    """All engines on a device, the preferred ones first. Runs the proofs that have not run in this process yet."""
    found = []
    for engine in engines().values():
        reason, proved = engine.why_unavailable() or engine.why_unsupported(*_COMMON, device), None
        if reason is None and proofs.has_one(engine):
            reason = proofs.failure(engine, device)
            proved = reason is None
        note = (engine.note or "ready") + ("; its kernels agree with their references here" if proved else "")
        found.append(EngineReport(engine.name, reason is None, reason or note, proved))
    return found


def forget() -> None:
    """Forgets choices, proofs and warnings, so that engines are chosen and proved anew."""
    _choose.cache_clear()
    proofs.forget()


def describe(plan: Plan, device: torch.device) -> str:
    """Which engines run the formats of a plan on a device, in words."""
    pairs = dict.fromkeys((x.weight, x.activation) for x in plan.quantized if x.weight and x.activation)
    chosen = {choose(w, a, device).name for w, a in pairs}
    return f"{' and '.join(sorted(chosen)) or 'dequantized weights, 16-bit products'} on {device}"
