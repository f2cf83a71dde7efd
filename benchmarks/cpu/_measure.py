"""Shared code of the CPU benchmarks: interleaved timing, memory, rows of results, their table and their plots."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import RESULTS, environment, write

PEERS = ("openvino", "nncf", "torchao", "optimum-quanto")


@dataclass
class Row:
    """One variant. ``spread`` is the interquartile range; ``status`` says why a variant has no times."""

    name: str
    status: str = "ok"
    ms_median: float | None = None
    ms_min: float | None = None
    spread: float | None = None
    runs: int = 0
    ratio_to_baseline: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    relative_error: float | None = None
    seconds_to_build: float | None = None


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each call: every round calls every case once, so that drifts of the machine hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name, call in cases.items():
            begin = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def row(name: str, times: Sequence[float], **fields: Any) -> Row:
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return Row(
        name, ms_median=statistics.median(times), ms_min=min(times), spread=quartiles[2] - quartiles[0],
        runs=len(times), **fields,
    )  # fmt: skip


def set_ratios(rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """How many times faster than each baseline a row is, by medians; the first baseline is ``ratio_to_baseline``."""
    medians = {r.name: r.ms_median for r in rows if r.ms_median}
    for r in rows:
        if r.ms_median:
            r.ratios = {name: medians[name] / r.ms_median for name in baselines if name in medians}
            r.ratio_to_baseline = r.ratios.get(baselines[0])


def where() -> dict[str, Any]:
    """The environment, with the versions of the peers that are installed and how busy the machine was."""
    found = {**environment(), "load_average": os.getloadavg()[0]}
    for name in PEERS:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    return found


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16; others emulate it, which is slower than fp32."""
    return any(flag in environment()["cpu"] for flag in ("avx512_bf16", "amx"))


def relative_error(reference: Tensor, output: Tensor) -> float:
    difference = output.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


def torch_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once, also inside of tensor subclasses."""
    found: dict[int, int] = {}

    def visit(t: Tensor) -> None:
        if hasattr(t, "__tensor_flatten__"):
            for name in t.__tensor_flatten__()[0]:
                visit(getattr(t, name))
        else:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    for tensor in (*model.parameters(), *model.buffers()):
        visit(tensor)
    return sum(found.values())


def openvino_bytes(compiled: Any) -> int:
    """Bytes of the constants of a compiled OpenVINO graph, in the types in which it keeps them."""
    total = 0.0
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "Const":
            count = 1
            for size in node.output(0).get_shape():
                count *= size
            total += count * node.get_output_element_type(0).bitwidth / 8
    return int(total)


def trim() -> None:
    """Gives freed memory back to the system, so that the next measurement does not see it."""
    import ctypes

    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that the process holds during a call, everything that it held before included (Linux)."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, see proc(5)
    call()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_subprocess(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object on the last line that a script prints; what it says on stderr, where it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    """Fixed-width text: milliseconds, ratios and memory."""
    shown = [name for name in baselines if any(name in r.ratios for r in rows)]
    heads = ["median ms", "min ms", "spread", *(f"x {name}" for name in shown), "weights MB", "peak MB", "error"]
    lines = [f"{'':44} " + " ".join(f"{head:>{max(9, len(head))}}" for head in heads)]
    for r in rows:
        if r.status != "ok":
            lines.append(f"{r.name:44} {r.status}")
            continue
        cells = [f"{r.ms_median:.1f}", f"{r.ms_min:.1f}", f"{r.spread:.1f}"]
        cells += [f"{r.ratios[name]:.2f}" if name in r.ratios else "" for name in shown]
        cells += [f"{b / 1e6:.0f}" if b else "" for b in (r.weights_bytes, r.peak_bytes)]
        cells.append("" if r.relative_error is None else f"{r.relative_error:.4f}")
        lines.append(f"{r.name:44} " + " ".join(f"{c:>{max(9, len(h))}}" for c, h in zip(cells, heads, strict=True)))
    return "\n".join(lines)


def save(
    name: str, title: str, rows: Sequence[Row], baselines: Sequence[str], folder: Path = RESULTS, **fields: Any
) -> None:
    """Prints the table, writes ``NAME.json`` into the folder and a bar plot beside it."""
    set_ratios(rows, baselines)
    result = {**where(), "title": title, "baselines": list(baselines), **fields, "rows": [asdict(r) for r in rows]}
    print(f"\n{title}; {result['cpu']}, {result['threads']} threads\n{table(rows, baselines)}")
    path = write(name, result, folder)
    bars(path.with_suffix(".png"), title, rows)
    print("written to", path, flush=True)


# -------------------------------------------------------------------------------------------- plots

INK, PAPER, GRID, PEER, OURS = "#1a1a1a", "#ffffff", "#d9d9d9", "#9aa7b5", "#d1495b"
COLOURS = ("#5b6b7b", "#e08e45", "#4f8fba", "#d1495b", "#7a9e5f", "#8e6bb0")
SCALE = 2  # pixels of a plot per unit of its layout


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, Any]:
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    return image, ImageDraw.Draw(image), ImageFont.load_default(size=12 * SCALE)


def bars(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Medians as horizontal bars, with the interquartile range; ditq's own stand out."""
    done = [r for r in rows if r.ms_median]
    if not done:
        return
    left, right, top, step, width = 330, 90, 40, 26, 900
    image, draw, font = _canvas(width, top + step * len(rows) + 12)
    draw.text((12 * SCALE, 10 * SCALE), f"{title}: ms, less is better", INK, font)
    unit = (width - left - right) / max(r.ms_median + (r.spread or 0) / 2 for r in done)
    for i, r in enumerate(rows):
        y = top + step * i
        draw.text(((left - 8) * SCALE, (y + 9) * SCALE), r.name, INK, font, anchor="rm")
        if r.ms_median is None:
            draw.text((left * SCALE, (y + 9) * SCALE), r.status[:70], GRID, font, anchor="lm")
            continue
        x = left + r.ms_median * unit
        colour = OURS if r.name.startswith("ditq") else PEER
        draw.rectangle([left * SCALE, y * SCALE, x * SCALE, (y + 18) * SCALE], colour)
        half = (r.spread or 0) / 2 * unit
        draw.line([(x - half) * SCALE, (y + 9) * SCALE, (x + half) * SCALE, (y + 9) * SCALE], INK, SCALE)
        draw.text(((x + half + 6) * SCALE, (y + 9) * SCALE), f"{r.ms_median:.4g}", INK, font, anchor="lm")
    image.save(path)


def lines(path: Path, title: str, axes: tuple[str, str], series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Lines through points on two logarithmic axes; equal steps of both, so that y = x has 45 degrees."""
    import math

    points = [point for values in series.values() for point in values]
    low = [min(p[i] for p in points) for i in (0, 1)]
    high = [max(p[i] for p in points) for i in (0, 1)]
    spans = [math.log2(high[i] / low[i]) for i in (0, 1)]
    unit = 560 / max(*spans, 1.0)  # layout units per factor of two
    left, top = 70, 40
    width, height = left + int(spans[0] * unit) + 250, top + int(spans[1] * unit) + 50
    image, draw, font = _canvas(width, height)
    draw.text((12 * SCALE, 10 * SCALE), title, INK, font)

    def at(x: float, y: float) -> tuple[float, float]:
        right, up = math.log2(x / low[0]) * unit, math.log2(y / low[1]) * unit
        return (left + right) * SCALE, (height - 50 - up) * SCALE

    for i, name in enumerate(axes):
        for k in range(math.ceil(math.log2(low[i])), math.floor(math.log2(high[i])) + 1):
            value = 2**k
            start, end = (at(low[0], value), at(high[0], value)) if i else (at(value, low[1]), at(value, high[1]))
            draw.line([start, end], GRID, SCALE)
            aside = (start[0] - 6 * SCALE, start[1]) if i else (start[0], start[1] + 6 * SCALE)
            draw.text(aside, f"{value:.4g}", INK, font, anchor="rm" if i else "ma")
        place = (12 * SCALE, 24 * SCALE) if i else ((left + spans[0] * unit / 2) * SCALE, (height - 20) * SCALE)
        draw.text(place, name, INK, font)
    for n, (name, values) in enumerate(series.items()):
        colour = COLOURS[n % len(COLOURS)]
        placed = [at(*point) for point in sorted(values)]
        draw.line(placed, colour, 2 * SCALE)
        for x, y in placed:
            draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], colour)
        draw.text(((left + spans[0] * unit + 20) * SCALE, (top + 20 * n) * SCALE), name, colour, font)
    image.save(path)
