"""Groups of roles, their budgets, and allocation within them by metrics that are signal or noise."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made import bit_space, falling, made_scores

from ditq import architectures
from ditq.allocation import integer_program
from ditq.allocation.choices import segments_of
from ditq.allocation.decoupled import allocate_decoupled, decoupling, greedy, group_of, part_of
from ditq.allocation.uncertainty import errors_of
from ditq.architectures.architecture import roles
from ditq.errors import UsageError

CONTENT, QUALITY, TEMPORAL = "cross_attn.q", "ffn.up", "temporal_attn.q"


def test_every_role_has_the_group_of_the_paper() -> None:
    for role in roles():
        group = group_of(role)
        assert (group == "temporal") == role.startswith("temporal_attn")
        if role.startswith(("cross_attn", "refiner", "joint_attn.txt", "ffn.txt")):
            assert group == "content"
        if role.startswith(("self_attn", "spatial_attn", "joint_attn.img", "joint_attn.single", "ffn.img", "ffn.up")):
            assert group == "quality"
    stacks = architectures.load("dit").stacks.values()
    assert {group_of(r) for groups in stacks for g in groups for r in g.linears.values()} == {"quality"}


def test_each_group_follows_its_own_metric() -> None:
    """The prediction error ranks genes one way, the metrics of the groups the other way."""
    order = [CONTENT] * 4 + [QUALITY] * 4
    prediction = falling([1, 2, 4, 8] * 2, 24)
    up, flat = falling([8, 4, 2, 1] * 2, 24, seed=1), falling([1] * 8, 24, seed=2)
    score = np.where(np.arange(8)[:, None, None] < 4, up, flat)
    scores = made_scores(prediction, {"clip": score, "quality": flat * 0 + score[::-1]}, roles=[[r] for r in order])
    space = bit_space(order, "weights:6", bits=(8, 4))
    for within in ("greedy", "program"):
        found = allocate_decoupled(space, scores, metrics={"content": "clip", "quality": "quality"}, within=within)
        assert found.genome[:4] == ("w8", "w8", "w4", "w4")
        assert found.genome[4:] == ("w4", "w4", "w8", "w8")
        assert found.budgets == {"content": 6.0, "quality": 6.0}
        assert found.notes == ()
    plain = allocate_decoupled(space, scores, metrics={})
    assert plain.genome == integer_program(space, errors_of(space, scores)) == ("w4", "w4", "w8", "w8") * 2


def test_budgets_are_split_by_the_prediction_error() -> None:
    order = [CONTENT] * 3 + [QUALITY] * 3 + [TEMPORAL] * 3
    scores = made_scores(falling([10, 11, 12, 1, 1.1, 1.2, 5, 0.1, 0.1]), roles=[[r] for r in order])
    found = allocate_decoupled(bit_space(order, f"weights:{52 / 9}", bits=(8, 4)), scores, metrics={})
    assert found.budgets == pytest.approx({"content": 8, "quality": 4, "temporal": 16 / 3})


@pytest.mark.parametrize("within", ["greedy", "program"])
def test_noise_is_not_followed(within: str) -> None:
    noise = np.exp(np.random.default_rng(0).standard_normal((8, 3, 16)))
    scores = made_scores(falling([1, 2, 3, 4, 5, 6, 7, 8]), {"quality": noise})
    space = bit_space(8, "weights:6", bits=(8, 4))
    found = allocate_decoupled(space, scores, metrics={"quality": "quality"}, within=within)  # type: ignore[arg-type]
    assert found.genome == ("w4",) * 4 + ("w8",) * 4
    (note,) = found.notes
    assert note.startswith("quality: error instead of own, which does not rank its genes (all widths: rank corr")


def test_a_group_of_one_gene_has_nothing_to_rank() -> None:
    order = [CONTENT, QUALITY, QUALITY]
    harms = falling([3, 2, 1], 3)
    scores = made_scores(harms, {"clip": harms}, roles=[[r] for r in order])
    assert allocate_decoupled(bit_space(order, "weights:6"), scores, metrics={"content": "clip"}).notes == ()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("within", ["greedy", "program"])
def test_budgets_hold(seed: int, within: str) -> None:
    order = Random(seed).choices([CONTENT, QUALITY, TEMPORAL], k=4 + seed % 6)
    budget = f"weights:{(5.5, 6.3, 7.8)[seed % 3]}"
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, len(order)) * 8
    harms = np.sort(np.exp(rng.standard_normal((len(order), 3, 5))), axis=1)
    scores = made_scores(harms, {"m": harms[::-1]}, roles=[[r] for r in order])
    space = bit_space(order, budget, sizes=[int(n) for n in sizes])
    found = allocate_decoupled(space, scores, metrics=dict.fromkeys(("content", "quality", "temporal"), "m"),
                               within=within)  # type: ignore[arg-type]  # fmt: skip
    assert space.legal(found.genome)
    for group, bits in found.budgets.items():
        numbers = [i for i, role in enumerate(order) if group_of(role) == group]
        used = sum(_bits(found.genome)[i] * sizes[i] for i in numbers) / sum(sizes[i] for i in numbers)
        assert used <= bits * (1 + 1e-9)


@given(st.integers(0, 999))
def test_greedy_and_program_agree_on_equal_genes_with_two_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    space = bit_space(6, "weights:5.9", bits=(8, 4))  # 2.85 promotions
    errors = [{"w8": float(e[0]), "w4": float(e[0] + e[1])} for e in rng.random((6, 2))]
    best = np.argsort([e["w8"] - e["w4"] for e in errors])[:2]
    assert greedy(space, errors) == tuple("w8" if i in best else "w4" for i in range(6))
    assert greedy(space, errors, per_cost=True) == greedy(space, errors) == integer_program(space, errors)


def test_greedy_prefers_large_genes_unless_it_counts_the_cost() -> None:
    space = bit_space(3, "weights:6.4", bits=(8, 4), sizes=(24, 8, 8))  # 24 of 40 outputs may be promoted
    errors = [{"w8": 0.0, "w4": e} for e in (5.0, 4.0, 4.0)]
    assert greedy(space, errors) == ("w8", "w4", "w4")
    assert greedy(space, errors, per_cost=True) == ("w4", "w8", "w8")


def test_greedy_climbs_over_equal_choices() -> None:
    space = bit_space(2, "weights:6", bits=(8, 6, 4))
    errors = [{"w8": 0.0, "w6": 3.0, "w4": 3.0}, {"w8": 0.5, "w6": 0.5, "w4": 0.5}]
    assert greedy(space, errors) == ("w8", "w4")


def test_a_part_of_a_space_keeps_costs_and_drops_limits_that_it_has_not() -> None:
    space = bit_space(4, "activations:6", bits=(8, 4), activations=True, segments=segments_of((900.0, 100.0), 2))
    part = part_of(space, [1, 2], {"activations": 5.0, "bytes": 3.0})
    assert [gene.name for gene in part.genes] == [space.genes[1].name, space.genes[2].name]
    assert part.limits == {"activations": 5.0}  # segments have no bytes
    assert part.cost(("a8", "a4")) == space.cost(space.random(Random(0))[:0] + ("a8", "a8", "a4") + ("a4",) * 5) - (
        space.costs[0]["a8"]["activations"] + sum(c["a4"]["activations"] for c in space.costs[3:])
    )


def test_segments_are_allocated_by_prediction() -> None:
    times = (900.0, 100.0)
    prediction = np.array([[9.0, 1.0], [1.0, 2.0]])[:, None, :, None] * np.array([0.1, 1.0])[:, None, None]
    scores = made_scores(prediction * np.ones((1, 1, 1, 6)), {"m": np.ones((2, 2, 6))}, roles=[[CONTENT], [QUALITY]],
                         choices=("a8", "a4"), times=times)  # fmt: skip
    space = bit_space([CONTENT, QUALITY], "activations:6", bits=(8, 4), activations=True,
                      segments=segments_of(times, 2))  # fmt: skip
    found = allocate_decoupled(space, scores, metrics={})
    assert found.genome == ("a8", "a4", "a4", "a8")
    assert found.budgets == {"content": 6.0, "quality": 6.0}
    with pytest.raises(UsageError, match="Only errors are known by timestep"):
        allocate_decoupled(space, scores, metrics={"content": "m"})


def test_mistakes_are_named() -> None:
    scores, space = made_scores(falling([1, 2]), roles=[[QUALITY], [QUALITY]]), bit_space(2)
    with pytest.raises(UsageError, match="Unknown group of roles 'contents'. Did you mean 'content'"):
        allocate_decoupled(space, scores, metrics={"contents": "prediction"})
    with pytest.raises(UsageError, match="Unknown metric of these scores 'clip'"):
        allocate_decoupled(space, scores, metrics={"content": "clip"})
    with pytest.raises(UsageError, match="Unknown allocation within a group 'best'"):
        allocate_decoupled(space, scores, metrics={}, within="best")  # type: ignore[arg-type]
    mixed = made_scores(falling([1, 2]), roles=[[QUALITY], [QUALITY, CONTENT]])
    with pytest.raises(UsageError, match="'g1' has layers of the groups content, quality.*unit layer or role"):
        decoupling(mixed, "w4")


def test_the_table_of_groups() -> None:
    """Each metric falls with one group; sums over genes, standard errors over prompts, loads by hand."""
    order = [CONTENT, CONTENT, QUALITY, TEMPORAL]
    rng = np.random.default_rng(0)
    clip = np.array([0.3, 0.1, 0.0, 0.0])[:, None, None] + 0.02 * rng.standard_normal((4, 3, 50))
    flow = np.array([0.0, 0.0, 0.0, 0.2])[:, None, None] + 0.02 * rng.standard_normal((4, 3, 50))
    scores = made_scores(falling([1] * 4, 50), {"clip": clip, "flow": flow}, roles=[[r] for r in order])
    table = decoupling(scores, "w4")
    assert (table.groups, table.metrics) == (("content", "quality", "temporal"), ("clip", "flow"))
    np.testing.assert_allclose(table.drops, [[0.4, 0], [0, 0], [0, 0.2]], atol=0.015)
    np.testing.assert_allclose(table.drops[0, 0], (clip[0, 2] + clip[1, 2]).mean())
    one = 0.02 / 50**0.5
    np.testing.assert_allclose(table.errors, one * np.array([[2**0.5] * 2, [1, 1], [1, 1]]), rtol=0.3)
    # z = (2, -1, -1) / sqrt(2) and (-1, -1, 2) / sqrt(2)
    high = 1 / (1 + np.exp(-3 / 2**0.5))
    np.testing.assert_allclose(table.loads, [[high, 1 - high], [0.5, 0.5], [1 - high, high]], atol=0.05)
    assert 0 < table.load_errors.max() < 0.1
    np.testing.assert_allclose(table.loads.sum(1), 1)
    more = np.array([0.5, 0.5, 1, 1])[:, None, None]
    shifted = made_scores(falling([1] * 4, 50), {"clip": clip, "flow": flow + more}, roles=[[r] for r in order])
    np.testing.assert_allclose(decoupling(shifted, "w4").loads, table.loads)  # what all groups lose is no load
    assert decoupling(scores, "w8", ["prediction"]).metrics == ("prediction",)
    with pytest.raises(UsageError, match="Unknown width of these scores 'w5'"):
        decoupling(scores, "w5")


def _bits(genome: tuple[int | str, ...]) -> list[int]:
    return [int(str(choice)[1:]) for choice in genome]
