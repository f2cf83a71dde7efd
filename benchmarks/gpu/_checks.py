"""Checks the kernels on this machine against the CPU, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ditq import architectures, engines
from ditq.conversion import quantize_model
from ditq.numerics import pack
from ditq.recipe import load


def checks(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Names and verdicts. On a CPU the kernels run in the interpreter, on smaller shapes."""
    from ditq.engines.triton import proof

    dry = device.type == "cpu"
    for check in proof.checks(device):
        yield check.name, check.run(device) is None
    yield from _products(*((33, 128, 40) if dry else (1000, 1152, 200)), device)
    yield from _models(device)
    if not dry:
        yield from _graph_and_compiler(device)
        yield "products of 8-bit floats", _float8(device)


def _products(m: int, k: int, n: int, device: torch.device) -> Iterator[tuple[str, bool]]:
    """Of real sizes, and the same in every run."""
    from ditq.engines.triton.linear import launch
    from ditq.engines.triton.proof import moved

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


def _float8(device: torch.device) -> bool:
    """True where the card has none."""
    from ditq.engines.fp8 import ENGINE, engine

    return torch.cuda.get_device_capability(device) < engine.SMALLEST_CAPABILITY or ENGINE.prove(device) is None
