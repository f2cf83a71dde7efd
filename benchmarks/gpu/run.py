"""Benchmarks the Triton engine on this GPU: first whether it is correct, then how fast it is, beside the alternatives.

``python benchmarks/gpu/run.py`` takes at most eight minutes. It prints tables and writes ``gpu_*.json`` and plots into
``--out``, and every row into ``gpu_rows.jsonl`` as soon as it is measured. Nothing is timed if a check fails. Rows of
stages that did not fit into the time say so.

``--dry-run`` runs the same program on a CPU, with tiny shapes, kernels in Triton's interpreter and reference
implementations for whole models. It tests the program; its times mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
from _checks import checks
from _measure import RESULTS, Row, bars, save, table, torch_bytes, where, write
from _rivals import Float8Linear, Int8Linear, replaced, scaled_mm, torchao_int8
from _shapes import products, widths
from _time import Clock, Times, argument_sets, timed
from _transformers import Whole, wholes

import ditq
from ditq import engines
from ditq.engines.triton import ENGINE
from ditq.numerics import Rotation

HALF = torch.bfloat16
NO_TIME = "no time left"
CEILING = ("ceiling",)


@dataclass
class Run:
    """One run of this program."""

    device: torch.device
    dry: bool
    clock: Clock
    folder: Path

    def note(self, stage: str, row: Row | dict[str, Any]) -> None:
        """Writes down a row at once: what comes later may not come."""
        entry = {"stage": stage, **(asdict(row) if isinstance(row, Row) else row)}
        with (self.folder / "gpu_rows.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def row(name: str, times: Times, **fields: Any) -> Row:
    return Row(
        name, ms_median=times.median, ms_min=times.smallest, spread=times.spread, runs=times.runs, **fields
    )  # fmt: skip


def why(error: Exception) -> str:
    """The last line of an error, which compilers write most into."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


# -------------------------------------------------------------------------------------------- ceilings


def ceilings(run: Run) -> dict[str, float]:
    """What this card reaches: bytes/s of a copy, operations/s of large products of random numbers."""
    count, size = (2**20, 64) if run.dry else (2**30, 8192)
    source, target = (torch.empty(count, dtype=torch.uint8, device=run.device) for _ in range(2))
    found = {"copy_bytes_per_s": 2 * count / (1e-3 * timed(target.copy_, [(source,)], 20).median)}
    del source, target
    a, b = (torch.randn(size, size, device=run.device, dtype=HALF) for _ in range(2))
    one = torch.ones(size, 1, device=run.device)
    kinds: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "bf16_operations_per_s": (F.linear, (a, b)),
        "int8_operations_per_s": (
            lambda x, w: torch._int_mm(x, w.t()),
            (codes(run, size, size), codes(run, size, size)),
        ),
    }
    if not run.dry and torch.cuda.get_device_capability() >= (8, 9):
        kinds["fp8_operations_per_s"] = (
            lambda x, w: scaled_mm(x, w, one, one.t(), HALF),
            (a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)),
        )
    for name, (call, arguments) in kinds.items():
        try:
            found[name] = 2 * size**3 / (1e-3 * timed(call, [arguments], 20).median)
        except RuntimeError as error:
            print(f"{name}: {why(error)}")
    return found


def codes(run: Run, rows: int, columns: int) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), device=run.device, dtype=torch.int8)


# ------------------------------------------------------------------------------------------------ products


def product_rows(run: Run, found: dict[str, float]) -> Iterator[Row]:
    """Products alone, their inputs quantized already. ``relative_error`` stays empty: the integers are equal."""
    from ditq.engines.triton.linear import launch

    for p in products():
        m, k, n = (40, 64, 48) if run.dry else p[:3]
        shape = f"{m} x {k} x {n}"

        def ours(
            bits: int, *, gated: bool = False, rank: int = 0, m: int = m, k: int = k, n: int = n
        ) -> tuple[Any, ...]:
            w = torch.randint(0, 256, (n, k * bits // 8), device=run.device, dtype=torch.uint8)
            x_scale, w_scale = torch.rand(m, 1, device=run.device), torch.rand(n, 1, device=run.device)
            sums = torch.zeros(m, 1, device=run.device, dtype=torch.int32)
            bias = torch.randn(n, device=run.device, dtype=HALF)
            gate = torch.randn(2, n, device=run.device, dtype=HALF) if gated else None
            residual = torch.randn(m, n, device=run.device, dtype=HALF) if gated else None
            low, up = (torch.randn(r, rank, device=run.device, dtype=HALF) if rank else None for r in (m, n))
            return (
                codes(run, m, k), x_scale, None, sums, w, bits, w_scale, None, bias, gate, residual, low, up, HALF
            )  # fmt: skip

        def floats(m: int = m, k: int = k, n: int = n) -> tuple[Any, ...]:
            return tuple(torch.randn(r, k, device=run.device, dtype=HALF) for r in (m, n))

        one, two = torch.ones(m, 1, device=run.device), torch.ones(1, n, device=run.device)
        cases: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Any, ...]], str]] = {
            "bf16": (F.linear, floats, "bf16"),
            "torch._int_mm": (
                lambda x, w: torch._int_mm(x, w.t()),
                lambda m=m, k=k, n=n: (codes(run, m, k), codes(run, n, k)),
                "int8",
            ),
            "fp8 torch._scaled_mm": (
                lambda x, w, a=one, b=two: scaled_mm(x, w, a, b, HALF),
                lambda floats=floats: tuple(t.to(torch.float8_e4m3fn) for t in floats()),
                "fp8",
            ),
            "ditq W8A8": (launch, lambda ours=ours: ours(8), "int8"),
            "ditq W8A8 gate residual": (launch, lambda ours=ours: ours(8, gated=True), "int8"),
            "ditq W4A8": (launch, lambda ours=ours: ours(4), "int8"),
            "ditq W4A8 rank 32": (launch, lambda ours=ours: ours(4, rank=32), "int8"),
        }
        for name, (call, arguments, kind) in cases.items():
            ceiling = found.get(f"{kind}_operations_per_s")
            if ceiling is None or run.clock.left() < 0:
                yield Row(f"{shape} {name}", NO_TIME if ceiling else f"this card has no {kind}")
                continue
            try:
                times = timed(call, argument_sets(arguments))
            except RuntimeError as error:
                yield Row(f"{shape} {name}", why(error))
                continue
            yield with_share(row(f"{shape} {name}", times), 2 * m * k * n / (1e-3 * times.median) / ceiling)
        if run.dry:
            return


def with_share(row: Row, share: float) -> Row:
    """Adds the share of the ceiling that was reached."""
    row.ratios = dict.fromkeys(CEILING, share)
    return row


def save_shares(run: Run, name: str, title: str, rows: list[Row], **fields: Any) -> None:
    """As ``save``, for rows that are compared with a ceiling and not with each other."""
    print(f"\n{title}\n{table(rows, CEILING)}")
    data = {**where(), "title": title, "baselines": list(CEILING), **fields, "rows": [asdict(r) for r in rows]}
    path = write(name, data, run.folder)
    bars(path.with_suffix(".png"), title, rows)
    print("written to", path, flush=True)


# ----------------------------------------------------------------------------------------------- quantizers


def quantizer_rows(run: Run, found: dict[str, float]) -> Iterator[Row]:
    """The fused quantizers, in shares of the speed of a copy: 3 bytes per element, read and written."""
    from ditq.engines.triton import activation, norm, quantize
    from ditq.engines.triton.rows import scaled_signs

    for m, d, inner in [(6, 128, 256)] if run.dry else widths():
        for block in (0, 128):

            def target(k: int, block: int = block) -> tuple[Any, ...]:
                signs = scaled_signs(Rotation(k, block, 0), run.device) if block else None
                return None, signs, block, 8, True, 1, None

            def normed(m: int = m, d: int = d, target: Any = target) -> tuple[Any, ...]:
                x, wide = (torch.randn(r, c, device=run.device, dtype=HALF) for r, c in ((m, d), (2, 6 * d)))
                return x, 1e-6, None, None, wide[:, :d], wide[:, d : 2 * d], *target(d)

            def plain(m: int = m, d: int = d, target: Any = target) -> tuple[Any, ...]:
                return torch.randn(m, d, device=run.device, dtype=HALF), *target(d)

            def gelu(m: int = m, k: int = inner, target: Any = target) -> tuple[Any, ...]:
                return torch.randn(m, k, device=run.device, dtype=HALF), "gelu_tanh", False, *target(k)

            suffix = f" rotated by H{block}" if block else ""
            for name, call, arguments, width in (
                ("LayerNorm, modulation", norm.launch, normed, d),
                ("plain", quantize.launch, plain, d),
                ("GELU", activation.launch, gelu, inner),
            ):
                label = f"{m} x {width} {name}{suffix}"
                if run.clock.left() < 0:
                    yield Row(label, NO_TIME)
                    continue
                try:
                    times = timed(call, argument_sets(arguments))
                except RuntimeError as error:
                    yield Row(label, why(error))
                    continue
                yield with_share(row(label, times), 3 * m * width / (1e-3 * times.median) / found["copy_bytes_per_s"])


# -------------------------------------------------------------------------------------------------- tiles


def tune(run: Run, minutes: float) -> None:
    """Tiles of the layers of the two transformers of the acceptance, into the cache that the engine reads."""
    from ditq.engines.triton.linear import launch
    from ditq.engines.triton.tiles import Tile, Work
    from ditq.engines.triton.tuning import tune

    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]

    def measure_one(product: tuple[int, int, int, int, Work], tile: Tile) -> tuple[Tensor, float]:
        m, n, k, bits, work = product
        torch.manual_seed(0)
        residual = torch.randn(m, n, device=run.device, dtype=HALF) if work == "more" and bits == 8 else None
        w = torch.randint(0, 256, (n, k * bits // 8), device=run.device, dtype=torch.uint8)
        scales = torch.rand(m, 1, device=run.device), torch.rand(n, 1, device=run.device)
        sums = torch.zeros(m, 1, device=run.device, dtype=torch.int32)
        arguments = codes(run, m, k), scales[0], None, sums, w, bits, scales[1], None, None, None, residual, None, None
        y = launch(*arguments, HALF, tile=tile)
        return y, timed(lambda *a: launch(*a, HALF, tile=tile), [arguments], 20).median

    kinds: list[tuple[int, Work]] = [(8, "plain"), (8, "more"), (4, "more")]
    shapes = [(m, n, k) for m in (8192, 32768) for n, k in ((1152, 1152), (4608, 1152), (1152, 4608))]
    clock = Clock(minutes)
    found = tune(
        [(*shape, *kind) for kind in kinds for shape in shapes], capability, measure_one, lambda: clock.left() < 0
    )  # fmt: skip
    for name, tile in found.items():
        print(f"{name}: {tile}")
        run.note("tiles", {"product": name, "tile": tile})


# --------------------------------------------------------------------------------------------- transformers


@dataclass(frozen=True)
class Variant:
    """How a transformer is executed.

    Attributes:
        build: changes a copy of the 16-bit model.
        how: "eager", "compiled", or "graph": eager, recorded once and replayed.
        fused: whether ditq's layers wait for what follows them.
        brief: measured for every model, and not for the first two only.
    """

    build: Callable[[nn.Module, Whole], nn.Module]
    how: str = "eager"
    fused: bool = True
    brief: bool = False


def recipe(name: str, *overrides: str) -> Callable[[nn.Module, Whole], nn.Module]:
    def build(model: nn.Module, whole: Whole) -> nn.Module:
        ditq.quantize(model, name, overrides=overrides)
        return model

    return build


def rival(kind: type[nn.Module]) -> Callable[[nn.Module, Whole], nn.Module]:
    return lambda model, whole: replaced(model, kind, whole.blocks)


W8, W4 = recipe("rtn-w8a8"), recipe("rtn-w4a8")
GROUPS = ("weights.granularity=group", "weights.group_size=128")
VARIANTS: dict[str, Variant] = {
    "bf16": Variant(lambda model, whole: model, brief=True),
    "bf16 compiled": Variant(lambda model, whole: model, "compiled", brief=True),
    "ditq W8A8": Variant(W8, brief=True),
    "ditq W8A8 compiled": Variant(W8, "compiled", brief=True),
    "ditq W8A8 graph": Variant(W8, "graph", brief=True),
    "ditq W4A8": Variant(W4, brief=True),
    "torchao int8 compiled": Variant(lambda model, whole: torchao_int8(model, whole.blocks), "compiled"),
    "fp8 row-wise compiled": Variant(rival(Float8Linear), "compiled"),
    "torch._int_mm compiled": Variant(rival(Int8Linear), "compiled"),
    "ditq W8A8 not fused": Variant(W8, fused=False),
    "ditq W8A8 rotated by H128": Variant(recipe("quarot-w8a8", "balance.block=128")),
    "ditq W4A8 compiled": Variant(W4, "compiled"),
    "ditq W4A8 groups of 128": Variant(recipe("rtn-w4a8", *GROUPS)),
    "bf16 graph": Variant(lambda model, whole: model, "graph"),
}
BASELINES = ("bf16", "bf16 compiled", "torchao int8 compiled", "fp8 row-wise compiled")


def transformer_rows(run: Run, whole: Whole, *, brief: bool, blocks: int | None = None) -> Iterator[Row]:
    """One call of a whole transformer of random weights; the error is against bf16."""
    call = whole.call(run.device, HALF, run.dry)
    base = whole.build(run.device, HALF, run.dry, blocks)
    reference: Tensor | None = None
    for name, variant in VARIANTS.items():
        if brief and not variant.brief:
            continue
        if run.clock.left() < (0 if variant.how == "eager" else 25):
            yield Row(name, NO_TIME)
            continue
        torch._dynamo.reset()
        model = None
        try:
            model = variant.build(copy.deepcopy(base), whole)
            with torch.no_grad(), engines.fusion(variant.fused):
                y, times = measured(run, model, whole, call, variant.how)
        except (ImportError, RuntimeError, ditq.errors.DitqError, torch._dynamo.exc.TorchDynamoException) as error:
            (run.folder / "gpu_errors.txt").open("a").write(f"{whole.title} {name}\n{traceback.format_exc()}\n")
            yield Row(name, why(error))
        else:
            reference = y if reference is None else reference
            yield row(
                name, times, weights_bytes=torch_bytes(model),
                peak_bytes=None if run.dry else torch.cuda.max_memory_allocated() - torch_bytes(base),
                relative_error=float((y - reference).norm() / reference.norm()),
            )  # fmt: skip
        del model
        gc.collect()
        torch.cuda.empty_cache()


def measured(run: Run, model: nn.Module, whole: Whole, call: dict[str, Any], how: str) -> tuple[Tensor, Times]:
    """The output of a call in float32, and its times."""
    if how == "compiled":
        for stack in whole.blocks:
            for block in model.get_submodule(stack):
                block.compile(backend="aot_eager" if run.dry else "inductor")

    def once() -> Tensor:
        return model(**call, return_dict=False)[0]

    if not run.dry:
        torch.cuda.reset_peak_memory_stats()
    y = once().float()
    if how == "graph" and not run.dry:
        for _ in range(2):
            once()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = once()
        graph.replay()
        torch.cuda.synchronize()
        return out.float(), timed(graph.replay, [()], runs=10, warmup=2)
    return y, timed(once, [()], runs=10, warmup=2)


# ---------------------------------------------------------------------------------------------- acceptance


def verdicts(
    step: dict[str, list[Row]], shares: list[Row], speeds: list[Row]
) -> Iterator[tuple[str, float | None, float]]:
    """What was to be reached, what was, and the least that is enough."""
    for title, rows in step.items():
        ms = {r.name: r.ms_median for r in rows if r.ms_median}
        best = min((t for name, t in ms.items() if name.startswith("ditq W8A8") and "H128" not in name), default=None)
        four = min((t for name, t in ms.items() if name.startswith("ditq W4A8")), default=None)
        for baseline, least in (
            ("bf16", 1.7), ("bf16 compiled", 1.3), ("torchao int8 compiled", 1.0), ("fp8 row-wise compiled", 1.0),
        ):  # fmt: skip
            yield f"{title}: W8A8 against {baseline}", ms[baseline] / best if best and baseline in ms else None, least
        yield f"{title}: W4A8 against bf16", ms["bf16"] / four if four and "bf16" in ms else None, 1.4
        plain, turned = ms.get("ditq W8A8"), ms.get("ditq W8A8 rotated by H128")
        yield f"{title}: W8A8 over W8A8 rotated", plain / turned if plain and turned else None, 1 / 1.06
        fused, compiled = ms.get("ditq W8A8"), ms.get("ditq W8A8 compiled")
        yield f"{title}: compiled over eager fused (1.05: keep the fused one)", (
            compiled / fused if fused and compiled else None
        ), 1.05  # fmt: skip
    large = [r.ratios["ceiling"] for r in shares if r.name.endswith("ditq W8A8") and r.ratios and rows_of(r) >= 4096]
    yield "W8A8 products from 4096 rows on, least share of the fastest int8 product", min(large, default=None), 0.7
    done = [r.ratios["ceiling"] for r in speeds if r.ratios]
    yield "quantizers, least share of the speed of a copy", min(done, default=None), 0.8


def rows_of(row: Row) -> int:
    return int(row.name.split(" x ")[0])


# ---------------------------------------------------------------------------------------------------- main


def refuse_without_a_card() -> None:
    """Raises SystemExit with the reason where the engine cannot run."""
    reason = ENGINE.why_unavailable()
    if reason is None:
        fmt = ditq.plan.Grid(bits=8, granularity="channel")
        reason = ENGINE.why_unsupported(fmt, None, torch.device("cuda"))
    if reason is not None:
        raise SystemExit(f"This benchmark measures the Triton engine, which cannot run here: {reason}.")


def pretend() -> AbstractContextManager[Any]:
    """In a dry run the engine takes a CPU: its operations have references for it."""
    kind: Any = type(ENGINE)
    kind.why_unavailable = lambda self: None
    kind.why_unsupported = lambda self, weight, activation, device: None
    return engines.use_engine("triton")


def kept(run: Run, stage: str, rows: Iterable[Row]) -> list[Row]:
    """The rows, each written down and shown when it comes."""
    out = []
    for r in rows:
        run.note(stage, r)
        shown = r.status if r.ms_median is None else f"{r.ms_median:.4g} ms"
        print(f"  {run.clock.left():5.0f} s left  {stage}: {r.name}: {shown}", flush=True)
        out.append(r)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="*", help=f"transformers to measure, of {', '.join(wholes())}")
    parser.add_argument("--tune", type=float, default=0, help="minutes, of these, to look for faster tiles first")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU with tiny shapes; times mean nothing")
    args = parser.parse_args()
    if not args.dry_run:
        refuse_without_a_card()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.dry_run else "cuda")
    run = Run(device, args.dry_run, Clock(args.minutes - 0.3), args.out)
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    with pretend() if run.dry else nullcontext():
        measure(run, {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})


def measure(run: Run, arguments: dict[str, Any]) -> None:
    results = {}
    for name, passed in checks(run.device):
        results[name] = passed
        print(f"{'ok' if passed else 'WRONG':6} {name}", flush=True)
        run.note("check", {"name": name, "passed": passed})
    if not all(results.values()):
        raise SystemExit("The kernels are wrong on this card; nothing was timed.")
    if arguments["tune"] and not run.dry:
        tune(run, arguments["tune"])
    found = ceilings(run)
    run.note("ceilings", found)
    for name, value in found.items():
        print(f"{name:24} {value / 1e12:8.2f} T")
    fields = {"ceilings": found, "arguments": arguments, "checks": results}
    steps: dict[str, list[Row]] = {}
    only = arguments["only"] or list(wholes())

    def transformers(names: list[str], brief: bool) -> None:
        for name in names:
            whole = wholes()[name]
            _, depth, measured_ = whole.depth
            title = f"{whole.title}, one call" + ("" if measured_ == depth else f", {measured_} of {depth} blocks")
            rows = kept(run, name, transformer_rows(run, whole, brief=brief))
            save(f"gpu_{name}", title, rows, BASELINES, run.folder, **fields)
            if not brief:
                steps[whole.title] = rows

    transformers([name for name in only if name in ("pixart",)], brief=False)
    shares = kept(run, "products", product_rows(run, found))
    save_shares(run, "gpu_products", "Products M x K x N, share of the ceiling", shares, **fields)
    speeds = kept(run, "quantizers", quantizer_rows(run, found))
    save_shares(run, "gpu_quantizers", "Quantizers, share of the speed of a copy", speeds, **fields)
    transformers([name for name in only if name in ("stdit",)], brief=False)
    if "pixart" in only:
        block = kept(run, "block", transformer_rows(run, wholes()["pixart"], brief=True, blocks=1))
        save("gpu_block", "PixArt-Sigma 1024 with one block, one call", block, BASELINES, run.folder, **fields)
    transformers([name for name in only if name not in ("pixart", "stdit")], brief=True)
    print()
    lines = []
    for text, value, least in verdicts(steps, shares, speeds):
        state = "not measured" if value is None else f"{value:.2f}, {'reached' if value >= least else 'NOT reached'}"
        lines.append({"what": text, "value": value, "enough": least})
        print(f"{text}: {state} (enough: {least:.2f})")
    print("written to", write("gpu_acceptance", {**where(), **fields, "lines": lines}, run.folder))


if __name__ == "__main__":
    main()
