"""The metrics table: order, what is left out, and who may be called best."""

import made_up
import pytest

from ditq.metrics.score import Interval, PairDifference, Verdict
from ditq.report.document import Report
from ditq.report.rows import measurably_best, rows


def pair(a: str, b: str, verdict: Verdict) -> PairDifference:
    difference = Interval(mean=1, ci95=(0.5, 1.5), n=9)
    return PairDifference(metric="psnr_db", a=a, b=b, difference=difference, verdict=verdict)


def three(*differences: PairDifference) -> Report:
    report = made_up.report()
    a, b = report.models
    return report.model_copy(
        update={
            "models": [a.model_copy(update={"name": name}) for name in "abc"],
            "differences": list(differences),
        }
    )


@pytest.mark.parametrize(
    ("differences", "best"),
    [
        ([pair("a", "b", "better"), pair("a", "c", "better"), pair("b", "c", "same")], "a"),
        ([pair("a", "b", "worse"), pair("a", "c", "same"), pair("b", "c", "better")], "b"),
        ([pair("a", "b", "better"), pair("a", "c", "same"), pair("b", "c", "same")], None),
        ([pair("a", "b", "better"), pair("b", "c", "better")], None),  # a and c were never compared
        ([], None),
    ],
)
def test_best_is_measurably_better_than_every_other_model(differences: list[PairDifference], best: str | None) -> None:
    assert measurably_best(three(*differences), "psnr_db") == best


def test_one_model_is_not_the_best_of_one() -> None:
    report = made_up.report()
    alone = report.model_copy(update={"models": report.models[:1], "differences": []})
    assert measurably_best(alone, "psnr_db") is None


def test_rows_go_by_family_and_leave_out_what_nobody_has() -> None:
    report = made_up.report("video")
    report.metrics.reverse()
    for model in report.models:
        del model.metrics["fid"]
    del report.models[0].metrics["kid"]
    found = rows(report)
    families = [row.info.family for members in found.values() for row in members]
    assert list(dict.fromkeys(families)) == ["fidelity", "alignment", "distribution", "temporal"]
    by_name = {row.info.name: row for members in found.values() for row in members}
    assert "fid" not in by_name
    assert by_name["kid"].scores[0] is None
    assert by_name["kid"].reference.mean == 0.0131
    assert by_name["psnr_db"].reference is None
    assert by_name["psnr_db"].best == "viditq-w8a8"
    assert by_name["recall"].best is None


def test_differences_of_a_row_name_both_sides() -> None:
    found = {row.info.name: row for members in rows(made_up.report()).values() for row in members}
    assert [(name, verdict) for name, _, verdict in found["recall"].differences] == [
        ("viditq-w8a8 minus 16 bit", "same"),
        ("viditq-w4a8 minus 16 bit", "same"),
        ("viditq-w8a8 minus viditq-w4a8", "same"),
    ]
    assert [name for name, *_ in found["psnr_db"].differences] == ["viditq-w8a8 minus viditq-w4a8"]


def test_a_quantized_reference_is_called_by_its_bits() -> None:
    report = made_up.report()
    report.reference.nominal_bits = {"weights": 8, "activations": 8}
    found = rows(report)
    assert "Fidelity to the W8A8 model, same prompt and seed" in found
    assert "Fidelity to the 16-bit model, same prompt and seed" in rows(made_up.report())
    recall = next(row for members in found.values() for row in members if row.info.name == "recall")
    assert recall.differences[0][0] == "viditq-w8a8 minus W8A8"


def test_differences_without_an_interval_crown_nobody() -> None:
    report = made_up.without_intervals(made_up.report())
    assert all(row.best is None for members in rows(report).values() for row in members)
    psnr = next(row for members in rows(report).values() for row in members if row.info.name == "psnr_db")
    assert [verdict for *_, verdict in psnr.differences] == [None]
