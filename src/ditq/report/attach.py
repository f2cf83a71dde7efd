"""Copies a model's card and report into its checkpoint folder, so that they travel with it."""

from __future__ import annotations

from pathlib import Path

from ditq.files import write_bytes
from ditq.report.card import MARK, card
from ditq.report.document import ModelReport, Report

FOLDER = "ditq_report"


def attach(report: Report, model: ModelReport, page: Path) -> str:
    """Writes ``README.md`` and ``ditq_report/`` into the folder of ``model``. Each file is written atomically.

    A README that ditq did not write is kept. A folder that cannot be written is not an error, because the report is
    also in the output folder.

    Returns:
        One line for the user.
    """
    folder = Path(model.path)
    if model.plan_hash is None or not (folder / "model_index.json").is_file():
        return f"{model.name}: no card, because {model.path or 'it'} is not a local checkpoint of ditq."
    readme = folder / "README.md"
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_bytes(folder / FOLDER / "report.html", page.read_bytes())
        write_bytes(folder / FOLDER / "report.json", report.model_dump_json(indent=1).encode())
        if readme.exists() and MARK not in readme.read_text("utf-8", errors="replace"):
            return f"{model.name}: {readme} was not written by ditq and was kept; the report is in {folder / FOLDER}."
        write_bytes(readme, card(report, model).encode())
    except OSError as error:
        return f"{model.name}: no card, because {folder} cannot be written ({error.strerror or error})."
    return f"{model.name}: card in {readme}, report in {folder / FOLDER}."
