"""``ditq doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

from typing import Any

from ditq.cli.common import AsJson, out, print_json


def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, engines and extras.

    Example: ditq doctor
    """
    import importlib.metadata as metadata
    import importlib.util
    import platform

    import torch
    from rich.table import Table

    from ditq.engines import engines

    versions = {"python": platform.python_version()}
    for package in ("ditq", "torch", "diffusers", "transformers", "accelerate", "safetensors", "peft"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    listed: list[dict[str, Any]] = []
    for engine in engines().values():
        reason = engine.why_unavailable()
        listed.append({"name": engine.name, "available": reason is None, "reason": reason or engine.note or "ready"})
    extras = {
        extra: importlib.util.find_spec(module) is not None
        for extra, module in {
            "demo": "ditq_bundled", "openvino": "openvino", "triton": "triton", "report": "jinja2", "metrics": "cv2",
            "ray": "ray",
        }.items()
    }  # fmt: skip
    devices = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    data = {"versions": versions, "devices": devices, "engines": listed, "extras": extras}
    if as_json:
        print_json(data)
        return
    table = Table("what", "state", "detail", title="ditq doctor", title_justify="left")
    for package, version in versions.items():
        table.add_row(package, version, "")
    for device in devices:
        table.add_row("device", "present", device)
    for engine_row in listed:
        table.add_row(
            f"engine {engine_row['name']}", "ready" if engine_row["available"] else "absent", engine_row["reason"]
        )
    for extra, present in extras.items():
        table.add_row(
            f"extra {extra}", "installed" if present else "absent", "" if present else f"pip install 'ditq[{extra}]'"
        )
    out.print(table, markup=False)


VERB = doctor
