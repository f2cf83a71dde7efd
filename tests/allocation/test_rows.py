"""Tokens that each linear reads are counted call by call, and the hooks go away."""

import pytest
import torch
from helpers import draw, layer_plan, run, tiny_dit, tiny_model
from torch import nn

from ditq.allocation.rows import counted_rows


def test_rows_are_tokens_of_all_calls() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    plans = [layer_plan("0", k=8, n=4), layer_plan("1", k=4, n=2)]
    with counted_rows(model, plans[:1]) as rows:
        model(torch.zeros(3, 5, 8))
        model(torch.zeros(7, 8))
        model(torch.zeros(8))
    assert rows == {"0": 15 + 7 + 1}
    model(torch.zeros(3, 8))
    assert rows == {"0": 23}  # counted inside of the block only


def test_a_layer_that_is_not_called_has_none() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with counted_rows(model, [layer_plan("0", k=8, n=4), layer_plan("1", k=4, n=2)]) as rows:
        model[0](torch.zeros(3, 8))
    assert rows == {"0": 3, "1": 0}


def test_cross_attention_reads_text() -> None:
    model = tiny_model("pixart")
    names = ["attn1.to_q", "attn2.to_q", "attn2.to_k"]
    linears = [model.get_submodule(f"transformer_blocks.0.{name}") for name in names]
    plans = [
        layer_plan(f"transformer_blocks.0.{name}", k=linear.in_features, n=linear.out_features)
        for name, linear in zip(names, linears, strict=True)
    ]
    seen: list[int] = []
    handles = [x.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel())) for x in linears]
    with counted_rows(model, plans) as rows:
        run(model, "pixart")
    assert list(rows.values()) == seen
    assert rows["transformer_blocks.0.attn1.to_q"] != rows["transformer_blocks.0.attn2.to_k"]
    for handle in handles:
        handle.remove()


def test_a_pipeline_counts_steps_and_both_halves_of_the_guidance() -> None:
    pipe = tiny_dit()
    name = "transformer_blocks.1.ff.net.0.proj"
    with counted_rows(pipe.transformer, [layer_plan(name, k=128, n=512)]) as rows:
        draw(pipe, steps=3)
    assert rows == {name: 16 * 2 * 3}  # an 8 x 8 latent in patches of 2


def test_hooks_are_removed_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(RuntimeError), counted_rows(model, [layer_plan("0", k=8, n=4)]) as rows:
        assert model[0]._forward_pre_hooks
        model(torch.zeros(3, 9))
    assert not model[0]._forward_pre_hooks
    assert rows == {"0": 3}
