"""Queries and keys in 8 bits: their ranges, their rounding, and that OpenVINO multiplies the integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import example_inputs, grid, run, tiny_model, tiny_statistics
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ditq import architectures
from ditq.conversion import quantize_model
from ditq.errors import DitqError, UsageError
from ditq.numerics import fake_quantize, relative_error
from ditq.openvino import runtime
from ditq.recipe import load as load_recipe

if (reason := runtime.why_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

from ditq.openvino import attention_ranges
from ditq.openvino.export import compile_in_place, export, load

BLOCKS = 2
# Attentions of a block: of the tokens, and in PixArt of the text.
ATTENTIONS = {"dit": 1, "pixart": 2}


def quantized(name: str) -> nn.Module:
    model = tiny_model(name, num_layers=BLOCKS)
    recipe = load_recipe("smoothquant-static-w8a8").override(["weights.symmetric=true"])
    quantize_model(model, architectures.load(name), recipe, tiny_statistics(model, name))
    return model


def observed(model: nn.Module, name: str) -> dict[str, list[tuple[float, float]]]:
    with attention_ranges.observed(model, architectures.load(name)) as found:
        run(model, name)
    return found


def rounded(model: nn.Module, name: str, largest: dict[str, list[tuple[float, float]]]) -> Tensor:
    """What the torch engine computes with rounded queries and keys: the reference."""
    scales = iter([(q / 127, k / 127) for i in range(BLOCKS) for q, k in largest[f"transformer_blocks.{i}"]])

    def change(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(attention_ranges.emulate(x, scale) for x, scale in zip((query, key), next(scales), strict=True))  # type: ignore[return-value]

    with attention_ranges.EveryAttention(change):
        return run(model, name)


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    return quantized(name)


def test_rounding_is_that_of_static_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    scale = float(x.abs().amax()) / 127
    found = attention_ranges.emulate(x, scale)
    expected = fake_quantize(
        x.flatten(0, 1), grid(8, symmetric=True, granularity="tensor"), scale=torch.tensor([[scale]])
    )
    assert torch.equal(found, expected.unflatten(0, (4, 3)))
    torch.testing.assert_close(found, (x / scale).round() * scale)
    assert float(attention_ranges.emulate(torch.tensor([1e9, -1e9]), scale).abs().amax()) == pytest.approx(127 * scale)


def test_the_largest_query_and_key_of_every_attention(name: str, model: nn.Module) -> None:
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, y, n=n: outputs.__setitem__(n, y))
        for n, module in model.named_modules()
        if n.endswith((".to_q", ".to_k"))
    ]
    found = observed(model, name)
    for hook in hooks:
        hook.remove()
    assert list(found) == [f"transformer_blocks.{i}" for i in range(BLOCKS)]
    for block, pairs in found.items():
        assert len(pairs) == ATTENTIONS[name]
        for i, pair in enumerate(pairs):
            expected = [outputs[f"{block}.attn{i + 1}.{part}"].abs().amax().item() for part in ("to_q", "to_k")]
            assert pair == pytest.approx(expected)


def test_ranges_grow_from_call_to_call(name: str, model: nn.Module) -> None:
    call = example_inputs(name)
    with attention_ranges.observed(model, architectures.load(name)) as found:
        run(model, name)
        first = copy.deepcopy(found)
        run(model, name, hidden_states=3 * call["hidden_states"])
        run(model, name, hidden_states=0.01 * call["hidden_states"])
    pairs = [(a, b) for block in found for old, new in zip(first[block], found[block], strict=True)
             for a, b in zip(old, new, strict=True)]  # fmt: skip
    assert all(b >= a for a, b in pairs)
    assert any(b > a for a, b in pairs)
    assert all(len(found[block]) == len(first[block]) for block in found)


@pytest.mark.parametrize("shapes", ["dynamic", "static"])
def test_openvino_multiplies_the_integers(name: str, model: nn.Module, shapes: Any, tmp_path: Path) -> None:
    largest = observed(model, name)
    expected, exact = rounded(model, name, largest), run(model, name)
    report = export(model, architectures.load(name), example_inputs(name), tmp_path, largest=largest)
    assert report.attentions == BLOCKS * ATTENTIONS[name]
    assert f"; {report.attentions} attentions multiply 8-bit queries and keys" in report.summary()
    loaded = copy.deepcopy(model)
    assert load(tmp_path, loaded, shapes=shapes, attention="int8").attentions == report.attentions
    y = run(loaded, name)
    # What the rounding changes is small, but far more than what the engines differ by.
    assert relative_error(expected, y) < 0.5 * relative_error(exact, expected)


def test_without_ranges_nothing_is_rounded(name: str, model: nn.Module, tmp_path: Path) -> None:
    report = export(model, architectures.load(name), example_inputs(name), tmp_path)
    assert report.attentions == 0
    assert "queries" not in report.summary()


def test_attention_of_zeros_stays_in_floats(tmp_path: Path) -> None:
    model = quantized("dit")
    largest = {**observed(model, "dit"), "transformer_blocks.0": [(0.0, 1.0)]}
    assert export(model, architectures.load("dit"), example_inputs("dit"), tmp_path, largest=largest).attentions == 1


def test_products_in_floats_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized("dit")
    monkeypatch.setattr("ditq.openvino.summary.multiplying", lambda compiled: 1)
    arguments = (architectures.load("dit"), example_inputs("dit"))
    with pytest.raises(DitqError, match="queries and keys as floats in 1 of 2 attentions of transformer_blocks"):
        compile_in_place(copy.deepcopy(model), *arguments, largest=observed(model, "dit"))
    report = compile_in_place(model, *arguments, largest=observed(model, "dit"), allow_float=True)
    assert report.attentions == 1


def test_attention_that_is_not_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = type("Pipe", (), {"transformer": tiny_model("dit")})
    monkeypatch.setattr(attention_ranges, "sample", lambda *args, **kwargs: None)
    with pytest.raises(UsageError, match="does not use torch's scaled_dot_product_attention"):
        attention_ranges.sampled_ranges(pipe, architectures.load("dit"), ["a"])


def test_other_functions_pass_through() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with attention_ranges.EveryAttention(lambda query, key: (2 * query, key)):
        assert torch.equal(torch.add(q, k), q + k)
        found = [
            F.scaled_dot_product_attention(q, k, v, scale=0.5),
            F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5),
            F.scaled_dot_product_attention(q, k, value=v, attn_mask=None, scale=0.5),
        ]
    expected = F.scaled_dot_product_attention(2 * q, k, v, scale=0.5)
    assert all(torch.equal(y, expected) for y in found)
