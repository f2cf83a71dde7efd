"""The environment that results depend on besides the seeds: device, threads and versions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "diffusers", "transformers")


def cpu_name() -> str:
    """The processor's product name, or its architecture if the system does not report one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return name or platform.processor() or platform.machine()


def versions(*names: str) -> dict[str, str]:
    """The installed versions of packages."""
    return {name: metadata.version(name) for name in names}


def environment() -> dict[str, Any]:
    """Device, processor with its instruction set, threads, and versions of ditq and the libraries it computes with."""
    import torch

    cpu = cpu_name()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpu": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "versions": versions("ditq", *LIBRARIES),
    }
