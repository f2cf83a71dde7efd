"""Rival allocations: even spreading, thresholds, gradient scores against finite differences, the scan of k."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import example_inputs, layer_plan, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from made import bit_space, falling, made_scores
from torch import nn
from toy import toy_space

from ditq import architectures
from ditq.allocation import Choices, Space, integer_program
from ditq.allocation.rivals import (
    gradient_errors,
    interleaved_uniform,
    mixdq,
    weight_error_rule,
    weight_errors,
)
from ditq.allocation.uncertainty import errors_of
from ditq.architectures.architecture import Linear
from ditq.conversion import draft, plan_layers
from ditq.errors import UsageError
from ditq.numerics import Rotation, fake_quantize, rotate
from ditq.plan import Rotate
from ditq.recipe import load

# --------------------------------------------------------------------------------------------- uniform


def test_uniform_is_spread_evenly() -> None:
    space = bit_space(12, "weights:5", bits=(8, 4))
    assert interleaved_uniform(space) == ("w4", "w4", "w4", "w8") * 3
    assert interleaved_uniform(bit_space(4, "weights:5", bits=(8, 6, 4))) == ("w4", "w6") * 2
    assert interleaved_uniform(bit_space(4, "weights:9", bits=(8, 4))) == ("w8",) * 4
    assert interleaved_uniform(bit_space(4, "weights:6", bits=(8, 6, 4))) == ("w6",) * 4


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=12),
    st.sampled_from([6.1, 6.5, 7.3, 7.9]),
)
def test_uniform_is_legal_and_in_step_with_the_cost(sizes: list[int], bits: float) -> None:
    space = bit_space(len(sizes), f"weights:{bits}", sizes=sizes, bits=(8, 6, 4, 3))
    genome = interleaved_uniform(space)
    assert space.legal(genome)
    assert set(genome) <= {"w8", "w6"}
    used = np.cumsum([n * (choice == "w8") for n, choice in zip(sizes, genome, strict=True)])
    entitled = np.cumsum(sizes) * (bits - 6) / 2
    assert (used <= entitled + 1e-6).all()
    assert (entitled - used <= max(sizes)).all()


def test_uniform_of_several_budgets() -> None:
    layers = bit_space(8, bits=(8, 4)).layers
    rows, choices = dict.fromkeys((x.name for x in layers), 1.0), Choices(weights=(8, 4))
    loose = Space.of(layers, rows, choices=choices, budget=["weights:6", "1GB"])
    assert interleaved_uniform(loose) == ("w4", "w8") * 4
    size = loose.cost(("w4",) * 6 + ("w8",) * 2, "bytes")
    tight = Space.of(layers, rows, choices=choices, budget=["weights:6", f"{size:.0f}B"])
    assert interleaved_uniform(tight) == ("w4", "w4", "w4", "w8") * 2
    assert interleaved_uniform(toy_space((128, 256), "uniform:64")) == (64, 64)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=8), st.floats(0.4, 0.9))
def test_uniform_is_legal_where_costs_differ(tokens: list[int], share: float) -> None:
    layers = bit_space(len(tokens), "weights:7", bits=(8, 4)).layers
    rows, choices = {f"g{i}": float(n) for i, n in enumerate(tokens)}, Choices(weights=(8, 4))
    one = Space.of(layers, rows, choices=choices, budget="weights:7")
    operations = [one.cost((w,) * len(tokens), "bit_operations") for w in ("w4", "w8")]
    budget = operations[0] + share * (operations[1] - operations[0])
    space = Space.of(layers, rows, choices=choices, budget=["weights:7", budget])
    assert space.legal(interleaved_uniform(space))


# --------------------------------------------------------------------------------------- weight errors


def weight_space(budget: str = "weights:5", **choices: Any) -> tuple[Any, Any, Space]:
    model, arch = tiny_model("dit"), architectures.load("dit")
    layers = [layer for layer in draft(model, arch, load("rtn-w4a8")) if layer.weight]
    rows = dict.fromkeys((x.name for x in layers), 1.0)
    return model, arch, Space.of(layers, rows, choices=Choices(**{"weights": (16, 8, 4), **choices}), budget=budget)


def test_weight_errors_are_relative_to_the_variance() -> None:
    model, arch, space = weight_space()
    errors = weight_errors(model, arch, space)
    for gene, error in zip(space.genes, errors, strict=True):
        w = model.get_submodule(gene.name).weight.detach()
        rounded = fake_quantize(w, gene.plans["w4"][0].weight)
        assert error["w4"] == pytest.approx(float((w - rounded).square().mean() / w.var(correction=0)), rel=1e-4)
        assert error["w16"] == 0 < error["w8"] < error["w4"] / 100
    _, _, blocks = weight_space("weights:10", unit="block")
    first, *_ = weight_errors(model, arch, blocks)
    inside = [
        e["w4"] for gene, e in zip(space.genes, errors, strict=True) if gene.name.startswith(blocks.genes[0].name)
    ]
    assert min(inside) < first["w4"] < max(inside)


def test_weight_errors_see_the_rotation() -> None:
    model, arch = tiny_model("dit"), architectures.load("dit")
    with torch.no_grad():
        for linear in arch.linears(model):
            linear.module.weight[:, 0] *= 20  # an outlier, which a rotation spreads
    found = []
    for recipe in ("rtn-w4a8", "quarot-w4a8"):
        layers = [layer for layer in plan_layers(model, arch, load(recipe), None, seed=0) if layer.weight]
        space = Space.of(layers, dict.fromkeys((x.name for x in layers), 1.0), choices=Choices(weights=(8, 4)),
                         budget="weights:5")  # fmt: skip
        found.append(sum(e["w4"] for e in weight_errors(model, arch, space)))
    assert found[1] < 0.7 * found[0]


@given(st.integers(0, 9999), st.sampled_from(["weights:4.8", "weights:5.5", "weights:7.5"]))
def test_threshold_is_the_smallest_that_meets_the_budget(seed: int, budget: str) -> None:
    rng = np.random.default_rng(seed)
    space = bit_space(6, budget)
    errors = [dict(zip(("w8", "w6", "w4"), np.sort(rng.random(3)).tolist(), strict=True)) for _ in range(6)]
    genome = weight_error_rule(space, errors)
    assert space.legal(genome)
    allowed = [t for t in sorted({e for x in errors for e in x.values()}) if space.legal(_within(errors, t))]
    assert genome == _within(errors, allowed[0])


def _within(errors: list[dict[str, float]], threshold: float) -> tuple[str, ...]:
    return tuple(next((c for c in ("w4", "w6") if error[c] <= threshold), "w8") for error in errors)


def test_weight_scores_refuse_other_spaces() -> None:
    model, arch, _ = weight_space()
    with pytest.raises(UsageError, match="choose bits of weights.*not bits of activations"):
        weight_errors(model, arch, bit_space(2, "activations:5", activations=True))
    with pytest.raises(UsageError, match="not group sizes"):
        gradient_errors(model, arch, toy_space(), [{}])


# ------------------------------------------------------------------------------------- gradient errors


def test_gradient_scores_leave_the_model_as_it_was() -> None:
    model, arch, space = weight_space()
    calls = [example_inputs("dit", seed) for seed in range(2)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done: list[tuple[int, int]] = []
    errors = gradient_errors(model, arch, space, calls, probes=3, progress=lambda *n: done.append(n))
    assert done == [(1, 2), (2, 2)]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(e["w16"] == 0 < e["w8"] < e["w4"] / 30 for e in errors)
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        assert gradient_errors(model, arch, space, calls, probes=3) == errors


class TwoLinears(nn.Module):
    """y = W2 tanh(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 12, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.second(self.first(x).tanh()),)

    def linears(self, model: nn.Module) -> list[Linear]:
        """As of an architecture."""
        return [Linear(name, "ffn.up", module) for name, module in model.named_children()]


def test_gradient_scores_of_two_linears_by_hand() -> None:
    """At W1 the mean of the squared gradient is the sum over y of its squared Jacobian; at W2 it is 1."""
    model: Any = TwoLinears()
    layers = [layer_plan("first", 32, 12, rotate=Rotate(block=32, seed=3)), layer_plan("second", 12, 5)]
    space = Space.of(layers, {"first": 1.0, "second": 1.0}, choices=Choices(weights=(8, 4)), budget="weights:6")
    x = torch.randn(2, 7, 32)
    first, second = gradient_errors(model, model, space, [{"x": x}], probes=2000)

    with torch.no_grad():
        h = model.first(x).tanh()
        jacobian = model.second.weight * (1 - h.square())[..., None, :]  # [2, 7, 5, 12]
        rotation = rotate(torch.eye(32), Rotation(32, 32, 3))
        w = model.first.weight @ rotation
        change = x @ rotation @ (fake_quantize(w, layers[0].weight) - w).T
        w2 = model.second.weight
        change2 = h @ (fake_quantize(w2, layers[1].weight) - w2).T
    assert first["w4"] == pytest.approx(float((jacobian.square().sum(-2) * change.square()).sum()), rel=0.05)
    assert second["w4"] == pytest.approx(float(change2.square().sum()), rel=0.05)


def test_gradient_scores_need_calls() -> None:
    model, arch, space = weight_space()
    with pytest.raises(UsageError, match="at least one recorded call"):
        gradient_errors(model, arch, space, [])


# ----------------------------------------------------------------------------------------------- MixDQ

ROLES = ["ffn.up", "cross_attn.q", "ffn.down", "self_attn.q", "self_attn.k", "self_attn.v"]


def test_the_scan_finds_the_split_that_the_evaluation_wants() -> None:
    scores = made_scores(falling([3, 2, 1, 6, 5, 4]), roles=[[r] for r in ROLES])
    space = bit_space(ROLES, "weights:6", bits=(8, 6, 4))
    asked: list[Any] = []

    def wants(bits: float) -> Any:
        def evaluate(genome: Any) -> float:
            asked.append(genome)
            return abs(sum(int(c[1:]) for c in genome[:3]) / 3 - bits)

        return evaluate

    for bits in (4, 16 / 3, 6, 20 / 3, 8):
        asked.clear()
        found = mixdq(space, scores, wants(bits))
        assert space.legal(found.genome)
        assert sum(int(str(c)[1:]) for c in found.genome[:3]) / 3 == pytest.approx(bits)
        assert len(set(asked)) == len(asked)
    assert [k for k, _, _ in found.tried][0] == 0.5
    best = min(found.tried, key=lambda entry: entry[2])
    assert found.ratio == best[0]
    assert found.genome == best[1] == ("w8", "w8", "w8", "w4", "w4", "w4")


def test_k_splits_the_average_bits_as_in_the_paper() -> None:
    """Groups of unequal size: for every k both groups stay within B (1 + r) / (k r + 1), times k for content."""
    sizes = (40, 24, 8, 8, 16, 8)
    r, b = 72 / 32, 6.0
    space = bit_space(ROLES, "weights:6", bits=(8, 6, 5, 4), sizes=sizes)
    scores = made_scores(np.sort(np.exp(np.random.default_rng(0).standard_normal((6, 4, 9))), axis=1),
                          roles=[[role] for role in ROLES], choices=("w8", "w6", "w5", "w4"))  # fmt: skip
    found = mixdq(space, scores, lambda genome: 0.0, ratios=(0.3, 0.8, 1.3, 9.0))
    assert [k for k, _, _ in found.tried] == [0.8, 1.0, 1.3]  # the others leave a group less than 4 bits
    assert found.ratio == 1.0
    for k, genome, _ in found.tried:
        bits = [int(str(c)[1:]) for c in genome]
        quality = b * (1 + r) / (k * r + 1)
        used = [sum(x * n for x, n in zip(bits[a:z], sizes[a:z], strict=True)) / sum(sizes[a:z]) for a, z in
                ((0, 3), (3, 6))]  # fmt: skip
        assert used[0] <= k * quality + 1e-9
        assert used[1] <= quality + 1e-9
        assert used[0] > k * quality - 2.5 or min(bits[:3]) == 8
        assert space.legal(genome)


def test_one_group_is_the_plain_program() -> None:
    scores = made_scores(falling([1, 2, 3, 4]), roles=[["self_attn.q"]] * 4)
    space = bit_space(["self_attn.q"] * 4, "weights:5")
    assert mixdq(space, scores, lambda genome: 0.0).genome == integer_program(space, errors_of(space, scores))


def test_mixdq_of_bytes_counts_what_is_fixed() -> None:
    scores = made_scores(falling([3, 2, 1, 6, 5, 4]), roles=[[r] for r in ROLES])
    plain = bit_space(ROLES, "weights:6", bits=(8, 4))
    rows = dict.fromkeys((x.name for x in plain.layers), 1.0)
    size = plain.cost(("w8",) * 3 + ("w4",) * 3, "bytes")
    space = Space.of(
        plain.layers, rows, choices=Choices(weights=(8, 4)), budget=f"{size + 5000:.0f}B", other_bytes=5000
    )
    found = mixdq(space, scores, lambda genome: -sum(c == "w8" for c in genome))
    assert space.legal(found.genome)
    assert sorted(found.genome) == ["w4"] * 3 + ["w8"] * 3 or sorted(found.genome) == ["w4"] * 4 + ["w8"] * 2
