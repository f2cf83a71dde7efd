"""The report as one self-contained HTML file: it needs no network, no server and no other file."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ditq.errors import DitqError
from ditq.report import charts, heatmap, wording
from ditq.report.document import ModelReport, Report
from ditq.report.pictures import LOSSLESS_SIDE, Picture, pairs
from ditq.report.rows import rows
from ditq.report.video import FRAMES_PER_SECOND

QUALITY = "psnr_db"  # the vertical axis of the Pareto plot


def render(report: Report, samples: Mapping[str, Sequence[Picture]]) -> str:
    """The page as text, to be written in UTF-8.

    The page's content security policy allows data URIs and the two inline blocks that are hashed here, nothing else.

    Args:
        report: the results.
        samples: by name, for the reference and every quantized model, one entry for each prompt in the order of
            ``report.prompts``: a PIL image, or the list of a video's frames.

    Raises:
        DitqError: jinja2 is not installed.
    """
    page = template("page.html.j2")
    style, script = (asset(name) for name in ("page.css", "page.js"))
    models = [report.reference, *report.models]
    shown = pairs(samples, [model.name for model in models])
    width, height = shown[0].size
    style += f".strips img {{ aspect-ratio: {width} / {height}; }}\n"
    maps = [model.layer_errors for model in report.models if model.layer_errors]
    return page.render(
        report=report,
        models=models,
        shown=shown,
        pixels=max(width, height) <= LOSSLESS_SIDE,
        rows=rows(report),
        quality=next((info for info in report.metrics if info.name == QUALITY), None),
        tally={model.name: tally(model) for model in report.models},
        range=heatmap.shared_range(maps) if maps else None,
        data={
            "reference": wording.reference(report.reference),
            "frames_per_second": report.sampler.get("fps") or FRAMES_PER_SECOND,
            "errors": [model.layer_errors.model_dump() if model.layer_errors else None for model in models],
        },
        words=wording, charts=charts, heatmap=heatmap,
        style=style, script=script, style_hash=sha256(style), script_hash=sha256(script),
    )  # fmt: skip


def write(report: Report, samples: Mapping[str, Sequence[Picture]], folder: Path) -> None:
    """Writes ``report.html`` and ``report.json`` into an existing folder. Other arguments: see :func:`render`.

    Raises:
        DitqError: see :func:`render`.
    """
    page = render(report, samples)
    (folder / "report.json").write_text(report.model_dump_json(indent=1) + "\n", "utf-8")
    (folder / "report.html").write_text(page, "utf-8")


def check_installed() -> None:
    """Checks before the measurement that the page can be written afterwards.

    Raises:
        DitqError: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise DitqError("The report page needs jinja2, which is not installed: pip install 'ditq[report]'")


def template(name: str) -> Any:
    """A template of the folder ``page``; what it prints is escaped.

    Raises:
        DitqError: jinja2 is not installed.
    """
    check_installed()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ditq.report", "page"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


def asset(name: str) -> str:
    """The text of a file of the folder ``page``."""
    return files("ditq.report").joinpath("page", name).read_text("utf-8")


def tally(model: ModelReport) -> list[tuple[str, int]]:
    """(verdict in words, number of metrics with it) of a model's metrics that have a verdict."""
    verdicts: list[Any] = [score.verdict for score in model.metrics.values()]
    return [(words, verdicts.count(verdict)) for verdict, words in wording.VERDICTS.items() if verdict in verdicts]


def sha256(text: str) -> str:
    """The hash of an inline block, for the content security policy of its page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
