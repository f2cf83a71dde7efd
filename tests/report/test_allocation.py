"""What a search chose, as tables of 80 columns and as JSON, from made-up results."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from helpers import tiny_model

from ditq import architectures
from ditq.allocation import SearchResult
from ditq.allocation.search import Chosen
from ditq.conversion import estimate
from ditq.plan import Plan
from ditq.recipe import load
from ditq.report import allocation
from ditq.report.terminal import Terminal

NOTES = ("weights: all widths: rank correlation 0.95", "weights: 4.8 of 5 bits on average")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return estimate(tiny_model("dit"), architectures.load("dit"), load("rtn-w4a8"))


def layer(number: int, role: str, choice: str, error: float, parameters: int = 100, segment: str = "") -> Chosen:
    name = f"transformer_blocks.{number}.{'attn1.to_out.0' if role == 'self_attn.out' else 'ff.net.0.proj'}"
    return Chosen(f"{name}, {segment}" if segment else name, (role,), choice, error, 2 * error, parameters, segment)


WEIGHTS = (
    layer(0, "self_attn.out", "w4", 0.1), layer(0, "ffn.up", "w3", 0.2, 300),
    layer(1, "self_attn.out", "w8", 0.3), layer(1, "ffn.up", "w3", 0.4, 300),
    layer(2, "self_attn.out", "w4", 0.0), layer(2, "ffn.up", "w16", 0.0, 300),
)  # fmt: skip
SEGMENTS = tuple(
    layer(0, role, choice, error, parameters, segment)
    for role, parameters in (("self_attn.out", 100), ("ffn.up", 300))
    for choice, error, segment in (("a8", 0.1, "t > 500"), ("a6", 0.3, "t < 500"))
)


def made(plan: Plan, chosen: tuple[Chosen, ...], **fields: Any) -> SearchResult:
    result = SearchResult(
        plan, plan, tuple(x.choice for x in chosen), -12.5, "prediction error, dB", "error", 1e9, float("inf"), 0.1,
        (), 1, {"bytes": 1.0, "weights": 4.75, "activations": 8.0}, chosen=chosen, notes=NOTES,
    )  # fmt: skip
    return replace(result, **fields)


def printed(result: SearchResult) -> list[str]:
    file = io.StringIO()
    terminal = Terminal(file=file, width=80, force_terminal=False)
    for table in allocation.tables(result, width=80):
        terminal.print(table)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("   ") if cell.strip()]


def test_layers_are_counted_by_role(plan: Plan) -> None:
    lines = printed(made(plan, WEIGHTS))
    assert lines[0] == "weights: bits by role"
    assert cells(lines[1]) == ["role", "bits", "weights", "error", "largest error"]
    assert cells(lines[3])[:4] == ["self_attn.out", "1 x W8, 2 x W4", "25.0 %", "40.0 %"]
    assert cells(lines[5])[:4] == ["ffn.up", "1 x W16, 2 x W3", "75.0 %", "60.0 %"]
    assert cells(lines[3])[4] + lines[4].strip() == "transformer_blocks.1.attn1.to_out.0"
    assert cells(lines[5])[4] + lines[6].strip() == "transformer_blocks.1.ff.net.0.proj"
    assert max(map(len, lines)) <= 80


def test_blocks_have_a_row_each_and_nothing_to_count(plan: Plan) -> None:
    chosen = tuple(
        Chosen(f"transformer_blocks.{i}", ("self_attn.q", "ffn.up"), choice, error, 1.0, 400)
        for i, (choice, error) in enumerate([("w8", 0.25), ("w4", 0.75)])
    )
    lines = printed(made(plan, chosen))
    assert lines[0] == "weights: bits by block"
    assert [cells(line) for line in (lines[1], *lines[3:5])] == [
        ["block", "bits", "weights", "error"], ["transformer_blocks.0", "W8", "50.0 %", "25.0 %"],
        ["transformer_blocks.1", "W4", "50.0 %", "75.0 %"],
    ]  # fmt: skip


def test_activation_bits_are_listed_by_segment(plan: Plan) -> None:
    lines = printed(made(plan, SEGMENTS))
    assert lines[0] == "activations: bits by role"
    assert [cells(line) for line in (lines[1], *lines[3:9])] == [
        ["role, timesteps", "bits", "weights", "error"],
        ["self_attn.out"], ["t > 500", "A8", "25.0 %", "12.5 %"], ["t < 500", "A6", "25.0 %", "37.5 %"],
        ["ffn.up"], ["t > 500", "A8", "75.0 %", "12.5 %"], ["t < 500", "A6", "75.0 %", "37.5 %"],
    ]  # fmt: skip


def test_the_widest_table_fits_80_columns(plan: Plan) -> None:
    segments = [f"t {a}-{b}" for a, b in (("750.5", "999.25"), ("500.5", "750.25"), ("0.1234", "500.25"))]
    chosen = tuple(
        Chosen(
            f"transformer_blocks.{i}.single_transformer_blocks_with_a_long_name.to_out.0, {segment}",
            ("joint_attn.single.out_of_the_text_stream",), choice, 0.1 * i, 1.0, 100, segment,
        )
        for segment in segments
        for i, choice in enumerate(["a16", "a8", "a7", "a6", "a5", "a4"])
    )  # fmt: skip
    lines = printed(made(plan, chosen))
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    text = " ".join(" ".join(lines).split())
    for count in ("1 x A16", "1 x A8", "1 x A7", "1 x A6", "1 x A5", "1 x A4"):
        assert count in text


def test_every_transformer_has_its_tables_and_the_notes_come_once(plan: Plan) -> None:
    second = made(plan, WEIGHTS, component="transformer_2")
    result = made(plan, (*WEIGHTS, *SEGMENTS), others=(second,))
    titles = [line for line in printed(result) if ": bits by " in line]
    assert titles == [
        "transformer, weights: bits by role", "transformer, activations: bits by role",
        "transformer_2, weights: bits by role",
    ]  # fmt: skip
    lines = allocation.lines(result)
    assert lines[0].startswith("transformer: ") and lines[3].startswith("transformer_2: ")
    assert tuple(lines[6:]) == NOTES


def test_lines_compare_with_16_bit(plan: Plan) -> None:
    size, full = plan.memory()
    lines = allocation.lines(made(plan, WEIGHTS))
    size_line = f"{size / 1e6:.2f} MB, {size / full:.3f} of the 16-bit {full / 1e6:.2f} MB; strategy: error"
    assert lines[0] == size_line
    assert lines[1].startswith("4.75 bits a weight and 8.00 bits an input in the blocks; in the whole transformer ")
    assert lines[1].endswith(f"{plan.average_bits:.2f} and {plan.average_activation_bits:.2f}")
    assert lines[2] == "prediction error, dB −12.50 on the prompts of the search"
    assert tuple(lines[3:]) == NOTES


def test_choices_without_error_have_no_share(plan: Plan) -> None:
    chosen = tuple(replace(x, error=0.0, choice="w16") for x in WEIGHTS)
    assert [row.error for row in allocation.rows(chosen)] == [0.0, 0.0]
    assert [row.bits for row in allocation.rows(chosen)] == [{"w16": 3}] * 2


def test_json_has_the_same_facts(plan: Plan) -> None:
    data = allocation.allocation_json(made(plan, (*WEIGHTS, *SEGMENTS)))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    size, full = plan.memory()
    assert (data["transformer_bytes"], data["transformer_bytes_16bit"]) == (size, full)
    assert data["average_bits"] == plan.average_bits
    assert data["block_bits"] == {"weights": 4.75, "activations": 8.0}
    assert data["notes"] == list(NOTES)
    weights, activations = data["choices"]["weights"], data["choices"]["activations"]
    assert weights["by"] == "role"
    first = weights["rows"][0]
    assert first["bits"] == {"8": 1, "4": 2}
    assert (first["share_of_weights"], first["share_of_error"]) == pytest.approx((0.25, 0.4))
    assert first["largest_error"] == "transformer_blocks.1.attn1.to_out.0"
    assert weights["genes"][1] == {
        "name": "transformer_blocks.0.ff.net.0.proj", "timesteps": None, "bits": 3, "error": 0.2,
        "error_at_fewest_bits": 0.4, "parameters": 300,
    }  # fmt: skip
    assert [(row["timesteps"], row["bits"]) for row in activations["rows"][:2]] == [
        ("t > 500", {"8": 1}), ("t < 500", {"6": 1})
    ]  # fmt: skip
    assert activations["genes"][0]["name"] == "transformer_blocks.0.attn1.to_out.0"
