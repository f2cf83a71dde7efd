"""Every recipe on a bundled model: closeness to the 16-bit pictures of the same prompts and seeds.

``python benchmarks/quality/text_to_image.py`` quantizes ``bundled:emoji-t2i`` by all recipes, draws 64
held-out prompts with each, does the same on an imbalanced copy of the model (synthetic, see
``imbalanced.py``), prints two tables with 95 % bootstrap intervals and writes
``benchmarks/results/text_to_image.json`` and a sheet of pictures.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from environment import RESULTS, environment, write
from imbalanced import OUTLIERS, make_imbalanced

import ditq
from ditq import api, architectures
from ditq import recipe as recipes
from ditq.calibration import calibrate
from ditq.comparison import compare
from ditq.metrics import paired_difference
from ditq.plan import Plan
from ditq.recipe import Calibration
from ditq.report.sheet import sheet
from ditq.sampling import Samples, sample

WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")
TEASER = ("16 bit", "rtn-w4a8", "viditq-w4a8", "viditq-w8a8")
METHODS = ("rtn-static", "rtn", "smoothquant", "quarot", "viditq")
# The 4-bit ViDiT-Q recipes search the weights' range; these rows tell apart what that and the balancing give.
VARIANTS = {f"{method}-{width} clip={clip}": (f"{method}-{width}", [f"clip={clip}"])
            for width in ("w4a8", "w4a4") for method, clip in (("rtn", "mse"), ("viditq", "minmax"))}  # fmt: skip


def load(args: argparse.Namespace, imbalanced: bool) -> Any:
    pipe = api.load(args.model)
    if imbalanced:
        make_imbalanced(pipe.transformer, architectures.match(pipe.transformer), args.seed, args.outliers)
    return pipe


def incoherence_by_role(plan: Plan) -> dict[str, dict[str, float]]:
    """Mean incoherence of weights and inputs over the layers of a role, before and after balancing."""
    out: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(layer.role for layer in plan.quantized):
        found = [x.incoherence.model_dump() for x in plan.quantized if x.role == role and x.incoherence]
        keys = [key for key in found[0] if found[0][key] is not None]
        out[role] = {key: sum(f[key] for f in found) / len(found) for key in keys}
    return out


def run(args: argparse.Namespace, imbalanced: bool) -> tuple[dict[str, Any], list[tuple[str, list[Any]]], list[str]]:
    title = "imbalanced copy (synthetic)" if imbalanced else args.model
    pipe = load(args, imbalanced)
    arch = architectures.match(pipe.transformer)
    name = args.model.removeprefix("bundled:")
    import ditq_bundled

    wanted = ditq_bundled.prompts(name, "evaluation")[: args.prompts]
    statistics = calibrate(pipe, arch, ditq_bundled.prompts(name, "calibration"), Calibration(), seed=args.seed)
    options = {"seed": args.seed, "steps": args.steps, "batch_size": args.batch_size}
    reference: Samples = sample(pipe, arch, wanted, **options)
    print(f"\n{title}: {len(wanted)} held-out prompts, {args.steps} steps, seed {args.seed}")
    print(f"{'recipe':24} {'PSNR dB':>22} {'SSIM':>25} {'latent SQNR dB':>22} {'bits':>5} {'size':>5} {'s':>4}")
    values: dict[str, dict[str, list[float]]] = {}
    rows: dict[str, Any] = {}
    pictures = [("16 bit", reference.images)]
    for width in args.widths:
        named = {f"{method}-{width}": (f"{method}-{width}", list[str]()) for method in args.methods}
        named |= {k: v for k, v in VARIANTS.items() if v[0] in named}
        for recipe, (base, overrides) in named.items():
            begin = time.perf_counter()
            pipe = load(args, imbalanced)
            plan = ditq.quantize(pipe, base, overrides=overrides, statistics=statistics, seed=args.seed).plan
            other = sample(pipe, arch, wanted, **options)
            comparison = compare(reference, other, **{k: v for k, v in options.items() if k != "batch_size"})
            seconds = time.perf_counter() - begin
            values[recipe] = comparison.values
            pictures.append((recipe, other.images))
            planned, full = plan.memory()
            balances: dict[str, int] = {}
            for layer in plan.quantized:
                words = [word for word, on in (("smooth", layer.smooth), ("rotate", layer.rotate)) if on]
                key = "+".join(words) or "none"
                balances[key] = balances.get(key, 0) + 1
            rows[recipe] = {
                **{k: v.model_dump() for k, v in comparison.metrics.items()},
                "average_bits": plan.average_bits,
                "nominal_bits": [plan.nominal_weight_bits, plan.nominal_activation_bits],
                "size_ratio": planned / full,
                "balance": balances,
                "incoherence": incoherence_by_role(plan),
                "kept_16bit": sorted({layer.role for layer in plan.kept}),
            }
            p, s, q = (comparison.metrics[k] for k in ("psnr_db", "ssim", "latent_sqnr_db"))
            print(
                f"{recipe:24} {p.mean:7.2f} [{p.ci95[0]:5.2f}, {p.ci95[1]:5.2f}] "
                f"{s.mean:7.4f} [{s.ci95[0]:.4f}, {s.ci95[1]:.4f}] "
                f"{q.mean:7.2f} [{q.ci95[0]:5.2f}, {q.ci95[1]:5.2f}] {plan.average_bits:5.2f} {planned / full:5.3f} "
                f"{seconds:4.0f}",
                flush=True,
            )
    print("\npaired differences in PSNR dB, viditq minus the other, mean [95 % interval]")
    differences: dict[str, Any] = {}
    for width in args.widths:
        for method in (m for m in args.methods if m != "viditq" and "viditq" in args.methods):
            d = paired_difference(values[f"viditq-{width}"]["psnr_db"], values[f"{method}-{width}"]["psnr_db"])
            differences[f"viditq-{width} - {method}-{width}"] = d.model_dump()
            print(f"  {width}  viditq - {method:12} {d.mean:+6.2f} [{d.ci95[0]:+.2f}, {d.ci95[1]:+.2f}]")
    shown = next((r for r in ("viditq-w4a8", *rows) if r in rows), None)
    if shown:
        print(f"\nincoherence before -> after balancing, {shown}, mean over the layers of a role")
        for role, v in rows[shown]["incoherence"].items():
            inputs = f"inputs {v['input_before']:.2f} -> {v['input_after']:.2f}" if "input_before" in v else ""
            print(f"  {role:16} weights {v['weight_before']:.2f} -> {v['weight_after']:.2f}  {inputs}")
    return {"title": title, "rows": rows, "paired_psnr_db": differences, "values": values}, pictures, wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-t2i")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--copy", choices=["both", "real", "imbalanced"], default="both")
    parser.add_argument("--outliers", choices=list(OUTLIERS), default="weights", help="of the imbalanced copy")
    parser.add_argument("--name", default="text_to_image", help="name of the result file")
    args = parser.parse_args()
    unknown = [f"{m}-{w}" for w in args.widths for m in args.methods if f"{m}-{w}" not in recipes.names()]
    if unknown:
        raise SystemExit(f"no such recipes: {unknown}")
    torch.manual_seed(args.seed)
    result: dict[str, Any] = {**environment(), "arguments": vars(args), "tables": []}
    for imbalanced in (False, True):
        if args.copy == ("real" if imbalanced else "imbalanced"):
            continue
        table, pictures, prompts = run(args, imbalanced)
        result["tables"].append(table)
        suffix = "-imbalanced" if imbalanced else ""
        shown = slice(0, 10)
        page = sheet([(label, images[shown]) for label, images in pictures], prompts[shown], zoom=1)
        RESULTS.mkdir(exist_ok=True)
        page.save(RESULTS / f"{args.name}{suffix}.png")
        rows = [(label, images[shown]) for label, images in pictures if label in TEASER]
        if not imbalanced and len(rows) == len(TEASER):
            sheet(sorted(rows, key=lambda row: TEASER.index(row[0])), zoom=1).save(RESULTS / f"{args.name}-teaser.png")
    print("\nwritten to", write(args.name, result))


if __name__ == "__main__":
    main()
