"""Example calls: two small ones, made from the recorded first call of a pipeline."""

from __future__ import annotations

import pytest
import torch
from helpers import PROMPTS, example_inputs, tiny_dit, tiny_model, tiny_pixart
from torch import Tensor

from ditq import architectures
from ditq.errors import UsageError
from ditq.sampling import first_call
from ditq.trace.variations import variations


def shapes(call: dict[str, object]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in call.items() if isinstance(x, Tensor) and x.ndim}


@pytest.mark.parametrize(("make", "name", "condition"), [(tiny_pixart, "pixart", PROMPTS[0]), (tiny_dit, "dit", "3")])
def test_first_call_has_the_arguments_of_the_transformer(make, name, condition) -> None:
    pipe = make()
    call = first_call(pipe, architectures.load(name), [condition])
    assert call["hidden_states"].shape[0] == 2  # guidance
    pipe.transformer(**call)
    assert not pipe.transformer._forward_pre_hooks


def test_record_names_an_unknown_class() -> None:
    with pytest.raises(UsageError, match="does not have a class 'zebra'"):
        first_call(tiny_dit(), architectures.load("dit"), ["zebra"])


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_variations_differ_in_everything_that_may_change_and_nothing_else(name: str) -> None:
    model, call = tiny_model(name), example_inputs(name)
    first, second = variations(call, architectures.load(name), model)
    a, b = shapes(first), shapes(second)
    assert a["hidden_states"] == (2, 4, 8, 8)
    assert b["hidden_states"] == (3, 4, 12, 12)
    if name == "pixart":
        assert (a["encoder_hidden_states"], b["encoder_hidden_states"]) == ((2, 5, 64), (3, 7, 64))
        assert (a["encoder_attention_mask"], b["encoder_attention_mask"]) == ((2, 5), (3, 7))
        assert first["added_cond_kwargs"] == call["added_cond_kwargs"]
    assert (a["timestep"], b["timestep"]) == ((2,), (3,))
    for varied in (first, second):
        model(**varied)


def test_variations_reach_into_nested_arguments_and_leave_scalars() -> None:
    call = {
        **example_inputs("pixart"),
        "timestep": torch.tensor(10),
        "added_cond_kwargs": {"resolution": torch.zeros(2, 2), "aspect_ratio": None},
    }
    _, second = variations(call, architectures.load("pixart"), tiny_model("pixart"))
    assert second["added_cond_kwargs"]["resolution"].shape == (3, 2)
    assert second["timestep"].ndim == 0


def test_variations_keep_values() -> None:
    call = example_inputs("dit")
    first, second = variations(call, architectures.load("dit"), tiny_model("dit"))
    assert torch.equal(first["hidden_states"], call["hidden_states"])
    assert torch.equal(second["hidden_states"][2, :, :8, :8], call["hidden_states"][0])
    assert second["class_labels"].tolist() == [3, 7, 3]


def test_variations_need_the_sample() -> None:
    with pytest.raises(UsageError, match="argument 'hidden_states'"):
        variations({"timestep": 3}, architectures.load("dit"), tiny_model("dit"))
