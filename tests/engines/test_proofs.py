"""Engines are proved on a device before they are trusted there; one that fails is replaced, and says so."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers import layer_plan, token_format, weight_format
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ditq import engines
from ditq.engines import registry
from ditq.engines.torch.engine import TorchEngine
from ditq.errors import DitqError
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, Quantized

CPU = torch.device("cpu")
FORMATS = weight_format(8), token_format()


class Kernels(TorchEngine):
    """An engine that compares its quantizer with the torch engine's; ``error`` makes one code wrong."""

    name = "kernels"
    priority = 5

    def __init__(self) -> None:
        self.error = 0
        self.proofs: list[torch.device] = []

    def quantize_activations(self, x: Tensor, format: Grid, scale: Tensor | None) -> Quantized:
        found = super().quantize_activations(x, format, scale)
        found.codes[0, 0] += self.error
        return found

    def prove(self, device: torch.device) -> str | None:
        self.proofs.append(device)
        x = torch.arange(-8.0, 8.0, device=device).view(2, 8)
        found, expected = (e.quantize_activations(x, token_format(), None).codes for e in (self, TorchEngine()))
        wrong = int((found != expected).sum())
        return f"quantizer: {wrong} of {found.numel()} codes differ" if wrong else None


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    engine = Kernels()
    known = {"kernels": engine, **registry.engines()}
    monkeypatch.setattr(registry, "engines", lambda: known)
    registry.forget()
    yield engine
    registry.forget()


def layer() -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(32, 24), layer_plan())


def test_an_engine_is_proved_once_for_a_device_whatever_the_formats(kernels: Kernels) -> None:
    for bits in (8, 4, 8, 3):
        assert engines.choose(weight_format(bits), token_format(), CPU) is kernels
    assert kernels.proofs == [CPU]
    engines.choose(*FORMATS, torch.device("cpu", 0))
    assert len(kernels.proofs) == 2


def test_threads_share_one_proof(kernels: Kernels) -> None:
    threads = [threading.Thread(target=engines.choose, args=(weight_format(b), token_format(), CPU)) for b in (8, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernels.proofs == [CPU]


def test_one_wrong_code_is_caught_and_the_torch_engine_takes_over(kernels: Kernels) -> None:
    kernels.error = 1
    quantized, x = layer(), torch.randn(3, 32)
    with pytest.warns(UserWarning, match=r"kernels engine is not used.*on cpu: quantizer: 1 of 16 codes differ.*torch "
                      r"engine runs instead.*slower.*report.*ditq doctor"):  # fmt: skip
        y = quantized(x)
    with engines.use_engine("torch"):
        assert torch.equal(y, quantized(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engines.choose(weight_format(3), token_format(), CPU)  # said once
    assert kernels.proofs == [CPU]


@pytest.mark.parametrize("error", [RuntimeError("out of registers"), AssertionError()], ids=str)
def test_an_exception_is_a_failure(kernels: Kernels, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(self: Kernels, device: torch.device) -> str | None:
        raise error

    monkeypatch.setattr(Kernels, "prove", prove)
    with pytest.warns(UserWarning, match=f"{type(error).__name__}: {error}"):
        assert engines.choose(*FORMATS, CPU).name == "torch"


def test_an_engine_that_was_asked_for_raises(kernels: Kernels) -> None:
    kernels.error = 1
    quantized, x = layer(), torch.randn(3, 32)
    with engines.use_engine("kernels"), pytest.raises(DitqError, match="kernels: .*1 of 16 codes differ"):
        quantized(x)
    quantized.engine = "kernels"
    with pytest.raises(DitqError, match="kernels: .*1 of 16 codes differ"):
        quantized(x)


def test_the_report_says_what_was_proved(kernels: Kernels) -> None:
    good = {row.name: row for row in registry.report(CPU)}
    assert good["kernels"] == ("kernels", True, "ready; its kernels agree with their references here", True)
    assert good["torch"] == ("torch", True, "ready", None)
    assert good["triton"].available is torch.cuda.is_available()
    registry.forget()
    kernels.error = 1
    bad = {row.name: row for row in registry.report(CPU)}
    assert (bad["kernels"].available, bad["kernels"].proved) == (False, False)
    assert bad["kernels"].reason == "its check of kernels failed on cpu: quantizer: 1 of 16 codes differ"
    assert bad["torch"].available


@pytest.mark.parametrize("mode", ["compile", "inference", "fake", "autocast"])
def test_a_proof_is_eager_code_wherever_the_engine_is_first_chosen(
    kernels: Kernels, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = Kernels.prove

    def prove(self: Kernels, device: torch.device) -> str | None:
        x = torch.randn(2, 8)
        seen.append((type(x), x.is_inference(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        assert float((x @ x.T).sum()) != 0  # numbers, not symbols
        return plain(self, device)

    monkeypatch.setattr(Kernels, "prove", prove)
    quantized, x = layer(), torch.randn(3, 32)
    if mode == "compile":
        torch._dynamo.reset()
        with torch.no_grad():
            y = torch.compile(quantized, backend="aot_eager", fullgraph=True)(x)
            assert torch.allclose(y, quantized(x), rtol=1e-5, atol=1e-5)
    else:
        modes = {
            "inference": torch.inference_mode(), "fake": FakeTensorMode(), "autocast": torch.autocast("cpu"),
        }  # fmt: skip
        with modes[mode]:
            engines.choose(*FORMATS, CPU)
    assert seen == [(Tensor, False, False, False)]
    assert engines.choose(*FORMATS, CPU) is kernels


def test_no_proof_runs_while_a_graph_is_recorded(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cuda = torch.device("cuda", 0)
    with pytest.raises(DitqError, match="cannot do so while a CUDA graph is recorded. Run the model once on cuda:0"):
        engines.choose(*FORMATS, cuda)
    assert kernels.proofs == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Kernels, "prove", lambda self, device: None)
    assert engines.choose(*FORMATS, cuda) is kernels
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert engines.choose(weight_format(4), token_format(), cuda) is kernels
