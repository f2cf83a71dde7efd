"""Genes: what shares a choice, what each choice makes of a layer plan, and segments of the trajectory."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import grid, layer_plan, token_format, weight_format
from hypothesis import given
from hypothesis import strategies as st

from ditq.allocation.choices import (
    KEPT,
    Choices,
    Gene,
    Segment,
    block_of,
    segments_of,
    with_activation_bits,
    with_segments,
    with_weight_bits,
)
from ditq.errors import UsageError
from ditq.plan import ALWAYS, LayerPlan, Smooth, StepFormat

LAYERS = [
    layer_plan(f"blocks.{block}.{name}", role=role, k=64, bias=block == 0, weight=weight_format(4, "group", group=16))
    for block in range(2)
    for name, role in (("attn.to_q", "self_attn.q"), ("ff.up", "ffn.up"))
]


def valid(layer: LayerPlan) -> LayerPlan:
    """The plan validated again: ``model_copy`` does not."""
    return LayerPlan.model_validate(layer.model_dump())


# -------------------------------------------------------------------------------------------- genes


@pytest.mark.parametrize(
    ("unit", "genes"),
    [
        ("layer", {layer.name: [layer.name] for layer in LAYERS}),
        ("block", {f"blocks.{i}": [f"blocks.{i}.attn.to_q", f"blocks.{i}.ff.up"] for i in range(2)}),
        (
            "role",
            {
                "self_attn.q": ["blocks.0.attn.to_q", "blocks.1.attn.to_q"],
                "ffn.up": ["blocks.0.ff.up", "blocks.1.ff.up"],
            },
        ),
    ],
)
def test_layers_of_a_unit_share_a_choice(unit: Any, genes: dict[str, list[str]]) -> None:
    made = Choices(weights=(3, 8, 3, 16), unit=unit).genes(LAYERS)
    assert {gene.name: [layer.name for layer in gene.layers] for gene in made} == genes
    for gene in made:
        assert list(gene.plans) == ["w16", "w8", "w3"]  # the most costly first, each once
        assert gene.segment is gene.share is None
        for choice, plans in gene.plans.items():
            assert [plan.name for plan in plans] == genes[gene.name]
            assert {plan.weight_bits for plan in plans} == {int(str(choice)[1:])}


def test_bits_of_weights_keep_the_rest_of_the_plan() -> None:
    layer = LAYERS[0].model_copy(update={"smooth": Smooth(alpha=0.5)})
    new = valid(with_weight_bits(layer, 3))
    assert new.weight == layer.weight.model_copy(update={"bits": 3})
    assert new.weight.group_size == 16
    assert new.model_copy(update={"weight": layer.weight}) == layer


@pytest.mark.parametrize("bias", [True, False])
def test_weights_in_16_bit_leave_the_layer_as_it_is(bias: bool) -> None:
    layer = layer_plan("a", role="ffn.down", k=48, n=8, bias=bias, smooth=Smooth(alpha=0.5), rounding="gptq")
    kept = valid(with_weight_bits(layer, 16))
    assert (kept.weight, kept.activation, kept.smooth, kept.rounding) == (None, None, None, "nearest")
    assert (kept.name, kept.role, kept.in_features, kept.out_features, kept.bias) == ("a", "ffn.down", 48, 8, bias)
    assert kept.reason == KEPT


def test_bits_of_activations_keep_the_weights() -> None:
    genes = Choices(activations=(4, 16, 8)).genes(LAYERS)
    assert list(genes[0].plans) == ["a16", "a8", "a4"]
    for choice, (plan,) in genes[0].plans.items():
        assert plan.activation_bits == int(str(choice)[1:])
        assert valid(plan).weight == LAYERS[0].weight
    assert genes[0].plans["a16"][0].activation is None
    assert genes[0].plans["a4"][0].activation == token_format(4)


def test_group_sizes_are_the_default() -> None:
    assert Choices().of_sizes
    assert Choices(sizes=(16,)).of_sizes
    assert not Choices(weights=(4,)).of_sizes
    assert [list(gene.plans) for gene in Choices(sizes=(32, 16)).genes(LAYERS)] == [[16, 32]] * 4


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("transformer_blocks.3.attn1.to_q", "transformer_blocks.3"),
        ("transformer_blocks.12.ff.net.0.proj", "transformer_blocks.12"),
        ("model.layers.0.inner.1.linear", "model.layers.0"),
        ("proj_out", "proj_out"),
        ("proj.2", "proj.2"),
    ],
)
def test_block_of_a_name(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sizes": (16,), "weights": (4,)}, "one at a time"),
        ({"weights": (4,), "activations": (8,)}, "one at a time"),
        ({"weights": (4,), "unit": "network"}, "layer, block or role, got 'network'"),
        ({"weights": (4, 1)}, "Bits of weights must be 2 to 8, or 16 .not quantized.; got 1"),
        ({"activations": (8, 12)}, "Bits of activations must be 2 to 8, or 16 .not quantized.; got 12"),
        ({"weights": (4,), "segments": (Segment(0, 9, 1.0),)}, "pass bits of activations too"),
    ],
)
def test_choices_that_do_not_fit_together(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Choices(**fields)


def test_layers_that_cannot_be_searched_are_named() -> None:
    static = layer_plan("still", activation=grid(8, granularity="tensor"))
    with pytest.raises(UsageError, match=r"'still' has static activation scales.*activations.dynamic=true"):
        Choices(weights=(4,)).genes([static])
    with pytest.raises(UsageError, match="'timed' has separate weights for each timestep range"):
        Choices(weights=(4,)).genes([layer_plan("timed", timesteps=((0, 9),))])
    with pytest.raises(UsageError, match="'plain' has activations in 16 bit.*NAME-wXa8"):
        Choices(activations=(8,)).genes([layer_plan("plain", activation=None)])
    assert with_activation_bits(layer_plan("plain", activation=None), 16).activation is None


# ----------------------------------------------------------------------------------------- segments


def inside(segment: Segment, time: float) -> bool:
    return segment.begin <= time <= segment.end


@given(
    steps=st.lists(st.integers(0, 1000), min_size=1, max_size=30, unique=True).map(sorted),
    falls=st.booleans(),
    data=st.data(),
)
def test_every_step_is_in_the_segment_of_its_place(steps: list[int], falls: bool, data: st.DataObject) -> None:
    steps = steps[::-1] if falls else steps
    count = data.draw(st.integers(1, len(steps)))
    segments = segments_of(steps, count)
    numbers = [[i for i, segment in enumerate(segments) if inside(segment, time)] for time in steps]
    assert all(len(found) == 1 for found in numbers)
    flat = [found[0] for found in numbers]
    assert flat == sorted(flat)  # in the order of the run
    sizes = [flat.count(i) for i in range(count)]
    assert max(sizes) - min(sizes) <= 1
    assert [segment.share for segment in segments] == pytest.approx([size / len(steps) for size in sizes])
    # A plan accepts them as they are: open at both ends, and not overlapping.
    formats = tuple(
        StepFormat(begin=segment.begin, end=segment.end, activation=token_format(8 - i % 2))
        for i, segment in enumerate(segments)
    )
    layer = layer_plan(steps=formats)
    assert {layer.activation_at(time) for time in (-1e6, 1e6)} <= {token_format(8), token_format(7)}
    assert min(s.begin for s in segments) == -ALWAYS
    assert max(s.end for s in segments) == ALWAYS


def test_borders_are_half_way_between_steps() -> None:
    first, second, third = segments_of([900, 700, 500, 300, 100, 0], 3)
    assert (str(first), str(second), str(third)) == ("t > 600", "t 600-200", "t < 200")
    assert (first.share, second.share, third.share) == (1 / 3,) * 3
    assert second.end == 600
    assert 600 < first.begin < 600.001
    assert 200 < second.begin < 200.001
    assert [str(s) for s in segments_of([0, 1, 2, 3], 2)] == ["t < 1.5", "t > 1.5"]


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_run_has_as_many_segments_as_steps_at_most(count: int) -> None:
    with pytest.raises(UsageError, match=f"A run of 3 steps has 1 to 3 segments, got {count}"):
        segments_of([3, 2, 1], count)


def test_each_segment_is_a_gene_of_its_own() -> None:
    segments = segments_of([30, 20, 10, 0], 2)
    genes = Choices(activations=(8, 4), unit="block", segments=segments).genes(LAYERS)
    assert [gene.name for gene in genes] == [f"blocks.{i}, {s}" for i in range(2) for s in ("t > 15", "t < 15")]
    assert [gene.share for gene in genes] == [0.5] * 4
    assert all(list(gene.plans) == ["a8", "a4"] for gene in genes)


STEPS = [90, 60, 30, 0]
SEGMENTS = segments_of(STEPS, 4)


def joined(*bits: int) -> LayerPlan:
    layer = layer_plan()
    parts = [(Gene("g", {}, s), with_activation_bits(layer, b)) for s, b in zip(SEGMENTS, bits, strict=True)]
    return valid(with_segments(parts))


def widths(layer: LayerPlan) -> list[int]:
    grids = [layer.activation_at(time) for time in STEPS]
    return [16 if found is None else found.bits for found in grids]


@pytest.mark.parametrize(
    ("bits", "ranges"),
    [
        ((8, 4, 6, 8), 4),
        ((8, 8, 4, 4), 2),
        ((8, 4, 4, 8), 3),
        ((4, 4, 4, 8), 2),
        ((16, 16, 4, 16), 3),
        ((4, 16, 16, 16), 2),
    ],
)
def test_segments_with_equal_grids_are_joined(bits: tuple[int, ...], ranges: int) -> None:
    layer = joined(*bits)
    assert layer.steps is not None
    assert len(layer.steps) == ranges
    assert widths(layer) == list(bits)
    assert layer.activation_bits == max(bits)
    assert layer.average_activation_bits(STEPS) == sum(bits) / 4
    ends = sorted((step.begin, step.end) for step in layer.steps)
    assert (ends[0][0], ends[-1][1]) == (-ALWAYS, ALWAYS)


@pytest.mark.parametrize("bits", [4, 16])
def test_one_grid_everywhere_is_no_range(bits: int) -> None:
    layer = joined(*[bits] * 4)
    assert layer.steps is None
    assert layer == with_activation_bits(layer_plan(), bits)
