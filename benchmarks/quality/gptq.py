"""GPTQ against rounding to nearest: errors of single layers, errors of the whole model, and memory.

    python benchmarks/quality/gptq.py layers --model bundled:emoji-class
    python benchmarks/quality/gptq.py model --model bundled:emoji-class --bits 4a8 3a8
    python benchmarks/quality/gptq.py calls --model bundled:emoji-class
    python benchmarks/quality/gptq.py memory --blocks 28

* ``layers`` rounds every linear layer separately, on inputs of the 16-bit model. It reports the geometric mean over
  the layers of ||X (W - Q)^T|| / ||X W^T||, on the rows that GPTQ used and on rows of other prompts and seeds.
* ``model`` quantizes by recipes. It reports the SQNR of the transformer's output on calls of other prompts and seeds,
  at one random timestep of each prompt, with a 95 % bootstrap interval over these calls.
* ``calls`` does the same for one recipe and several numbers of kept calls.
* ``memory`` quantizes a DiT-XL/2 with random weights and reports the peak memory of the process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, write

import ditq
from ditq import api, architectures
from ditq.calibration import Statistics, calibrate
from ditq.numerics import Grid, Quantized, add_inputs, dequantize, gptq, inverse_factor, quantize, search_clip_ratio
from ditq.recipe import Calibration
from ditq.trace.calls import merged

FORMATS = {
    "W4 channel": Grid(bits=4, symmetric=False, granularity="channel"),
    "W4 g128": Grid(bits=4, symmetric=False, granularity="group", group_size=128),
    "W3 g128": Grid(bits=3, symmetric=False, granularity="group", group_size=128),
}
# Pairs that differ in one thing: rounding, range or order. A recipe (its -w4a8), and what is set in it.
NEAREST, GPTQ = ("rounding=nearest",), ("rounding=gptq",)
MINMAX, MSE, NATURAL, ACTIVATION = "clip=minmax", "clip=mse", "gptq.order=natural", "gptq.order=activation"
G32 = ("weights.group_size=32", "activations.group_size=32")
RECIPES: dict[str, tuple[str, ...]] = {
    "channels: nearest": ("gptq", *NEAREST, MINMAX),
    "channels: nearest, clip": ("gptq", *NEAREST, MSE),
    "channels: GPTQ, natural": ("gptq", *GPTQ, MINMAX, NATURAL),
    "channels: GPTQ, natural, clip": ("gptq", *GPTQ, MSE, NATURAL),
    "channels: GPTQ, activation": ("gptq", *GPTQ, MINMAX, ACTIVATION),
    "channels: GPTQ, activation, clip (gptq)": ("gptq",),
    "g128: nearest": ("qdit", *NEAREST),
    "g128: nearest, clip": ("qdit", *NEAREST, MSE),
    "g128: GPTQ, natural (qdit)": ("qdit",),
    "g128: GPTQ, activation, clip": ("qdit", MSE, ACTIVATION),
    "g32: nearest": ("qdit", *G32, *NEAREST),
    "g32: GPTQ, natural": ("qdit", *G32),
    "SmoothQuant: nearest": ("smoothquant",),
    "SmoothQuant: GPTQ, natural": ("smoothquant", *GPTQ),
    "QuaRot: nearest": ("quarot",),
    "QuaRot: GPTQ, natural": ("quarot", *GPTQ),
}


def statistics_of(name: str, split: str, seed: int, **settings: Any) -> tuple[Any, Statistics]:
    """The pipeline, and what calibration sees of it on one of the lists of prompts of a bundled model."""
    import ditq_bundled

    pipe = api.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts = ditq_bundled.prompts(name.removeprefix("bundled:"), split)
    calibration = Calibration(batch_size="auto", steps=20, **settings)
    return pipe, calibrate(pipe, architectures.match(pipe.transformer), prompts, calibration, seed=seed)


def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipe, seen = statistics_of(args.model, "calibration", args.seed, prompts=64, rows=args.rows, calls=0)
    _, other = statistics_of(args.model, "evaluation", args.seed + 1, prompts=64, rows=args.rows, calls=0)
    table = []
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for group in architectures.match(pipe.transformer).groups(pipe.transformer):
        x, held_out = seen.groups[group.name].rows(), other.groups[group.name].rows()
        hessian, unseen = (torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64) for _ in range(2))
        add_inputs(hessian, x)
        add_inputs(unseen, held_out)
        factors = {
            (order, damping): inverse_factor(hessian, damping, order)  # type: ignore[arg-type]
            for order, damping in (("natural", 0.01), ("activation", 0.01), ("natural", 0.1))
        }
        for linear in group.linears:
            w = linear.module.weight.detach().double()
            for title, fmt in FORMATS.items():
                for way, q in roundings(w, hessian, factors, fmt):
                    error = w - dequantize(q).double()
                    pair = tuple(
                        float((((error @ h) * error).sum() / ((w @ h) * w).sum()).sqrt()) for h in (hessian, unseen)
                    )
                    errors.setdefault((title, way), []).append(pair)  # type: ignore[arg-type]
    for (title, way), pairs in errors.items():
        mean = torch.tensor(pairs).log().mean(0).exp()
        table.append({"format": title, "rounding": way, "seen": float(mean[0]), "held out": float(mean[1])})
        print(f"{title:12} {way:34} seen {mean[0]:.4f}  held out {mean[1]:.4f}", flush=True)
    return table


def roundings(
    w: Tensor, hessian: Tensor, factors: dict[tuple[str, float], Tensor], grid: Grid
) -> Iterator[tuple[str, Quantized]]:
    yield "nearest", quantize(w, grid)
    yield "nearest, clip", quantize(w, grid, clip_ratio=search_clip_ratio(w, grid))
    for (order, damping), factor in factors.items():
        for clip in (False, True):
            name = f"GPTQ, {order}" + (", damping 0.1" if damping == 0.1 else "") + (", clip" if clip else "")
            yield name, gptq(w, hessian, grid, order=order, clip=clip, factor=factor).quantized  # type: ignore[arg-type]


def model(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipe, seen = statistics_of(args.model, "calibration", args.seed, prompts=64)
    compare = Compare(args, pipe)
    table = []
    for bits in args.bits:
        widths = [f"{tensor}.bits={n}" for tensor, n in zip(("weights", "activations"), bits.split("a"), strict=True)]
        for title, (recipe, *overrides) in RECIPES.items():
            found = compare(f"{recipe}-w4a8", [*widths, *overrides], seen, f"w{bits} {title}")
            table.append({"bits": f"w{bits}", "recipe": title, **found})
    return table


def calls(args: argparse.Namespace) -> list[dict[str, Any]]:
    pipe, seen = statistics_of(args.model, "calibration", args.seed, prompts=64, calls=16)
    compare, table = Compare(args, pipe), []
    for bits in args.bits:
        for each in (1, 2, 4, 8, 16):
            # The first of a prompt's calls in reservoir sampling are as random as the others.
            kept = [call for i, call in enumerate(seen.calls) if i % 16 < each]
            rows = {"bits": f"w{bits}", "calls a prompt": each, "calls": len(kept)}
            few = dataclasses.replace(seen, calls=kept)
            table.append({**rows, **compare(f"qdit-w{bits}", [], few, f"w{bits} {each:2} calls a prompt")})
    return table


class Compare:
    """Quantizes copies of one transformer, and compares their outputs with its own on calls it never saw."""

    def __init__(self, args: argparse.Namespace, pipe: Any) -> None:
        self.transformer = pipe.transformer
        _, other = statistics_of(args.model, "evaluation", args.seed + 1, prompts=128, calls=1)
        self.arch = architectures.match(pipe.transformer)
        # One call of each prompt: independent ones, which the interval takes them for.
        one = other.calls[:: len(other.calls) // 128]
        self.calls = merged(one, self.arch, any_time=True)
        self.exact = self.outputs(self.transformer)

    @torch.no_grad()
    def outputs(self, transformer: Any) -> Tensor:
        """[calls, conditions, ...], float64"""
        rows = torch.cat([transformer(**call, return_dict=False)[0] for call in self.calls])
        return rows.double().unflatten(0, (-1, len(self.arch.guidance.order)))

    def __call__(self, recipe: str, overrides: list[str], statistics: Statistics, title: str) -> dict[str, Any]:
        transformer = copy.deepcopy(self.transformer)
        begin = time.perf_counter()
        plan = ditq.quantize(transformer, recipe, statistics=statistics, overrides=overrides).plan
        seconds = time.perf_counter() - begin
        energies = [x.square().flatten(1).sum(1) for x in (self.exact, self.exact - self.outputs(transformer))]
        signal, noise = energies
        drawn = torch.randint(len(signal), (2000, len(signal)), generator=torch.Generator().manual_seed(0))
        draws = 10 * torch.log10(signal[drawn].sum(1) / noise[drawn].sum(1))
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
        sqnr = float(10 * torch.log10(signal.sum() / noise.sum()))
        print(f"{title:50} {sqnr:6.2f} dB [{low:.2f}, {high:.2f}]  {seconds:5.1f} s", flush=True)
        return {
            "sqnr_db": sqnr, "low": low, "high": high, "megabytes": plan.memory()[0] / 1e6, "seconds": seconds,
            "overrides": overrides,
        }  # fmt: skip


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    import diffusers

    torch.manual_seed(args.seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=args.blocks,
        sample_size=32, patch_size=2,
    ).eval()  # fmt: skip

    def some(m: Any) -> None:
        for time_ in torch.linspace(990, 10, args.calls).int().tolist():
            m(
                torch.randn(2, 4, 32, 32), timestep=torch.tensor([time_, time_]), class_labels=torch.tensor([3, 1000]),
                return_dict=False,
            )  # fmt: skip

    begin = time.perf_counter()
    plan = ditq.quantize(
        transformer, "qdit-w4a8", calibrate_with=some,
        progress=lambda stage, done, total: print(f"{stage} {done}/{total}, {peak():.2f} GiB", end="\r", flush=True),
    ).plan  # fmt: skip
    row = {
        "blocks": args.blocks, "parameters": sum(p.parameters for p in plan), "calls": args.calls,
        "peak_gib": peak(), "seconds": time.perf_counter() - begin, "rounded": sum(p.rounding == "gptq" for p in plan),
    }  # fmt: skip
    print(f"\n{row}")
    return [row]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model", "calls", "memory"])
    parser.add_argument("--model", default="bundled:emoji-class")
    parser.add_argument("--rows", type=int, default=8192, help="input rows a layer")
    parser.add_argument("--calls", type=int, default=4, help="of the transformer, for memory")
    parser.add_argument("--bits", nargs="+", default=["4a8"], help="as in the names of recipes: 4a8 3a8")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = {"layers": layers, "model": model, "calls": calls, "memory": memory}[args.what](args)
    print(write(f"gptq_{args.what}", {"settings": vars(args), "rows": table, "environment": environment()}))


if __name__ == "__main__":
    main()
