"""Where a benchmark ran: every result file carries this."""

from __future__ import annotations

import json
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Processor, threads, devices and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        flags = set(lines.get("flags", "").split())
        wanted = ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8")
        cpu = f"{lines.get('model name', cpu)} ({', '.join(f for f in wanted if f in flags)})"
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "versions": {name: found(name) for name in ("ditq", "torch", "triton", "diffusers", "transformers")},
    }


def found(name: str) -> str | None:
    """The version of an installed package; of ditq also where it is only on the path."""
    try:
        return version(name)
    except PackageNotFoundError:
        return getattr(import_module(name), "__version__", None) if name == "ditq" else None


def write(name: str, data: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes ``results/NAME.json``, or into another folder."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
