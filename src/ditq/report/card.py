"""The model card: ``README.md`` with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from ditq.metrics.score import Score
from ditq.report import wording
from ditq.report.document import MetricInfo, ModelReport, Report
from ditq.report.rows import rows

MARK = "<!-- written by ditq -->"  # marks cards that may be overwritten

USE = """import ditq  # registers the backend
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(path)  # this folder, or its name on the Hub"""


def card(report: Report, model: ModelReport) -> str:
    """The card of one quantized model of a comparison, in Markdown.

    It names no licence: that of the base model applies, which a comparison does not read.
    """
    front = yaml.safe_dump(_front_matter(report, model), sort_keys=False, allow_unicode=True, width=1000)
    bits = wording.bits(model)
    kept = Counter(str(layer.get("role")) for layer in model.layers if layer["weight_bits"] == 16)
    quantized = len(model.layers) - sum(kept.values())
    intro = f"{_code(report.reference.name)}, its transformer quantized by ditq"
    if model.recipe:
        intro += f" with the recipe {_code(model.recipe)}"
    if bits:
        intro += f" ({bits})"
    if model.transformer_bytes and report.reference.transformer_bytes:
        share = wording.number(model.transformer_bytes / report.reference.transformer_bytes, 2)
        intro += (
            f": {wording.megabytes(model.transformer_bytes)} instead of "
            f"{wording.megabytes(report.reference.transformer_bytes)} ({share})"
        )
    name_pattern = re.compile(rf"(?<![\w./-]){re.escape(model.name)}(?![\w/-])")
    about = [sentence for sentence in report.summary if name_pattern.search(sentence)]
    kept_roles = ", ".join(f"{count} {_text(role)}" for role, count in sorted(kept.items())) or "none"
    sections = [
        f"# {_text(model.name)}",
        f"{intro}.",
        "\n\n".join(_text(sentence) for sentence in about or report.summary),
        "## Measured",
        f"{_sampled(report)}, same noise for both models. Mean and 95 % bootstrap interval; the verdict is on the "
        f"paired difference to {wording.reference(report.reference)}.",
        _table(report, model),
    ]
    if report.skipped:
        sections.append("Not measured: " + "; ".join(f"{_text(s.metric)} ({_text(s.reason)})" for s in report.skipped))
    sections += [
        "## What stayed in 16 bit",
        f"{quantized} linear layers are quantized, {sum(kept.values())} are not: {kept_roles}.",
        "## Use",
        _block(USE, "python"),
        "## Reproduce",
        _block(report.command, "console"),
        _settings(report, model),
    ]  # fmt: skip
    return f"---\n{front}---\n{MARK}\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(report: Report, model: ModelReport) -> dict[str, Any]:
    infos = {info.name: info for info in report.metrics}
    return {
        "library_name": "diffusers",
        "base_model": report.reference.name,
        "base_model_relation": "quantized",
        "tags": ["ditq", "quantized", *([wording.bits(model).lower()] if wording.bits(model) else [])],
        "model-index": [
            {
                "name": model.name,
                "results": [
                    {
                        "task": {"type": f"text-to-{report.kind}"},
                        "dataset": {"type": "prompts", "name": _dataset(report)},
                        "metrics": [
                            {"type": name, "name": _metric(infos[name], score), "value": round(score.mean, 6)}
                            for name, score in model.metrics.items()
                            if name in infos
                        ],
                    }
                ],
            }
        ],
    }


def _sampled(report: Report) -> str:
    return f"{wording.counted(len(report.prompts), 'prompt')}, seeds {wording.seeds(report.seeds)}"


def _dataset(report: Report) -> str:
    real = f", real images: {report.real['name']}" if report.real else ""
    return _sampled(report) + real


def _metric(info: MetricInfo, score: Score) -> str:
    described = [text for text in (info.unit, score.network) if text]
    return f"{info.title} ({', '.join(described)})" if described else info.title


def _table(report: Report, model: ModelReport) -> str:
    base = wording.reference(report.reference)
    lines = [f"| metric | better | {base} | this model | verdict | n |", "| --- | --- | --- | --- | --- | --- |"]
    for members in rows(report).values():
        for row in members:
            score = model.metrics.get(row.info.name)
            if score is None:
                continue
            value, reference = (
                f"{wording.number(i.mean, row.places)} ({wording.interval(i, row.places)})"
                if i
                else "is the reference"
                for i in (score, row.reference)
            )
            verdict = wording.verdict(score.verdict) if score.difference else ""
            better = "higher" if row.info.higher_is_better else "lower"
            lines.append(
                f"| {_text(_metric(row.info, score))} | {better} | {reference} | {value} | {verdict} | {score.n} |"
            )
    return "\n".join(lines)


def _settings(report: Report, model: ModelReport) -> str:
    identity = {"fingerprint": model.fingerprint, "reference fingerprint": report.reference.fingerprint,
                "plan hash": model.plan_hash}  # fmt: skip
    pairs = wording.settings({**report.sampler, **report.environment, **identity})
    return "\n".join(f"- {_text(name)}: {_code(value)}" for name, value in pairs)


def _text(value: str) -> str:
    """Escapes text for Markdown: on one line, without effect as markup, HTML or the border of a cell."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    """Inline code in Markdown."""
    line = " ".join(value.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _block(value: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{fence}{language}\n{value}\n{fence}"
