"""Waiting for what follows changes who computes, never what: whole models with and without, and every other use."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import layer_plan, run, tiny_model, token_format, weight_format
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from triton_helpers import why_not

from ditq import architectures, engines
from ditq.conversion import quantize_model
from ditq.conversion.wiring import unwire
from ditq.engines.base import Activation, Norm
from ditq.layers import QuantizedLinear
from ditq.layers.deferred import Deferred, DeferredLayerNorm, Half, Output, output
from ditq.layers.shared import SharedInput
from ditq.numerics import Quantized
from ditq.recipe import load

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

from ditq.engines.triton.engine import TritonEngine
from ditq.engines.triton.operation import Operation


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The Triton engine runs on this CPU, by its references; counts what it is asked for."""
    counted: Counter[str] = Counter()
    plain = Operation.__call__

    def counting(self: Operation, *arguments: Any) -> Any:
        name = self.overload.name().removeprefix("ditq::")
        if name == "int8_linear":
            gate, residual = arguments[9:11]
            name += " gate" * (gate is not None) + " residual" * (residual is not None)
        counted[name] += 1
        return plain(self, *arguments)

    monkeypatch.setattr(Operation, "__call__", counting)
    monkeypatch.setattr(TritonEngine, "why_unavailable", lambda self: None)
    monkeypatch.setattr(TritonEngine, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(TritonEngine, "prove", lambda self, device: None)
    engines.registry.forget()
    yield counted
    engines.registry.forget()


def quantized(name: str, recipe: str = "rtn-w8a8") -> nn.Module:
    model = tiny_model(name)
    quantize_model(model, architectures.match(model), load(recipe), None)
    return model


# Of one block, once for each: input quantizers, products, and what of them is fused.
EXPECTED = {
    # norm -> q k v, sdpa -> out + gate + residual, norm -> up, gelu -> down + gate + residual
    "dit": {"norm_quantize": 2, "quantize_rows": 1, "activation_quantize": 1},
    # and the cross-attention: q of the raw stream, k and v of the text, out + residual
    "pixart": {"norm_quantize": 2, "quantize_rows": 4, "activation_quantize": 1, "int8_linear residual": 1},
    # and q, k, v of the frames; what comes back from them is transposed
    "stdit": {"norm_quantize": 2, "quantize_rows": 6, "activation_quantize": 1, "int8_linear residual": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_are_fused_as_their_architecture_says(name: str, calls: Counter[str]) -> None:
    model = quantized(name)
    with torch.no_grad():
        with engines.fusion(False):
            expected = run(model, name)
        assert not {"norm_quantize", "activation_quantize"} & set(calls)
        calls.clear()
        y = run(model, name)
    blocks = 2
    assert {k: v for k, v in calls.items() if k in EXPECTED[name]} == {
        k: blocks * v for k, v in EXPECTED[name].items()
    }
    assert calls["int8_linear gate residual"] == 2 * blocks
    # A code near a tie may fall on its other side, and the random STDiT makes 5 % of a change of 1e-6 in its input.
    assert (y - expected).norm() <= (0.05 if name == "stdit" else 1e-3) * expected.norm()


@pytest.mark.parametrize("name", ["latte", "stdit3", "cogvideox", "mochi", "ltx", "wan", "hunyuanvideo", "allegro"])
def test_other_models_run_too(name: str, calls: Counter[str]) -> None:
    model = quantized(name)
    with torch.no_grad():
        y = run(model, name)
        products = sum(n for key, n in calls.items() if key.startswith("int8_linear"))
        quantizers = sum(n for key, n in calls.items() if key.endswith(("_quantize", "_rows")))
        with engines.use_engine("torch"):
            expected = run(model, name)
    assert calls["activation_quantize"] > 0
    assert quantizers < products  # q, k and v share
    assert (y - expected).norm() <= 0.01 * expected.norm()


def test_balanced_inputs_and_low_bits(calls: Counter[str]) -> None:
    model = quantized("pixart", "quarot-w4a8")
    with torch.no_grad():
        y = run(model, "pixart")
        with engines.use_engine("torch"):
            expected = run(model, "pixart")
    assert calls["norm_quantize"] > 0
    assert (y - expected).norm() <= 0.01 * expected.norm()


def test_compiled_and_taught_models_do_not_wait(calls: Counter[str]) -> None:
    model = quantized("dit")
    run_block = torch.compile(lambda x: model.transformer_blocks[0].norm1.norm(x), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert type(run_block(torch.randn(2, 3, 128))) is Tensor
    x = torch.randn(2, 3, 128, requires_grad=True)
    y = model.transformer_blocks[0].norm1.norm(x)
    assert type(y) is Tensor
    model.transformer_blocks[0].attn1.to_q(y).sum().backward()
    assert x.grad is not None


def test_dequantized_models_have_plain_norms(calls: Counter[str]) -> None:
    model = quantized("dit")
    assert any(isinstance(m, DeferredLayerNorm) for m in model.modules())
    unwire(model)
    assert not any(isinstance(m, DeferredLayerNorm) for m in model.modules())


# --------------------------------------------------------------------------- every other use computes the same


def norm_layer(width: int = 16) -> nn.LayerNorm:
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight)
    norm.__class__ = DeferredLayerNorm
    return norm


USES: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda y: F.linear(y, torch.eye(16)),
    "cat": lambda y: torch.cat([y, y], 1),
    "slice": lambda y: y[:, 1:],
    "transpose": lambda y: y.transpose(1, 2),
    "float": lambda y: y.float() + 1,
    "modulated": lambda y: y * (1 + torch.ones(2, 1, 16)) + torch.ones(2, 1, 16),
    "modulated by token": lambda y: y * torch.arange(96.0).view(2, 3, 16) + torch.ones(2, 3, 16),
    "modulated by column of frames": lambda y: y * torch.ones(1, 3, 16) + torch.ones(1, 3, 1),
    "shape": lambda y: (y.flatten(0, 1) * torch.ones(16)).view(3, 2, 16),
    "activated": lambda y: F.gelu(y, approximate="tanh"),
    "in place": lambda y: y.clone().add_(y),
    "square": lambda y: y * y,
    "half": lambda y: y.chunk(2, -1)[0] * F.silu(y.chunk(2, -1)[1]),
    "alpha": lambda y: torch.add(y, torch.ones(2, 3, 16), alpha=2),
    "wider": lambda y: y * torch.ones(2, 1, 16, dtype=torch.float64),
    "dropout": lambda y: F.dropout(y, 0.5, training=False) / 1.0,
    "reduced": lambda y: y.sum((0, 1)) / 2,
    "dispatched": lambda y: torch.ops.aten.add(y, y),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_of_a_norm_is_as_without_waiting(use: str, calls: Counter[str]) -> None:
    norm, x = norm_layer(), torch.randn(2, 3, 16)
    with torch.inference_mode():
        y = norm(x)
        assert isinstance(y, Deferred)
        found = USES[use](y)
        expected = USES[use](nn.LayerNorm.forward(norm, x))
        found = found.value() if isinstance(found, Deferred) else found
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("use", USES)
def test_any_use_of_a_linear_layer_is_as_without_waiting(use: str, calls: Counter[str]) -> None:
    rows = torch.randn(6, 16)
    with torch.no_grad():
        y = output(lambda gate, residual: rows, torch.randn(2, 3, 8), 16)
        found = USES[use](y)
        expected = USES[use](rows.view(2, 3, 16))
        found = found.value() if isinstance(found, Deferred) else found
    if isinstance(y.work, Output) and use in ("modulated", "modulated by token", "alpha"):
        return  # a residual: computed by ``run``, which this one does not
    assert torch.equal(found, expected)


def same(found: Any, expected: Activation) -> bool:
    return isinstance(found, Activation) and torch.equal(found.x, expected.x) and found[1:] == expected[1:]


def test_what_an_engine_is_told(calls: Counter[str]) -> None:
    norm, x, rows = norm_layer(), torch.randn(2, 3, 16), torch.randn(6, 16)
    factor, shift = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    with torch.no_grad():
        work = (norm(x) * (1 + factor) + shift).work
        assert isinstance(work, Norm)
        assert work.x.shape == (6, 16)
        assert torch.equal(work.factor, 1 + factor[:, 0])  # type: ignore[arg-type]
        assert torch.equal(work.shift, shift[:, 0])  # type: ignore[arg-type]
        y = output(lambda gate, residual: rows, torch.randn(2, 3, 8), 16)
        assert same(F.gelu(y).work, Activation(rows, "gelu", False))
        value, gate = y.chunk(2, dim=-1)
        assert isinstance(gate.work, Half)
        assert same((value * F.silu(gate)).work, Activation(rows, "silu", True))
        asked = []
        y = output(lambda *work: asked.append(work) or rows, torch.randn(2, 3, 8), 16)
        assert type(x + factor * (y / 1.0)) is Tensor
    (work,) = asked
    assert torch.equal(work[0], factor[:, 0])
    assert torch.equal(work[1], x.flatten(0, 1))


def test_an_engine_that_does_not_fuse_may_be_a_layers_own(calls: Counter[str]) -> None:
    """One layer on another engine, between layers that wait."""
    model = quantized("dit")
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, QuantizedLinear):
            module.engine = "torch"
    with torch.no_grad():
        y, expected = run(other, "dit"), run(model, "dit")
    assert (y - expected).norm() <= 1e-3 * expected.norm()


# ----------------------------------------------------------------------------------------------- shared inputs


def made(number: int) -> Callable[[], Quantized]:
    return lambda: Quantized(torch.full((1, 1), number, dtype=torch.int8), torch.ones(1, 1), None)


def test_layers_share_what_one_of_them_made() -> None:
    shared, x = SharedInput(), torch.randn(2, 3)
    q, k, v = object(), object(), object()
    first = shared.get(x, "a", q, made(1))
    assert shared.get(x, "a", k, made(2)) is first
    assert shared.get(x, "b", v, made(3)).codes.item() == 3  # made in another way
    assert shared.get(x, "b", q, made(4)).codes.item() == 3
    assert shared.get(x, "b", q, made(5)).codes.item() == 5  # asks again: the next call of the model


def test_what_was_written_into_is_another_input() -> None:
    shared, x = SharedInput(), torch.randn(2, 3)
    first = shared.get(x, "a", 1, made(1))
    x.add_(1)
    assert shared.get(x, "a", 2, made(2)) is not first
    assert shared.get(x.clone(), "a", 3, made(3)).codes.item() == 3


def test_integers_die_with_their_input() -> None:
    shared, x = SharedInput(), torch.randn(2, 3)
    shared.get(x, "a", 1, made(1))
    assert shared._entry is not None
    del x
    assert shared._entry is None


def test_the_torch_engine_shares_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditq.engines.torch import TorchEngine

    model = quantized("dit")
    seen = []
    plain = TorchEngine.quantize_input
    monkeypatch.setattr(TorchEngine, "quantize_input", lambda self, x, *rest: seen.append(x) or plain(self, x, *rest))
    with torch.no_grad():
        y = run(model, "dit")
    assert len(seen) == 2 * 4  # and not 6 a block
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.shared = None
    with torch.no_grad():
        assert torch.equal(run(model, "dit"), y)


def test_a_copied_or_stored_model_does_not_share_with_the_first(tmp_path: Any) -> None:
    shared = SharedInput()
    layers = nn.ModuleList(
        QuantizedLinear.from_linear(
            nn.Linear(32, 24), layer_plan(weight=weight_format(8), activation=token_format())
        ) for _ in range(2)
    )  # fmt: skip
    for layer in layers:
        layer.shared = shared
    twin = copy.deepcopy(layers)
    assert twin[0].shared is twin[1].shared is not shared
    torch.save(layers, tmp_path / "layers.pt")
