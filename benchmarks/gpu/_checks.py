"""Whether the kernels are right on this machine, before anything is timed: against the same on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ditq import architectures, engines
from ditq.conversion import quantize_model
from ditq.numerics import Grid, Rotation, pack, quantize
from ditq.recipe import load


def checks(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Names and verdicts. On a CPU the kernels run in the interpreter, on smaller shapes."""
    dry = device.type == "cpu"
    m, k, n = (33, 128, 40) if dry else (1000, 1152, 200)
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[3] = 0
    yield from _quantizers(x, device, k // 64)
    yield from _prologues(x, device)
    yield from _products(m, k, n, device)
    yield from _epilogue(m, k, n, device)
    yield from _models(device)
    if not dry:
        yield from _graph_and_compiler(device)
        yield from _float8(device)


def moved(values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def _quantizers(x: Tensor, device: torch.device, many: int) -> Iterator[tuple[str, bool]]:
    from ditq.engines.triton.quantize import launch

    for symmetric in (True, False):
        for groups in (1, many):
            size = None if groups == 1 else x.shape[1] // groups
            granularity = "token" if size is None else "group"
            expected = quantize(x, Grid(bits=8, symmetric=symmetric, granularity=granularity, group_size=size))
            found = launch(x.to(device), None, None, 0, 8, symmetric, groups, None)
            yield f"codes, symmetric={symmetric}, groups={groups}", torch.equal(found[0].cpu(), expected.codes)
    bad = x.clone()
    bad[5, 7] = float("nan")
    scale = launch(bad.to(device), None, None, 0, 8, True, 1, None)[1].cpu()[:, 0]
    yield "only the row with NaN is marked", scale.isnan().nonzero().flatten().tolist() == [5]


def near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Codes at most one off, and few of them; sums of the codes that were found."""
    codes, scale, _, sums = (t.cpu() for t in found)
    apart = (codes.int() - expected[0].int()).abs()
    return (
        int(apart.max()) <= 1
        and float((apart > 0).float().mean()) < 2e-3
        and torch.allclose(scale, expected[1], rtol=1e-4, atol=0)
        and torch.equal(sums[:, 0], codes.sum(1, dtype=torch.int32))
    )


def _prologues(x: Tensor, device: torch.device) -> Iterator[tuple[str, bool]]:
    from ditq.engines.triton import activation, norm, quantize
    from ditq.engines.triton.rows import scaled_signs

    k = x.shape[1]
    x = torch.cat([x, x[:1].repeat(-len(x) % 4, 1)])
    factor, shift = torch.randn(4, k) + 1, torch.randn(4, k)
    for block in (0, 128):
        signs = scaled_signs(Rotation(k, block, 0), torch.device("cpu")) if block else None
        target = (torch.rand(k) + 0.5, signs, block, 8, True, 1, None)
        for name, module, arguments in (
            ("plain", quantize, (x, *target)),
            ("LayerNorm and modulation", norm, (x, True, 1e-6, None, None, factor, shift, *target)),
            ("RMSNorm", norm, (x, False, 1e-6, factor[0], None, None, None, *target)),
            ("GELU", activation, (x, "gelu_tanh", "", *target)),
            ("SwiGLU", activation, (torch.cat([x, x.flip(0)], 1), "silu", "second", *target)),
        ):
            found = module.launch(*moved(arguments, device))  # type: ignore[attr-defined]
            yield f"{name}, smoothed, block {block}", near(found, module.reference(*arguments))  # type: ignore[attr-defined]


def _products(m: int, k: int, n: int, device: torch.device) -> Iterator[tuple[str, bool]]:
    from ditq.engines.triton.linear import launch

    for bits in (8, 6, 4, 3, 2):
        w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8)
        a = torch.randint(-8, 8, (m, k), dtype=torch.int8)
        one, zero = torch.ones(m, 1), torch.randint(-2, 2, (n, 1), dtype=torch.int8)
        exact = a.double() @ (w.double() - zero.double()).T
        rest = (None, None, None, None, None, torch.float32)
        arguments = moved((a, one, None, None, pack(w, bits), bits, torch.ones(n, 1), zero, *rest), device)
        y = launch(*arguments)
        yield f"sums of {bits}-bit products", torch.equal(y.cpu().double(), exact)
        yield f"{bits} bits, three runs", all(torch.equal(y, launch(*arguments)) for _ in range(1 if y.is_cpu else 3))


def _epilogue(m: int, k: int, n: int, device: torch.device) -> Iterator[tuple[str, bool]]:
    """Gate, residual and a branch of low rank, in the output's one rounding."""
    from ditq.engines.triton.linear import launch, reference

    kind = torch.float32 if device.type == "cpu" else torch.bfloat16  # the interpreter has no products of bf16
    for tokens in (m, 128):
        rows = m if tokens == m else 2 * tokens
        a, w = (torch.randint(-127, 128, (r, k), dtype=torch.int8) for r in (rows, n))
        arguments = (
            a, torch.rand(rows, 1) / k, None, None, w, 8, torch.rand(n, 1) / 127, None, torch.randn(n),
            torch.randn(rows // tokens, n), torch.randn(rows, n), torch.randn(rows, 24).to(kind),
            torch.randn(n, 24).to(kind),
        )  # fmt: skip
        expected = reference(*arguments, torch.float32)
        y = launch(*moved(arguments, device), torch.bfloat16).cpu().float()
        ulp = torch.finfo(torch.bfloat16).eps
        yield (
            f"gate, residual, low rank, {tokens} tokens a sample",
            bool(((y - expected).abs() <= 1.01 * ulp * expected.abs() + 2e-2 * ulp).all()),
        )


def _models(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Tiny transformers: fused, not fused, and by the torch engine."""
    from _transformers import wholes

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for name in ("dit", "pixart", "stdit"):
        whole = wholes()[name]
        model, call = whole.build(device, dtype, dry=True), whole.call(device, dtype, dry=True)
        with torch.no_grad():
            plain = model(**call, return_dict=False)[0].float()
            quantize_model(model, architectures.match(model), load("rtn-w8a8"), None)
            fused = model(**call, return_dict=False)[0].float()
            with engines.fusion(False):
                apart = model(**call, return_dict=False)[0].float()
            with engines.use_engine("torch"):
                integers = model(**call, return_dict=False)[0].float()
        scale = plain.norm()
        error = (integers - plain).norm() / scale
        # Where roundings differ, results are as far from each other as from the floats, and no farther.
        yield (
            f"{name}: fused is as exact as the torch engine",
            bool((fused - plain).norm() / scale <= 1.3 * error + 0.01),
        )
        yield f"{name}: not fused too", bool((apart - plain).norm() / scale <= 1.3 * error + 0.01)


def _graph_and_compiler(device: torch.device) -> Iterator[tuple[str, bool]]:
    from _transformers import wholes

    whole = wholes()["dit"]
    model = whole.build(device, torch.bfloat16, dry=True)
    call = whole.call(device, torch.bfloat16, dry=True)
    quantize_model(model, architectures.match(model), load("rtn-w4a8"), None)
    with torch.no_grad():
        for _ in range(3):
            model(**call, return_dict=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(**call, return_dict=False)[0]
        call["hidden_states"].copy_(torch.randn_like(call["hidden_states"]))
        graph.replay()
        eager = model(**call, return_dict=False)[0]
        yield "a recorded graph replays what runs eagerly", torch.equal(out, eager)
        for block in model.get_submodule(whole.blocks[0]):
            block.compile()
        compiled = model(**call, return_dict=False)[0].float()
        error = (compiled - eager.float()).norm() / eager.float().norm()
        yield "compiled agrees with eager", bool(error < 0.02)


def _float8(device: torch.device) -> Iterator[tuple[str, bool]]:
    from ditq.engines.fp8 import engine as fp8

    if torch.cuda.get_device_capability(device) < fp8.SMALLEST_CAPABILITY:
        return
    x, w = (torch.randn(r, 96).to(fp8.KIND) for r in (70, 48))
    scales = torch.rand(70, 1), torch.rand(48, 1)
    expected = fp8.scaled_product(x, w, *scales)
    y = fp8.scaled_product(*moved((x, w, *scales), device)).cpu().float()
    yield "products of 8-bit floats", bool((y - expected).norm() / expected.norm() < 4e-3)
