"""The table of layers at the width of a terminal."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ditq.plan import Incoherence, LayerPlan, Plan, Rotate, Smooth, TensorFormat
from ditq.report.grouping import By
from ditq.report.tables import folded, plan_table, plan_text
from ditq.report.terminal import Terminal

W4 = TensorFormat(bits=4, symmetric=False, granularity="group", group_size=128)
A8 = TensorFormat(bits=8, symmetric=False, granularity="group", group_size=128, dynamic=True)
NAMES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
UNLIKELY = "rounded to nearest: GPTQ did not lower the output error on the calibration inputs"


def plan(blocks: int = 28, recipe: str = "qdit-w4a8", **fields: Any) -> Plan:
    """A transformer with the widest formats and long names; ``fields`` are those of the layers in blocks."""
    sides: dict[str, Any] = {"in_features": 128, "out_features": 128}
    layers = [
        LayerPlan(
            name=f"single_transformer_blocks.{i}.{name}", role="ffn.up", weight=W4, activation=A8, **sides, **fields
        )
        for i in range(blocks)
        for name in NAMES
    ]
    layers.append(
        LayerPlan(name="context_embedder.time_text_embed.timestep_embedder.linear_1", role="modulation", **sides,
                  reason="role modulation is kept in 16 bit")
    )  # fmt: skip
    return Plan(method="Q-DiT", recipe=recipe, architecture="x", nominal_weight_bits=4, nominal_activation_bits=8,
                layers=tuple(layers))  # fmt: skip


def change(before: Plan, index: int, **fields: Any) -> Plan:
    layers = list(before.layers)
    layers[index] = layers[index].model_copy(update=fields)
    return before.model_copy(update={"layers": tuple(layers)})


def words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def test_a_deep_transformer_is_a_table_of_one_screen() -> None:
    text = plan_text(plan())
    lines = text.splitlines()
    assert len(lines) < 24
    assert "single_transformer_" in words(text)
    assert "blocks.0-27" in words(text)
    for name in NAMES:
        assert len([line for line in lines if words(line)[:1] == [name]]) == 1


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("by", ["blocks", "layers", "roles"])
def test_no_line_is_too_long_and_no_word_is_broken(by: By, width: int) -> None:
    mu = Incoherence(weight_before=12.3, weight_after=4.5, input_before=30.1, input_after=3.9)
    shown = plan(smooth=Smooth(alpha=0.35, folded="norm"), rotate=Rotate(block=128), rounding="gptq", incoherence=mu)
    terminal = Terminal(width=width, record=True)
    with terminal.capture() as capture:
        terminal.print(plan_table(shown, by=by, width=width))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    expected = {"smooth", "0.35", "(norm)", "hadamard", "group", "asym", "dyn", "16", "bit", "modulation"}
    expected |= {"12.3->4.5", "30.1->3.9"} if by == "layers" else set()
    assert expected <= set(words(text.replace(",", " ")))
    assert "…" not in text
    text.encode("ascii")


def test_alphas_that_differ_are_a_range() -> None:
    shown = plan(blocks=3, smooth=Smooth(alpha=0.1))
    for i, alpha in ((len(NAMES), 0.6), (2 * len(NAMES), 0.2)):
        shown = change(shown, i, smooth=Smooth(alpha=alpha))
    text = plan_text(shown, width=120)
    assert "smooth 0.1-0.6" in text
    assert text.count("smooth 0.1") == len(NAMES)  # the range, and the other layers


def test_blocks_that_differ_are_named() -> None:
    shown = change(plan(blocks=9), 4 * len(NAMES), weight=TensorFormat(bits=8, granularity="channel"))
    text = plan_text(shown, width=120)
    assert "attn1.to_q in 0-3, 5-8" in text
    line = next(line for line in text.splitlines() if "W8" in line)
    assert words(line) == ["in", "4", "W8", "channel", "A8", "group", "128", "asym", "dyn"]


def test_a_long_reason_stands_once_below_the_table() -> None:
    text = plan_text(change(plan(), 0, reason=UNLIKELY))
    assert " ".join(words(text)).count(UNLIKELY) == 1
    assert len(re.findall(r"\(1\)", text)) == 2


def test_hostile_names_are_printed_as_they_are() -> None:
    reason = "keep_layers: [/0]\x1b[2J"
    shown = change(plan(recipe="w[red]"), -1, name="[/]x[bold]", reason=reason)
    text = plan_text(shown, engine="[torch]")
    assert "w[red] on x" in text
    assert "[/]x[bold]" in text
    assert r"keep_layers: [/0]\x1b[2J" in text
    assert "engine: [torch]" in text
    assert "\x1b" not in text


def test_folded_breaks_at_dots_and_underscores_only() -> None:
    assert folded("a.b", 20) == "a.b"
    assert folded("first.second.third", 13).splitlines() == ["first.second.", " third"]
    assert folded("x" * 30, 20) == "x" * 30
    assert folded("single_transformer_blocks.0-39", 20).splitlines() == ["single_transformer_", " blocks.0-39"]
    assert folded("blocks.0-3, 5", 20) == "blocks.0-3, 5"
