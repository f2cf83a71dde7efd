"""``ditq doctor``: the engines, runtimes and extras that work on this machine, and why the others do not."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from ditq.cli.common import AsJson, out, print_json

PACKAGES = ("ditq", "torch", "diffusers", "transformers", "accelerate", "safetensors", "peft")


def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, engines, runtimes and extras.

    Example: ditq doctor
    """
    import platform

    import torch

    from ditq.engines import registry
    from ditq.openvino import runtime
    from ditq.report.terminal import table

    versions = {"python": platform.python_version(), **{name: _version(name) or "not installed" for name in PACKAGES}}
    # On a GPU, the engines check their kernels here if they have not been checked before; this may take 30 seconds.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engines = registry.report(device)
    engine_rows: list[dict[str, Any]] = [{**row._asdict(), "device": str(device)} for row in engines]
    reason = runtime.why_unavailable()
    runtime_rows: list[dict[str, Any]] = [
        {"name": runtime.NAME, "available": reason is None, "reason": reason or runtime.NOTE}
    ]
    missing = missing_packages(metadata.requires("ditq") or []) if _version("ditq") else {}
    devices = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if as_json:
        extras = {extra: not packages for extra, packages in missing.items()}
        print_json({"versions": versions, "devices": devices, "engines": engine_rows, "runtimes": runtime_rows,
                    "extras": extras})  # fmt: skip
        return
    printed = table("what", "state", "detail", title="ditq doctor")
    for package, version in versions.items():
        printed.add_row(package, version, "")
    for description in devices:
        printed.add_row("device", "present", description)
    for kind, rows in (("engine", engine_rows), ("runtime", runtime_rows)):
        for row in rows:
            printed.add_row(f"{kind} {row['name']}", "ready" if row["available"] else "absent", row["reason"])
    for extra, packages in missing.items():
        hint = f"pip install 'ditq[{extra}]' (missing: {', '.join(packages)})" if packages else ""
        printed.add_row(f"extra {extra}", "absent" if packages else "installed", hint)
    out.print(printed)


def missing_packages(requirements: list[str]) -> dict[str, list[str]]:
    """The packages of each extra that are not installed. Packages for other platforms are ignored.

    Args:
        requirements: as in the metadata of a package, e.g. ``"optuna>=5; extra == 'search'"``.
    """
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requirements]
    named = sorted({extra for requirement in parsed if (extra := _extra(str(requirement.marker or "")))})
    return {
        extra: [
            r.name
            for r in parsed
            if _extra(str(r.marker or "")) == extra and r.marker and r.marker.evaluate({"extra": extra})
            and _version(r.name) is None
        ]
        for extra in named
    }  # fmt: skip


def _extra(marker: str) -> str:
    """``search`` for ``extra == "search"``; empty for a requirement without an extra."""
    return marker.partition('extra == "')[2].partition('"')[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


VERB = doctor
