"""GPTQ beside rounding to nearest: errors of single layers, errors of the whole model, and memory.

    python benchmarks/quality/gptq.py layers --model bundled:emoji-class
    python benchmarks/quality/gptq.py model --model bundled:emoji-class
    python benchmarks/quality/gptq.py memory --blocks 28

``layers`` rounds every linear by itself, on inputs of the 16-bit model, and gives the geometric mean over the
layers of ||X (W - Q)^T|| / ||X W^T|| on the rows that GPTQ saw and on rows of other prompts and seeds.
``model`` quantizes by recipes and gives the SQNR of the transformer's output on calls of other prompts and
seeds. ``memory`` quantizes a DiT-XL/2 with random weights and gives the peak of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditq
from ditq import api, architectures
from ditq.calibration import Statistics, calibrate
from ditq.calibration.calls import merged
from ditq.numerics import Quantized, add_inputs, dequantize, gptq, quantize, search_clip_ratio, sqnr_db
from ditq.recipe import Calibration

FORMATS: dict[str, dict[str, Any]] = {
    "W4 channel": {"bits": 4, "granularity": "row"},
    "W4 g128": {"bits": 4, "granularity": "group", "group_size": 128},
    "W3 g128": {"bits": 3, "granularity": "group", "group_size": 128},
}
RECIPES: dict[str, tuple[str, ...]] = {
    "rtn, channels": ("rtn-w{bits}",),
    "GPTQ, channels": ("gptq-w{bits}",),
    "rtn, g128": ("qdit-w{bits}", "rounding=nearest"),
    "Q-DiT without search (GPTQ, g128)": ("qdit-w{bits}",),
    "rtn, g32": ("qdit-w{bits}", "rounding=nearest", "weights.group_size=32", "activations.group_size=32"),
    "Q-DiT without search (GPTQ, g32)": ("qdit-w{bits}", "weights.group_size=32", "activations.group_size=32"),
    "SmoothQuant": ("smoothquant-w{bits}",),
    "SmoothQuant + GPTQ": ("smoothquant-w{bits}", "rounding=gptq"),
    "QuaRot": ("quarot-w{bits}",),
    "QuaRot + GPTQ": ("quarot-w{bits}", "rounding=gptq"),
}


def statistics_of(name: str, split: str, settings: Calibration, seed: int) -> tuple[Any, Statistics]:
    """The pipeline, and what calibration sees of it on one of the lists of prompts of a bundled model."""
    import ditq_bundled

    pipe = api.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts = ditq_bundled.prompts(name.removeprefix("bundled:"), split)
    return pipe, calibrate(pipe, architectures.match(pipe.transformer), prompts, settings, seed=seed)


def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = Calibration(prompts=64, batch_size=16, steps=20, rows=args.rows)
    pipe, seen = statistics_of(args.model, "calibration", settings, args.seed)
    _, other = statistics_of(args.model, "evaluation", settings, args.seed + 1)
    groups = architectures.match(pipe.transformer).groups(pipe.transformer)
    table = []
    for title, fmt in FORMATS.items():
        errors: dict[str, list[tuple[float, float]]] = {}
        for group in groups:
            x, held_out = seen.groups[group.name].rows(), other.groups[group.name].rows()
            hessian = torch.zeros(x.shape[1], x.shape[1])
            add_inputs(hessian, x)
            for linear in group.linears:
                w = linear.module.weight.detach().float()
                for way, q in roundings(w, hessian, fmt):
                    error = w - dequantize(q, fmt["granularity"], fmt.get("group_size"))
                    pair = tuple(float((s @ error.T).norm() / (s @ w.T).norm()) for s in (x, held_out))
                    errors.setdefault(way, []).append(pair)  # type: ignore[arg-type]
        for way, pairs in errors.items():
            mean = torch.tensor(pairs).log().mean(0).exp()
            table.append({"format": title, "rounding": way, "seen": float(mean[0]), "held out": float(mean[1])})
            print(f"{title:12} {way:34} seen {mean[0]:.4f}  held out {mean[1]:.4f}", flush=True)
    return table


def roundings(w: Tensor, hessian: Tensor, fmt: dict[str, Any]) -> Iterator[tuple[str, Quantized]]:
    kind = {"symmetric": False, **fmt}
    yield "nearest", quantize(w, **kind)
    yield "nearest, clip ratio searched", quantize(w, **kind, clip_ratio=search_clip_ratio(w, **kind))
    for order in ("natural", "activation"):
        yield f"GPTQ, {order}", gptq(w, hessian, **kind, order=order)  # type: ignore[arg-type]
        yield f"GPTQ, {order}, clip ratio searched", gptq(w, hessian, **kind, order=order, clip=True)  # type: ignore[arg-type]


def model(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = Calibration(prompts=64, batch_size=16, steps=20, rows=2048, calls=args.calls)
    pipe, seen = statistics_of(args.model, "calibration", settings, args.seed)
    _, other = statistics_of(args.model, "evaluation", settings, args.seed + 1)
    calls = merged(other.calls[::2], architectures.match(pipe.transformer))
    exact = outputs(pipe.transformer, calls)
    table = []
    for bits in args.bits:
        for title, (recipe, *overrides) in RECIPES.items():
            begin = time.perf_counter()
            transformer = copy.deepcopy(pipe.transformer)
            plan = ditq.quantize(transformer, recipe.format(bits=bits), statistics=seen, overrides=overrides).plan
            row = {
                "bits": f"w{bits}", "recipe": title, "sqnr_db": sqnr_db(exact, outputs(transformer, calls)),
                "megabytes": plan.memory()[0] / 1e6, "seconds": time.perf_counter() - begin,
            }  # fmt: skip
            table.append(row)
            print(f"{row['bits']:6} {title:36} {row['sqnr_db']:6.2f} dB  {row['seconds']:5.1f} s", flush=True)
    return table


@torch.no_grad()
def outputs(transformer: Any, calls: list[dict[str, Any]]) -> Tensor:
    return torch.cat([transformer(**call, return_dict=False)[0] for call in calls])


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    import diffusers

    torch.manual_seed(args.seed)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=args.blocks,
        sample_size=32, patch_size=2,
    ).eval()  # fmt: skip

    def calls(m: Any) -> None:
        for time_ in torch.linspace(990, 10, args.calls).int().tolist():
            m(
                torch.randn(2, 4, 32, 32), timestep=torch.tensor([time_, time_]), class_labels=torch.tensor([3, 1000]),
                return_dict=False,
            )  # fmt: skip

    begin = time.perf_counter()
    plan = ditq.quantize(
        transformer, "qdit-w4a8", calibrate_with=calls,
        progress=lambda stage, done, total: print(f"{stage} {done}/{total}, {peak():.2f} GiB", end="\r", flush=True),
    ).plan  # fmt: skip
    row = {
        "blocks": args.blocks, "parameters": sum(p.parameters for p in plan), "calls": args.calls,
        "peak_gib": peak(), "seconds": time.perf_counter() - begin, "rounded": sum(p.rounding == "gptq" for p in plan),
    }  # fmt: skip
    print("\n" + json.dumps(row))
    return [row]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "model", "memory"])
    parser.add_argument("--model", default="bundled:emoji-class")
    parser.add_argument("--rows", type=int, default=8192, help="input rows a layer")
    parser.add_argument("--calls", type=int, default=4, help="calls kept, of each prompt, or in all for memory")
    parser.add_argument("--bits", nargs="+", default=["4a8"], help="as in the names of recipes: 4a8 3a8")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = {"layers": layers, "model": model, "memory": memory}[args.what](args)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
