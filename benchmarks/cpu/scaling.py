"""How time grows with work on the CPU: a few blocks of DiT-XL width at several numbers of tokens and batch sizes.

``python benchmarks/cpu/scaling.py`` writes ``benchmarks/results/cpu_scaling.json`` and a line plot of milliseconds
against GFLOP on logarithmic axes, where time proportional to work is a straight line. ditq's models are compiled once
per image size for all batch sizes; OpenVINO's own models are compiled for each shape.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from _measure import RESULTS, interleaved, lines, relative_error, row, trim, where, write
from _models import make
from _variants import Case, Variant, build

NAMES = ("torch fp32", "torch bf16", "OpenVINO f32", "ditq W8A8, OpenVINO", "ditq W4A8, OpenVINO")
WIDTH = 1152


def gflop(tokens: int, batch: int, blocks: int) -> float:
    """Of the linears and the attention of the blocks: 24 S d^2 + 4 S^2 d for each sample and block."""
    return 1e-9 * blocks * batch * (24 * tokens * WIDTH**2 + 4 * tokens**2 * WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=(256, 576, 1024, 2304, 4096), help="square numbers")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="cpu_scaling", help="of the result files")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'tokens':>6} {'batch':>5} {'GFLOP':>7}  " + "  ".join(f"{name:>20}" for name in NAMES) + "   (ms)")
    for tokens in args.tokens:
        side = 2 * round(tokens**0.5)
        kept: dict[str, Variant] = {}
        for batch in args.batches:
            case = make("dit-xl", args.blocks, side, batch, 0, args.seed)
            variants = {name: kept.get(name) or variant_of(name, case) for name in NAMES}
            kept = {name: v for name, v in variants.items() if name.startswith("ditq")}
            reference = variants["torch fp32"].run(case.call)
            times = interleaved({n: lambda v=v, c=case: v.run(c.call) for n, v in variants.items()}, args.rounds)
            found = [
                row(name, values, relative_error=relative_error(reference, variants[name].run(case.call)))
                for name, values in times.items()
            ]
            work = gflop(tokens, batch, args.blocks)
            for r in found:
                r.ratio_to_baseline = found[0].ms_median / r.ms_median
                rows.append({"tokens": tokens, "batch": batch, "gflop": work, **asdict(r)})
            print(f"{tokens:6} {batch:5} {work:7.1f}  " + "  ".join(f"{r.ms_median:20.1f}" for r in found), flush=True)
            del variants, case
            trim()
    series = {name: [(r["gflop"], r["ms_median"]) for r in rows if r["name"] == name] for name in NAMES}
    print("\nmilliseconds per GFLOP, least and most over all shapes")
    for name, points in series.items():
        rates = [y / x for x, y in points]
        print(f"{name:24} {min(rates):6.2f} {max(rates):6.2f}")
    title = f"{args.blocks} blocks of DiT-XL width, {args.tokens[0]} to {args.tokens[-1]} tokens"
    result = {**where(), "title": title, "baselines": [NAMES[0]], "arguments": vars(args), "rows": rows}
    lines(RESULTS / f"{args.name}.png", title, ("GFLOP a call", "ms"), series)
    print("written to", write(args.name, result))


def variant_of(name: str, case: Case) -> Variant:
    variant, status, _ = build(name, case, announce=False)
    if variant is None:
        raise SystemExit(f"{name} {status}")
    return variant


if __name__ == "__main__":
    main()
