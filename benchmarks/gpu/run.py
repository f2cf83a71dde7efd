"""The Triton engine on this GPU: first whether it is right, then how fast, beside what a user would pick instead.

``python benchmarks/gpu/run.py`` takes at most eight minutes, prints tables and writes ``gpu_*.json`` and plots into
``benchmarks/results``. Nothing is timed when a check fails. Stages that find no time left say so in their rows.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from _measure import RESULTS, Row, bars, save, table, torch_bytes, where, write
from _models import MODELS, make
from _rivals import Float8Linear, Int8Linear, replaced, scaled_mm, torchao_int8
from _shapes import products, widths
from _time import Clock, Times, argument_sets, timed

import ditq
from ditq.engines.triton import ENGINE
from ditq.numerics import Rotation, pack, quantize

CUDA = torch.device("cuda")
HALF = torch.bfloat16
NO_TIME = "no time left"


def row(name: str, times: Times, **fields: Any) -> Row:
    return Row(
        name, ms_median=times.median, ms_min=times.smallest, spread=times.spread, runs=times.runs, **fields
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- ceilings


def ceilings() -> dict[str, float]:
    """What this card reaches: bytes/s of a copy, operations/s of large products of random numbers."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device=CUDA) for _ in range(2))
    found = {"copy_bytes_per_s": 2 * 2**30 / (1e-3 * timed(target.copy_, [(source,)], 20).median)}
    del source, target
    size = 8192
    a, b = (torch.randn(size, size, device=CUDA, dtype=HALF) for _ in range(2))
    one = torch.ones(size, 1, device=CUDA)
    kinds: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "bf16_operations_per_s": (F.linear, (a, b)),
        "int8_operations_per_s": (lambda x, w: torch._int_mm(x, w.t()), (codes(size, size), codes(size, size))),
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        kinds["fp8_operations_per_s"] = (
            lambda x, w: scaled_mm(x, w, one, one.t(), HALF),
            (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)),
        )
    for name, (call, arguments) in kinds.items():
        found[name] = 2 * size**3 / (1e-3 * timed(call, [arguments], 20).median)
    return found


def codes(rows: int, columns: int, low: int = -127) -> Tensor:
    return torch.randint(low, 128, (rows, columns), device=CUDA, dtype=torch.int8)


# -------------------------------------------------------------------------------------------- correctness


def checks() -> Iterator[tuple[str, bool]]:
    """Integers of the kernels against those of the CPU, on shapes that fit no tile."""
    from ditq.engines.triton.linear import int8_linear
    from ditq.engines.triton.quantize import quantize_rows

    m, k, n = 1000, 1152, 200
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[3] = 0
    for symmetric in (True, False):
        for groups in (1, 9):
            size = None if groups == 1 else k // groups
            expected = quantize(
                x, 8, symmetric=symmetric, granularity="row" if size is None else "group", group_size=size
            )
            found = quantize_rows(x.to(CUDA), None, None, 0, 8, symmetric, groups, None)
            yield f"codes, symmetric={symmetric}, groups={groups}", torch.equal(found[0].cpu(), expected.codes)
    for bits in (8, 6, 4, 3, 2):
        w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), dtype=torch.int8)
        a = torch.randint(-8, 8, (m, k), dtype=torch.int8)
        one, zero = torch.ones(m, 1), torch.randint(-2, 2, (n, 1), dtype=torch.int8)
        exact = a.double() @ (w.double() - zero.double()).T
        args = (a, one, None, None, pack(w, bits), bits, torch.ones(n, 1), zero, None, None, None, torch.float32)
        moved = tuple(t.to(CUDA) if isinstance(t, Tensor) else t for t in args)
        y = int8_linear(*moved)
        yield f"sums of {bits}-bit products", torch.equal(y.cpu().double(), exact)
        yield f"{bits} bits, three runs", all(torch.equal(y, int8_linear(*moved)) for _ in range(3))
    bad = x.clone()
    bad[5, 7] = float("nan")
    scale = quantize_rows(bad.to(CUDA), None, None, 0, 8, True, 1, None)[1].cpu()[:, 0]
    yield "only the row with NaN is marked", scale.isnan().nonzero().flatten().tolist() == [5]


# ------------------------------------------------------------------------------------------------ products


def product_rows(found: dict[str, float], clock: Clock) -> Iterator[Row]:
    """Products alone, their inputs quantized already. ``relative_error`` stays empty: the integers are equal."""
    from ditq.engines.triton.linear import int8_linear

    for p in products():
        shape = f"{p.m} x {p.k} x {p.n}"

        def ours(bits: int, p: Any = p) -> tuple[Any, ...]:
            w = torch.randint(0, 256, (p.n, p.k * bits // 8), device=CUDA, dtype=torch.uint8)
            x_scale, w_scale = torch.rand(p.m, 1, device=CUDA), torch.rand(p.n, 1, device=CUDA)
            sums = torch.zeros(p.m, 1, device=CUDA, dtype=torch.int32)
            bias = torch.randn(p.n, device=CUDA, dtype=HALF)
            return codes(p.m, p.k), x_scale, None, sums, w, bits, w_scale, None, bias, None, None, HALF

        def floats(p: Any = p) -> tuple[Any, ...]:
            return torch.randn(p.m, p.k, device=CUDA, dtype=HALF), torch.randn(p.n, p.k, device=CUDA, dtype=HALF)

        def eights(p: Any = p) -> tuple[Any, ...]:
            return tuple(t.to(torch.float8_e4m3fn) for t in floats(p))

        one, two = torch.ones(p.m, 1, device=CUDA), torch.ones(1, p.n, device=CUDA)
        cases: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Any, ...]], str]] = {
            "bf16": (F.linear, floats, "bf16"),
            "torch._int_mm": (
                lambda x, w: torch._int_mm(x, w.t()),
                lambda p=p: (codes(p.m, p.k), codes(p.n, p.k)),
                "int8",
            ),
            "fp8 torch._scaled_mm": (lambda x, w, a=one, b=two: scaled_mm(x, w, a, b, HALF), eights, "fp8"),
            "ditq W8A8": (int8_linear, lambda: ours(8), "int8"),
            "ditq W4A8": (int8_linear, lambda: ours(4), "int8"),
        }
        for name, (call, arguments, kind) in cases.items():
            ceiling = found.get(f"{kind}_operations_per_s")
            if ceiling is None or clock.left() < 0:
                yield Row(f"{shape} {name}", NO_TIME if ceiling else f"this card has no {kind}")
                continue
            times = timed(call, argument_sets(arguments))
            yield with_share(row(f"{shape} {name}", times), p.operations / (1e-3 * times.median) / ceiling)


CEILING = ("ceiling",)


def with_share(row: Row, share: float) -> Row:
    """Adds the share of the ceiling that was reached."""
    row.ratios = dict.fromkeys(CEILING, share)
    return row


def save_shares(name: str, title: str, rows: list[Row], **fields: Any) -> None:
    """As ``save``, for rows that are compared with a ceiling and not with each other."""
    print(f"\n{title}\n{table(rows, CEILING)}")
    bars(RESULTS / f"{name}.png", title, rows)
    data = {**where(), "title": title, "baselines": list(CEILING), **fields, "rows": [asdict(r) for r in rows]}
    print("written to", write(name, data), flush=True)


# ----------------------------------------------------------------------------------------------- quantizers


def quantizer_rows(found: dict[str, float], clock: Clock) -> Iterator[Row]:
    """The fused quantizers, in shares of the speed of a copy: 3 bytes per element, read and written."""
    from ditq.engines.triton.activation import activation_quantize
    from ditq.engines.triton.norm import norm_quantize
    from ditq.engines.triton.quantize import quantize_rows
    from ditq.engines.triton.rows import scaled_signs

    for m, d, inner in widths():
        for block in (0, 128):

            def target(k: int, block: int = block) -> tuple[Any, ...]:
                signs = scaled_signs(Rotation(k, block, 0), CUDA) if block else None
                return None, signs, block, 8, True, 1, None

            def normed(m: int = m, d: int = d) -> tuple[Any, ...]:
                x, wide = torch.randn(m, d, device=CUDA, dtype=HALF), torch.randn(2, 6 * d, device=CUDA, dtype=HALF)
                return x, True, 1e-6, None, None, wide[:, :d], wide[:, d : 2 * d], *target(d)

            def plain(m: int = m, d: int = d) -> tuple[Any, ...]:
                return torch.randn(m, d, device=CUDA, dtype=HALF), *target(d)

            def gelu(m: int = m, inner: int = inner) -> tuple[Any, ...]:
                return torch.randn(m, inner, device=CUDA, dtype=HALF), "gelu_tanh", "", *target(inner)

            suffix = f" rotated by H{block}" if block else ""
            for name, call, arguments, width in (
                ("LayerNorm, modulation", norm_quantize, normed, d),
                ("plain", quantize_rows, plain, d),
                ("GELU", activation_quantize, gelu, inner),
            ):
                label = f"{m} x {width} {name}{suffix}"
                if clock.left() < 0:
                    yield Row(label, NO_TIME)
                    continue
                times = timed(call, argument_sets(arguments))
                yield with_share(row(label, times), 3 * m * width / (1e-3 * times.median) / found["copy_bytes_per_s"])


# --------------------------------------------------------------------------------------------- transformers

BLOCKS = "transformer_blocks"


def recipe(model: nn.Module, name: str, *overrides: str) -> nn.Module:
    ditq.quantize(model, name, overrides=overrides)
    return model


VARIANTS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "bf16": (lambda model: model, False),
    "bf16 compiled": (lambda model: model, True),
    "torchao int8 compiled": (lambda model: torchao_int8(model, BLOCKS), True),
    "fp8 row-wise compiled": (lambda model: replaced(model, Float8Linear, BLOCKS), True),
    "torch._int_mm compiled": (lambda model: replaced(model, Int8Linear, BLOCKS), True),
    "ditq W8A8": (lambda model: recipe(model, "rtn-w8a8"), False),
    "ditq W8A8 compiled": (lambda model: recipe(model, "rtn-w8a8"), True),
    "ditq W8A8 rotated by H128": (lambda model: recipe(model, "quarot-w8a8", "balance.block=128"), False),
    "ditq W4A8": (lambda model: recipe(model, "rtn-w4a8"), False),
    "ditq W4A8 compiled": (lambda model: recipe(model, "rtn-w4a8"), True),
    "ditq W4A8 groups of 128 compiled": (
        lambda model: recipe(model, "rtn-w4a8", "weights.granularity=group", "weights.group_size=128"),
        True,
    ),
}
BASELINES = ("bf16", "bf16 compiled", "torchao int8 compiled", "fp8 row-wise compiled")


def transformer_rows(name: str, side: int, batch: int, clock: Clock) -> Iterator[Row]:
    """One call of a whole transformer of random weights; the error is against bf16."""
    case = make(name, MODELS[name][2], side, batch, calls=0)
    call = {
        k: v.to(CUDA, HALF if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
        for k, v in case.call.items()
    }
    base = case.model.to(HALF)
    reference: Tensor | None = None
    for variant, (build, compiled) in VARIANTS.items():
        if clock.left() < 30:
            yield Row(variant, NO_TIME)
            continue
        torch._dynamo.reset()
        try:
            model = build(copy.deepcopy(base).to(CUDA))
            if compiled:
                for block in model.get_submodule(BLOCKS):
                    block.compile()
            torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                y = model(**call, return_dict=False)[0].float()
                times = timed(lambda model=model: model(**call, return_dict=False), [()], runs=10, warmup=2)
        except (ImportError, RuntimeError, ditq.errors.DitqError) as error:
            yield Row(variant, str(error).strip().splitlines()[0][:100])
            continue
        reference = y if reference is None else reference
        yield row(
            variant, times, peak_bytes=torch.cuda.max_memory_allocated(), weights_bytes=torch_bytes(model),
            relative_error=float((y - reference).norm() / reference.norm()),
        )  # fmt: skip
        del model
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------- main


def refuse_without_a_card() -> None:
    """Raises SystemExit with the reason where the engine cannot run."""
    reason = ENGINE.why_unavailable()
    if reason is None:
        fmt = ditq.plan.TensorFormat(bits=8, granularity="channel")
        reason = ENGINE.why_unsupported(fmt, None, CUDA)
    if reason is not None:
        raise SystemExit(f"This benchmark measures the Triton engine, which cannot run here: {reason}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    refuse_without_a_card()
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    clock = Clock(args.minutes - 0.3)
    results = dict(checks())
    for name, passed in results.items():
        print(f"{'ok' if passed else 'WRONG':6} {name}")
    if not all(results.values()):
        raise SystemExit("The kernels are wrong on this card; nothing was timed.")
    found = ceilings()
    for name, value in found.items():
        print(f"{name:24} {value / 1e12:8.2f} T")
    fields = {"ceilings": found, "arguments": vars(args), "checks": results}
    rows = list(transformer_rows("pixart-sigma", 128, 2, clock))
    save("gpu_pixart-sigma", "PixArt-Sigma 1024, one call, 2 x 4096 tokens", rows, BASELINES, **fields)
    rows = list(product_rows(found, clock))
    save_shares("gpu_products", "Products M x K x N, share of the ceiling", rows, **fields)
    rows = list(quantizer_rows(found, clock))
    save_shares("gpu_quantizers", "Quantizers, share of the speed of a copy", rows, **fields)
    rows = list(transformer_rows("dit-xl", 32, 16, clock))
    save("gpu_dit-xl", "DiT-XL/2 256, one call, 16 x 256 tokens", rows, BASELINES, **fields)


if __name__ == "__main__":
    main()
