"""A call that fails leaves the model as it was, wherever it fails."""

from __future__ import annotations

import gc
import importlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run, tiny_model, tiny_statistics
from torch import Tensor, nn

import ditq
from ditq import api, architectures
from ditq.conversion import quantize_model
from ditq.conversion.rollback import restored_on_error
from ditq.recipe import load as load_recipe

conversion = importlib.import_module("ditq.conversion.convert")  # the package has a function of that name
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (name, id(m), type(m), m.training, *(tuple(getattr(m, hooks)) for hooks in HOOKS), *sorted(m.__dict__))
        for name, m in model.named_modules()
    ]


def tensors(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in state.items()}


def check(model: nn.Module, before: tuple[Any, Any, Any]) -> None:
    shape, values, config = before
    assert structure(model) == shape
    now = tensors(model)
    assert now.keys() == values.keys()
    for name, (identity, value) in values.items():
        assert now[name][0] == identity
        assert now[name][1].dtype == value.dtype and torch.equal(now[name][1], value)
    assert dict(model.config) == config  # type: ignore[arg-type]


def fail_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, error: BaseException) -> None:
    function, calls = getattr(place, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (conversion, "round_to_storage", 1),
        (conversion, "make_layer", 1),
        (conversion, "make_layer", 7),
        (conversion, "wire", 1),
        (conversion, "count_parameters", 1),
        (api, "attach", 1),
    ],
    ids=lambda x: str(x) if not hasattr(x, "__name__") else x.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_failed_quantize_changes_nothing(
    place: Any, name: str, call: int, error: BaseException, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("wan").to(dtype).train()
    handle = model.register_forward_hook(lambda *_: None)
    before = structure(model), tensors(model), dict(model.config)  # type: ignore[arg-type]
    fail_at(monkeypatch, place, name, call, error)
    with pytest.raises(type(error)):
        ditq.quantize(model, "rtn-w8a8")
    check(model, before)
    handle.remove()
    assert not model._forward_hooks
    ditq.quantize(model, "rtn-w8a8")  # a second try works
    assert len(model.hf_quantizer.plan.quantized) > 7  # type: ignore[union-attr]


@pytest.mark.parametrize("overrides", [["balance.timesteps=[[0, 499], [500, 999]]"], ["rounding=gptq"]])
def test_with_statistics(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("dit")
    statistics = tiny_statistics(model, "dit")
    before = structure(model), tensors(model), dict(model.config)  # type: ignore[arg-type]
    expected = run(model, "dit")
    fail_at(monkeypatch, conversion, "make_layer", 9, RuntimeError("broken"))
    with pytest.raises((RuntimeError, ditq.DitqError)):
        ditq.quantize(model, "smoothquant-w8a8", statistics=statistics, overrides=overrides)
    check(model, before)
    assert torch.equal(run(model, "dit"), expected)


def test_failed_calibration_changes_nothing() -> None:
    model = tiny_model("dit").train()
    before = structure(model), tensors(model), dict(model.config)  # type: ignore[arg-type]

    def calibrate(m: nn.Module) -> None:
        run(m, "dit")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ditq.quantize(model, "smoothquant-w8a8", calibrate_with=calibrate)
    check(model, before)


def test_what_succeeds_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with restored_on_error(model):
        model[0] = nn.Identity()
    assert type(model[0]) is nn.Identity


def test_float_weights_are_freed_when_it_returns() -> None:
    model = tiny_model("dit")
    weights = weakref.WeakSet(m for m in model.modules() if type(m) is nn.Linear)
    before = len(weights)
    plan = ditq.quantize(model, "rtn-w8a8").plan
    gc.collect()
    assert len(weights) == before - len(plan.quantized)


def test_several_transformers_are_searched_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SimpleNamespace(transformer=tiny_model("wan"), transformer_2=tiny_model("wan", 1))
    models = [pipe.transformer, pipe.transformer_2]
    before = [(structure(m), tensors(m), dict(m.config)) for m in models]  # type: ignore[arg-type]

    def search(pipe: Any, *args: Any, component: str, **options: Any) -> Any:
        model = getattr(pipe, component)
        plan = quantize_model(model, architectures.load("wan"), load_recipe("rtn-w8a8"), None)
        if component == "transformer_2":
            raise RuntimeError("broken")
        return SimpleNamespace(candidate=plan)

    monkeypatch.setattr(api.allocation, "search", search)
    monkeypatch.setattr(api.requests, "float_transformers", lambda *_: dict(vars(pipe)))
    with pytest.raises(RuntimeError, match="broken"):
        api.search(pipe, "rtn-w4a8", ["a red cat"])
    for model, state in zip(models, before, strict=True):
        check(model, state)
