"""The Triton engine as torch and the registry see it: operations that compile, and reasons why it cannot run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import full_weights, layer_plan, normal_weights, token_format, weight_format
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from triton_helpers import DEVICES, why_not

from ditq import engines
from ditq.engines.torch import TorchEngine
from ditq.engines.triton import ENGINE, TritonEngine
from ditq.engines.triton.tiles import ARCHITECTURES, tile_for, tiles
from ditq.errors import DitqError
from ditq.layers import QuantizedLinear
from ditq.numerics import Grid, Rotation
from ditq.plan import Rotate, Smooth

TORCH = TorchEngine()
CUDA = torch.device("cuda")

needs_kernels = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# ------------------------------------------------------------------------------------ what it says of itself


def card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), *, triton: str | None = "3.9.0"
) -> None:
    """This machine as if it had a card."""
    from ditq.engines.triton import engine

    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None if triton is None else object())
    monkeypatch.setattr(engine.importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(TritonEngine, "prove", lambda self, device: None)
    engines.registry.forget()


@pytest.fixture(autouse=True)
def _forget_choices() -> Any:
    yield
    engines.registry.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_card_is_told_so() -> None:
    assert ENGINE.why_unavailable() is not None
    with engines.use_engine("triton"), pytest.raises(DitqError, match="triton: "):
        engines.choose(weight_format(4), token_format(), CUDA)


def test_it_is_chosen_first_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch)
    assert engines.choose(weight_format(4), token_format(), CUDA).name == "triton"
    assert engines.choose(weight_format(4), None, CUDA).name == "triton"
    assert engines.choose(weight_format(4), token_format(), torch.device("cpu")).name == "torch"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"triton": None}, "pip install 'ditq\\[triton\\]'"),
        ({"triton": "3.2.1"}, "Triton 3.2.1 is older than 3.6"),
        ({"capability": (7, 5)}, "NVIDIA Test has compute capability 7.5; the kernels need 8.0"),
    ],
)
def test_reasons(machine: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, **machine)
    with engines.use_engine("triton"), pytest.raises(DitqError, match=reason):
        engines.choose(weight_format(4), token_format(), CUDA)
    assert engines.choose(weight_format(4), token_format(), CUDA).name == "torch"


def test_amd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch)
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    assert "AMD" in str(ENGINE.why_unavailable())


# ----------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("group", [None, 8, 48, 128, 256])
def test_every_product_has_a_tile(capability: int, group: int | None) -> None:
    for m in (1, 17, 300, 4096, 32768):
        for n in (8, 1152, 13824):
            tile = tile_for(m, n, capability, group)
            # What the matrix instructions take.
            assert tile.BM >= 16
            assert tile.BN >= 64 or capability < 90
            assert tile.BK >= 32
            assert group is None or max(32, 2 * group - 1) >= tile.BK


def test_resolutions_that_differ_little_share_a_tile() -> None:
    assert len({tile_for(m, 1152, 90) for m in range(2049, 4097)}) == 1
    assert tile_for(256, 1152, 90) != tile_for(16384, 1152, 90)


def test_cards_between_architectures_take_the_one_below() -> None:
    assert tiles(86, False) == tiles(89, False)
    assert tiles(87, False) == tiles(89, False)
    assert tiles(120, False) == tiles(90, False)
    with pytest.raises(ValueError, match="at least 80, got 75"):
        tiles(75, False)


# --------------------------------------------------------------------------------- layers and torch.compile


def linear(weight: Grid, activation: Grid, *, smooth: bool = False, block: int | None = None) -> QuantizedLinear:
    plan = layer_plan(
        k=96, n=40, weight=weight, activation=activation,
        smooth=Smooth(alpha=0.5) if smooth else None, rotate=Rotate(block=block, seed=3) if block else None,
    )  # fmt: skip
    static = torch.tensor(0.05) if not activation.dynamic else None
    return QuantizedLinear.from_linear(
        nn.Linear(96, 40), plan, smooth_scale=torch.rand(96) + 0.5 if smooth else None, input_scale=static
    )


LAYERS: dict[str, dict[str, Any]] = {
    "w8a8": {"weight": weight_format(8, symmetric=True), "activation": token_format()},
    "w4a8-balanced": {"weight": weight_format(4), "activation": token_format(), "smooth": True, "block": 32},
    "w4a8-groups": {
        "weight": weight_format(4, granularity="group", group=48),
        "activation": token_format(symmetric=False, granularity="group", group=48),
        "block": 16,
    },
    "w3a6-full-rotation": {"weight": weight_format(3), "activation": token_format(6, symmetric=False), "block": 96},
    "w8a8-static": {"weight": weight_format(8), "activation": Grid(bits=8, granularity="tensor")},
    "w4a4-normal": {
        "weight": normal_weights(),
        "activation": token_format(4, levels="normal"),
        "block": 32,
    },
    "w4a8-full": {"weight": full_weights(), "activation": token_format(symmetric=False)},
    "w3a8-normal-groups": {
        "weight": normal_weights(3, granularity="group", group=48),
        "activation": token_format(symmetric=False, granularity="group", group=48),
    },
    "w6a8-tensor": {"weight": weight_format(6), "activation": token_format(granularity="tensor", symmetric=False)},
}


def forward(engine: TorchEngine, layer: QuantizedLinear, x: Tensor) -> Tensor:
    fmt = layer.plan.activation
    assert fmt is not None
    buffers = layer._buffers
    codes = engine.quantize_input(x, buffers.get("smooth_scale"), layer.rotation, fmt, buffers.get("input_scale"))
    return engine.linear(codes, layer.quantized_weight, layer.bias, x.dtype)


@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_cpu_its_operations_are_the_torch_engine(name: str) -> None:
    layer, x = linear(**LAYERS[name]), torch.randn(9, 96)
    assert torch.allclose(forward(ENGINE, layer, x), forward(TORCH, layer, x), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("name", LAYERS)
def test_torch_compile_traces_a_layer_once_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    layer = linear(**LAYERS[name])
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: forward(ENGINE, layer, x), backend=backend, fullgraph=True, dynamic=True)
    graphs = []
    with torch.no_grad():
        for rows in (5, 9, 70):
            x = torch.randn(rows, 96)
            assert torch.allclose(compiled(x), forward(ENGINE, layer, x), rtol=1e-5, atol=1e-5)
            graphs.append(backend.frame_count)
    assert len(set(graphs)) == 1  # torch may begin the first one anew, and makes none for other sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_card_agree_with_the_torch_engine(name: str, dtype: torch.dtype) -> None:
    layer, x = linear(**LAYERS[name]).to(CUDA, dtype), torch.randn(300, 96, device=CUDA, dtype=dtype)
    assert engines.choose(layer.plan.weight, layer.plan.activation, CUDA) is ENGINE  # type: ignore[arg-type]
    with torch.no_grad():
        y = layer(x).float()
        with engines.use_engine("torch"):
            expected = layer(x).float()
    assert (y - expected).norm() / expected.norm() < 4e-3


@pytest.mark.gpu
def test_a_cuda_graph_replays_what_ran_eagerly() -> None:
    layer = linear(**LAYERS["w4a8-balanced"]).to(CUDA, torch.bfloat16)
    x = torch.randn(64, 96, device=CUDA, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))


# ------------------------------------------------------------------------------------- the four operations


def samples(device: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operation with arguments that use all of it."""
    from ditq.engines.triton.activation import activation_quantize
    from ditq.engines.triton.expand import expand
    from ditq.engines.triton.linear import int8_linear
    from ditq.engines.triton.norm import norm_quantize
    from ditq.engines.triton.quantize import quantize_rows
    from ditq.numerics import scaled_signs

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) + 0.5

    k = 64
    target = (floats(k), scaled_signs(Rotation(k, 32, 0), torch.device(device)), 32, 8, False, 2, None)
    codes = torch.randint(-128, 128, (6, k), device=device).to(torch.int8)
    zeros = torch.zeros(6, 2, dtype=torch.int16, device=device)
    packed = torch.randint(0, 256, (10, k // 2), device=device).to(torch.uint8)
    linear = (
        codes, floats(6, 2), zeros, None, packed, 4, floats(10, 2), None,
        floats(10), floats(3, 10), floats(6, 10), floats(6, 4), floats(10, 4), torch.bfloat16,
    )  # fmt: skip
    return {
        "quantize_rows": (quantize_rows, (floats(6, k), *target)),
        "norm_quantize": (
            norm_quantize,
            (floats(6, k), 1e-6, floats(k), None, floats(3, k), floats(3, k), *target),
        ),
        "activation_quantize": (activation_quantize, (floats(6, 2 * k), "silu", True, *target)),
        "int8_linear": (int8_linear, linear),
        "expand": (expand, (packed, 4, k, None)),
    }


@needs_kernels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["quantize_rows", "norm_quantize", "activation_quantize", "int8_linear", "expand"])
def test_operations_keep_the_contract_of_torch_library(name: str, device: str) -> None:
    operation, arguments = samples(device)[name]
    torch.library.opcheck(operation.overload, arguments)


def test_the_engine_is_one_of_the_registry() -> None:
    assert isinstance(engines.engines()["triton"], TritonEngine)
    assert list(engines.engines()).index("triton") < list(engines.engines()).index("torch")
