"""ViDiT-Q on a video transformer: a scale for each token of spatial, temporal and cross attention; balance by role."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import run, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import architectures
from ditq.calibration import Statistics
from ditq.conversion import plan_layers
from ditq.conversion.scales import group_scale
from ditq.layers import QuantizedLinear
from ditq.numerics import sqnr_db
from ditq.recipe import load as load_recipe

LATTE = architectures.load("latte")
TIMESTEPS = (950, 600, 250, 10)
# Of the example inputs: two videos of 3 frames of 4 x 4 patches, with 6 text tokens.
B, F, S, L, C = 2, 3, 16, 6, 128
SPATIAL, TEMPORAL = "transformer_blocks.1", "temporal_transformer_blocks.1"
LAYOUTS = {
    f"{SPATIAL}.attn1.to_q": ("spatial_attn.q", (B * F, S, C)),
    f"{SPATIAL}.attn1.to_out.0": ("spatial_attn.out", (B * F, S, C)),
    f"{SPATIAL}.attn2.to_q": ("cross_attn.q", (B * F, S, C)),
    f"{SPATIAL}.attn2.to_k": ("cross_attn.k", (B * F, L, C)),
    f"{SPATIAL}.attn2.to_v": ("cross_attn.v", (B * F, L, C)),
    f"{SPATIAL}.ff.net.2": ("ffn.down", (B * F, S, 4 * C)),
    f"{TEMPORAL}.attn1.to_k": ("temporal_attn.k", (B * S, F, C)),
    f"{TEMPORAL}.attn1.to_out.0": ("temporal_attn.out", (B * S, F, C)),
    f"{TEMPORAL}.ff.net.0.proj": ("ffn.up", (B * S, F, C)),
}


@contextmanager
def inputs(model: nn.Module, names: Any) -> Iterator[dict[str, Tensor]]:
    """What layers of these names are called with."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: seen.__setitem__(name, args[0].detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    yield seen
    for handle in handles:
        handle.remove()


def quantized(recipe: str, model: nn.Module | None = None) -> nn.Module:
    model = model or tiny_model("latte")
    return ditq.quantize(model, recipe, statistics=tiny_statistics(model, "latte", TIMESTEPS)).model


@pytest.mark.parametrize("recipe", ["viditq-w8a8", "viditq-w6a6", "viditq-w4a8"])
def test_every_token_of_every_attention_has_a_scale_of_its_own(recipe: str) -> None:
    """A token 50 times as large changes no other one, and is as precise as before: nothing is shared between rows."""
    model = quantized(recipe)
    roles = {linear.name: linear.role for linear in LATTE.linears(tiny_model("latte"))}
    with inputs(model, LAYOUTS) as seen:
        run(model, "latte")
    for name, (role, shape) in LAYOUTS.items():
        layer, x = model.get_submodule(name), seen[name]
        assert isinstance(layer, QuantizedLinear)
        assert roles[name] == role
        assert x.shape == shape, name
        louder = x.clone()
        louder[1, 2] *= 50
        bias = 0 if layer.bias is None else layer.bias
        before, after = layer(x) - bias, layer(louder) - bias
        others = torch.ones(shape[:2], dtype=torch.bool)
        others[1, 2] = False
        assert torch.equal(after[others], before[others]), name
        assert sqnr_db(50 * before[1, 2], after[1, 2]) > 80, name


def test_static_scales_are_shared_and_fail_that_test() -> None:
    model = quantized("rtn-static-w8a8")
    with inputs(model, LAYOUTS) as seen:
        run(model, "latte")
    for name in LAYOUTS:
        layer, louder = model.get_submodule(name), seen[name].clone()
        louder[1, 2] *= 50
        bias = 0 if layer.bias is None else layer.bias
        assert sqnr_db(50 * (layer(seen[name]) - bias)[1, 2], (layer(louder) - bias)[1, 2]) < 20, name


def test_widths_are_ordered_and_every_role_of_the_papers_is_quantized() -> None:
    exact = run(tiny_model("latte"), "latte", seed=9)
    error = {}
    for width in ("w8a8", "w6a6", "w4a8"):
        model = quantized(f"viditq-{width}")
        error[width] = sqnr_db(exact, run(model, "latte", seed=9))
        found = {m.plan.role.split(".")[0] for m in model.modules() if isinstance(m, QuantizedLinear)}
        assert found == {"spatial_attn", "temporal_attn", "cross_attn", "ffn"}
    assert error["w8a8"] > error["w6a6"] + 6 > error["w4a8"] + 9
    assert error["w4a8"] > 12
    for width, sqnr in error.items():
        static = run(quantized(f"rtn-static-{width}"), "latte", seed=9)
        assert sqnr > sqnr_db(exact, static)


@torch.no_grad()
def planted(blocks: str) -> tuple[nn.Module, Tensor]:
    """A tiny Latte in which adaLN makes six channels of one kind of blocks far larger than the others."""
    model = tiny_model("latte")
    channels = torch.randperm(C, generator=torch.Generator().manual_seed(3))[:6]
    for block in model.get_submodule(blocks).children():
        block.scale_shift_table[1, channels] = 25.0
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            linear.weight[:, channels] *= 0.1
    return model, channels


@pytest.mark.parametrize("blocks", ["temporal_transformer_blocks", "transformer_blocks"])
def test_spatial_and_temporal_attention_are_balanced_apart(blocks: str) -> None:
    """Imbalance in one kind of blocks is scaled out there; the other kind, of the same width, keeps its own scales."""
    model, channels = planted(blocks)
    statistics: Statistics = tiny_statistics(model, "latte", TIMESTEPS)
    plans = {plan.name: plan for plan in plan_layers(model, LATTE, load_recipe("viditq-w4a8"), statistics)}
    groups = [g for g in LATTE.groups(model) if g.linears[0].role in ("spatial_attn.q", "temporal_attn.q")]
    assert len(groups) == 4
    for group in groups:
        (smooth,) = {plans[linear.name].smooth for linear in group.linears}  # they read one tensor
        scale = torch.ones(C)
        if smooth is not None:
            scale = group_scale(smooth, group, statistics.groups[group.name], statistics.timesteps)
        ratio = scale[channels].median() / scale.median()
        assert (ratio > 5) if group.name.startswith(f"{blocks}.") else (0.5 < ratio < 2), group.name


def test_planted_imbalance_costs_rtn_more_than_viditq() -> None:
    blocks = "temporal_transformer_blocks"
    exact = run(planted(blocks)[0], "latte", seed=9)
    sqnr = {
        recipe: sqnr_db(exact, run(quantized(recipe, planted(blocks)[0]), "latte", seed=9))
        for recipe in ("rtn-w4a8", "viditq-w4a8")
    }
    assert sqnr["viditq-w4a8"] > sqnr["rtn-w4a8"] + 3


def test_text_tokens_are_those_of_the_prompt_repeated_for_each_frame() -> None:
    """Rows of one prompt token are equal in all frames, so they get one scale whatever the frame."""
    model = quantized("viditq-w8a8")
    name = f"{SPATIAL}.attn2.to_k"
    with inputs(model, [name]) as seen:
        run(model, "latte")
    text = seen[name].unflatten(0, (B, F))
    assert torch.equal(text, text[:, :1].expand_as(text))
    outputs = model.get_submodule(name)(seen[name]).unflatten(0, (B, F))
    assert torch.equal(outputs, outputs[:, :1].expand_as(outputs))
