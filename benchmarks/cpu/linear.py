"""One linear layer on the CPU: ``QuantizedLinear`` against ``nn.Linear`` in the same run, interleaved.

``python benchmarks/cpu/linear.py`` prints a table and writes ``benchmarks/results/cpu_linear.json``. Times
include everything a layer does: activation quantization, integer product, epilogue, and for 4 bits
unpacking. The default shape is the up projection of a DiT-XL/2 block at 1024 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, write

from ditq.layers import QuantizedLinear
from ditq.plan import LayerPlan, Rotate, TensorFormat

TOKEN8 = TensorFormat(bits=8, granularity="token", dynamic=True)


def quantized(linear: nn.Linear, bits: int, rotate: bool = False) -> QuantizedLinear:
    k, n = linear.in_features, linear.out_features
    weight = TensorFormat(bits=bits, symmetric=False, granularity="channel")
    rotation = Rotate(block=128) if rotate else None
    plan = LayerPlan(
        name="linear", role="ffn.up", in_features=k, out_features=n, weight=weight, activation=TOKEN8, rotate=rotation
    )
    return QuantizedLinear.from_linear(linear, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 1152, 4608), metavar=("M", "K", "N"))
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    m, k, n = args.shape
    x, linear = torch.randn(m, k), nn.Linear(k, n)
    half = nn.Linear(k, n).to(torch.bfloat16)
    w8 = quantized(linear, 8)
    cases = {
        "nn.Linear bf16": (half, x.to(torch.bfloat16)),
        "nn.Linear fp32": (linear, x),
        "QuantizedLinear W8A8, bf16 in and out": (w8, x.to(torch.bfloat16)),
        "QuantizedLinear W8A8, fp32 in and out": (w8, x),
        "QuantizedLinear W4A8, fp32 in and out": (quantized(linear, 4), x),
        "QuantizedLinear W8A8, rotated by H128": (quantized(linear, 8, rotate=True), x),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for run in range(args.runs + 3):
            for name, (layer, inputs) in cases.items():
                begin = time.perf_counter()
                layer(inputs)
                if run >= 3:
                    times[name].append(1e3 * (time.perf_counter() - begin))
        exact = linear(x)
        error = float((w8(x) - exact).norm() / exact.norm())
    baseline = statistics.median(times["nn.Linear bf16"])
    rows = [
        {
            "name": name,
            "ms_median": statistics.median(t),
            "ms_min": min(t),
            "runs": len(t),
            "ratio_to_baseline": baseline / statistics.median(t),
            "ratio_to_fp32": statistics.median(times["nn.Linear fp32"]) / statistics.median(t),
            "peak_bytes": None,
        }
        for name, t in times.items()
    ]
    where = environment()
    print(f"M={m} K={k} N={n}; {where['cpu']}, {where['threads']} threads; W8A8 relative error {error:.4f}")
    print(f"{'':40} {'median ms':>10} {'min ms':>8} {'x bf16':>7} {'x fp32':>7}")
    for row in rows:
        print(
            f"{row['name']:40} {row['ms_median']:10.2f} {row['ms_min']:8.2f} {row['ratio_to_baseline']:7.2f} "
            f"{row['ratio_to_fp32']:7.2f}"
        )
    result = {**where, "engine": "torch", "seed": args.seed, "shape": [m, k, n], "relative_error": error, "rows": rows}
    print("written to", write("cpu_linear", result))


if __name__ == "__main__":
    main()
