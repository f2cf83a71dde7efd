"""Every recipe on a bundled model: fidelity to the 16-bit images of the same prompts and seeds.

``python benchmarks/quality/text_to_image.py`` quantizes ``bundled:emoji-t2i`` by all recipes and generates 64 held-out
prompts with each. It repeats this on an imbalanced copy of the model (synthetic, see ``imbalanced.py``). It prints two
tables with 95 % bootstrap intervals, and writes ``benchmarks/results/text_to_image.json`` and a sheet of images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ditq_bundled
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from _recipes import WIDTHS, Table, recipe_of, show_differences, show_incoherence, tabulate
from environment import RESULTS, environment, write
from imbalanced import OUTLIERS, make_imbalanced

from ditq import api, architectures
from ditq.calibration import calibrate
from ditq.metrics.measure import BASIC
from ditq.recipe import Calibration
from ditq.report.sheet import sheet

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


def run(args: argparse.Namespace, prompts: list[str], imbalanced: bool) -> Table:
    pipe, name = load(args, imbalanced), args.model.removeprefix("bundled:")
    statistics = calibrate(
        pipe, architectures.match(pipe.transformer), ditq_bundled.prompts(name, "calibration"), Calibration(),
        seed=args.seed,
    )  # fmt: skip
    wanted: dict[str, tuple[str, list[str]]] = {}
    for width in args.widths:
        rows = {f"{method}-{width}": recipe_of(method, width) for method in args.methods}
        wanted |= rows | {row: variant for row, variant in VARIANTS.items() if variant[0] in rows}
    return tabulate(
        "imbalanced copy (synthetic)" if imbalanced else args.model, lambda: load(args, imbalanced), prompts,
        statistics, wanted, seed=args.seed, sampler={"steps": args.steps, "batch_size": args.batch_size},
        metrics=BASIC,
    )  # fmt: skip


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
    torch.manual_seed(args.seed)
    prompts = ditq_bundled.prompts(args.model.removeprefix("bundled:"), "evaluation")[: args.prompts]
    result: dict[str, Any] = {**environment(), "arguments": vars(args), "tables": []}
    for imbalanced in (False, True):
        if args.copy == ("real" if imbalanced else "imbalanced"):
            continue
        table = run(args, prompts, imbalanced)
        found = table.differences("psnr_db", args.methods, args.widths)
        differences = {pair: d for pair, d in found.items() if pair.startswith("viditq-")}
        show_differences(differences, "PSNR dB, ViDiT-Q minus the other", "viditq")
        shown = next((r for r in ("viditq-w4a8", *table.rows) if r in table.rows), None)
        if shown:
            show_incoherence(shown, table.rows[shown])
        values = {row: table.values[row] for row in table.rows}
        result["tables"].append(
            {"title": table.title, "rows": table.rows, "paired_psnr_db": differences, "values": values}
        )
        rows = [(label, images[:10]) for label, images in table.pictures.items()]
        RESULTS.mkdir(exist_ok=True)
        suffix = "-imbalanced" if imbalanced else ""
        sheet(rows, prompts[:10], zoom=1).save(RESULTS / f"{args.name}{suffix}.png")
        teaser = [row for row in rows if row[0] in TEASER]
        if not imbalanced and len(teaser) == len(TEASER):
            teaser.sort(key=lambda row: TEASER.index(row[0]))
            sheet(teaser, zoom=1).save(RESULTS / f"{args.name}-teaser.png")
    print("\nwritten to", write(args.name, result))


if __name__ == "__main__":
    main()
