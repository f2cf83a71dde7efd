"""Runs the proofs of engines once per process and device, and caches the results."""

from __future__ import annotations

import threading

import torch

from ditq.engines.base import Engine
from ditq.errors import DitqError, warn

_Key = tuple[str, torch.device]

_differences: dict[_Key, str | None] = {}
_warned: set[_Key] = set()
_lock = threading.Lock()


def has_one(engine: Engine) -> bool:
    """Whether the engine has a proof."""
    return type(engine).prove is not Engine.prove


def failure(engine: Engine, device: torch.device) -> str | None:
    """Why the engine's results cannot be trusted on this device, in a sentence for users; None if they can.

    Raises:
        DitqError: a CUDA graph is being recorded, and the proof has not run yet.
    """
    if not has_one(engine):
        return None
    if device.type == "cuda" and device.index is None and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())  # the proof's thread has its own current device
    key = (engine.name, device)
    with _lock:
        if key not in _differences:
            if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise DitqError(
                    f"The {engine.name} engine compares its kernels with their references when it is first used on a "
                    "device, and cannot do so while a CUDA graph is recorded. Run the model once on "
                    f"{device} before you record it."
                )
            _differences[key] = _run_apart(engine, device)
        difference = _differences[key]
    if difference is None:
        return None
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return f"its check of kernels failed on {name}: {difference}"


def warn_once(name: str, device: torch.device, reason: str, instead: str) -> None:
    """Warns that another engine runs on this device, and why; once per process and device."""
    if (name, device) not in _warned:
        _warned.add((name, device))
        warn(
            f"The {name} engine is not used: {reason}. The {instead} engine runs instead: its results are correct, "
            "but it is slower. Please report this message together with the output of `ditq doctor`."
        )


def forget() -> None:
    """Forgets all results and warnings."""
    _differences.clear()
    _warned.clear()


def _run_apart(engine: Engine, device: torch.device) -> str | None:
    """``engine.prove(device)`` in a separate thread.

    An engine may first be chosen while torch.compile traces, or under fake tensors, inference mode or autocast. All
    of these are local to a thread: in a new one the proof is plain eager code, and nothing records it.
    """
    results: list[str | None] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(engine.prove(device))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name=f"ditq proves {engine.name}")
    thread.start()
    thread.join()
    return results[0] if results else "it ended without a result"
