"""The comparison in sentences: quality, memory and speed. A difference is only claimed where it is measurable."""

from __future__ import annotations

from ditq.metrics.interval import Interval
from ditq.report.document import MetricInfo, ModelReport, Report
from ditq.report.wording import NO_VERDICT, counted


def summary(report: Report) -> list[str]:
    """One sentence over all models, then one for each."""
    n = len(report.prompts)
    prompts, kind = counted(n, "prompt"), "videos" if report.kind == "video" else "images"
    ranked = sorted((m for m in report.models if "psnr_db" in m.metrics), key=lambda m: -m.metrics["psnr_db"].mean)
    if not ranked:
        return [f"{counted(len(report.models), 'model')} against {report.reference.name} on {prompts}."]
    best = ranked[0]
    first = f"{best.name} {_closeness(best)} the {kind} of {report.reference.name} ({_mean(best)}, {prompts})"
    if best.transformer_bytes:
        first += f" with {_share(best, report)} of its transformer's memory"
    if len(ranked) > 1:
        smallest = min(ranked, key=lambda m: m.transformer_bytes)
        equal = next(
            (d for d in report.differences if d.metric == "psnr_db" and {d.a, d.b} == {best.name, ranked[1].name}),
            None,
        )
        if equal is not None and equal.verdict == "same":
            first += f"; {ranked[1].name} is not measurably further away"
        elif smallest is not best and smallest.transformer_bytes < best.transformer_bytes:
            first += f"; {smallest.name} is the smallest ({_share(smallest, report)}, {_mean(smallest)})"
    return [first + ".", *(_one(model, report) for model in report.models)]


def _one(model: ModelReport, report: Report) -> str:
    measured = [(info, model.metrics[info.name]) for info in report.metrics if info.name in model.metrics]
    judged = [(info, score) for info, score in measured if score.verdict is not None]
    words = [_db(model)]
    for verdict, phrase in (("worse", "measurably worse in"), ("better", "measurably better in")):
        names = [
            f"{info.title} ({_gap(info, score.difference)})" for info, score in judged if score.verdict == verdict
        ]
        if names:
            words.append(f"{phrase} {', '.join(names)}")
    same = [info.title for info, score in judged if score.verdict == "same"]
    if same:
        words.append(f"no measurable difference in {', '.join(same)}")
    if any(score.difference and score.verdict is None for _, score in measured):
        words.append(NO_VERDICT)
    if model.step_time is not None:
        ratio = model.step_time.ratio_to_reference
        speed = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        words.append(f"a transformer call {speed} here")
    bits = f" ({model.average_bits:.1f} bits per weight on average)" if model.average_bits else ""
    return f"{model.name}{bits}: {'; '.join(words)}."


def _closeness(model: ModelReport) -> str:
    """A phrase for the PSNR: above 40 dB images are hard to tell apart, below 20 dB they clearly differ."""
    db = model.metrics["psnr_db"].mean
    if db >= 40:
        return "almost exactly reproduces"
    return "closely reproduces" if db >= 25 else "roughly reproduces" if db >= 18 else "does not reproduce"


def _mean(model: ModelReport) -> str:
    return f"PSNR {model.metrics['psnr_db'].mean:.1f} dB"


def _db(model: ModelReport) -> str:
    score = model.metrics["psnr_db"]
    interval = f" [{score.ci95[0]:.1f}, {score.ci95[1]:.1f}]" if score.ci95 else ""
    return f"PSNR {score.mean:.1f} dB{interval}"


def _share(model: ModelReport, report: Report) -> str:
    return f"{model.transformer_bytes / report.reference.transformer_bytes:.2f}"


def _gap(info: MetricInfo, difference: Interval | None) -> str:
    assert difference is not None and difference.ci95 is not None  # both exist wherever there is a verdict
    unit = f" {info.unit}" if info.unit else ""
    return f"{difference.mean:+.3g}{unit} [{difference.ci95[0]:+.3g}, {difference.ci95[1]:+.3g}]"
