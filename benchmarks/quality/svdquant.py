"""SVDQuant's parts one by one: smoothing, the low-rank branch, its rank and refinement, GPTQ of the residual.

``python benchmarks/quality/svdquant.py`` quantizes ``bundled:emoji-t2i`` to W4A4 with groups of 64 by every variant of
the recipe ``svdquant-w4a4``. It generates held-out prompts with each, and compares the images with those of the 16-bit
model from the same seeds: a table with 95 % bootstrap intervals, and paired differences from the recipe as it is. With
``--imbalanced`` it does this on an imbalanced copy of the model (synthetic, see ``imbalanced.py``). The result is
``benchmarks/results/svdquant.json``.
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
from _recipes import ends, tabulate
from environment import RESULTS, environment, write
from imbalanced import make_imbalanced

from ditq import api, architectures
from ditq.calibration import calibrate
from ditq.metrics import paired_difference
from ditq.metrics.measure import BASIC
from ditq.recipe import Calibration

WHOLE = "smooth + branch"
NO_SMOOTH, NO_BRANCH, GPTQ = "balance.smooth=false", "branch=null", "rounding=gptq"
ASYMMETRIC = ["weights.symmetric=false", "activations.symmetric=false"]
# What is set in the recipe; the published ablation has the first four rows and the ranks.
VARIANTS: dict[str, list[str]] = {
    "nearest": [NO_SMOOTH, NO_BRANCH],
    "smooth": [NO_BRANCH],
    "branch": [NO_SMOOTH],
    WHOLE: [],
    f"{WHOLE}, not refined": ["branch.iterations=0"],
    f"{WHOLE}, rank 16": ["branch.rank=16"],
    f"{WHOLE}, rank 64": ["branch.rank=64"],
    "GPTQ": [NO_SMOOTH, NO_BRANCH, GPTQ],
    "smooth, GPTQ": [NO_BRANCH, GPTQ],
    f"{WHOLE}, GPTQ": [GPTQ],
    f"{WHOLE}, GPTQ, not refined": [GPTQ, "branch.iterations=0"],
    f"{WHOLE}, asymmetric": ASYMMETRIC,
    f"{WHOLE}, GPTQ, asymmetric": [GPTQ, *ASYMMETRIC],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-t2i")
    parser.add_argument("--width", default="w4a4")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--imbalanced", action="store_true")
    parser.add_argument("--name", default="svdquant", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    name = args.model.removeprefix("bundled:")

    def load() -> Any:
        pipe = api.load(args.model)
        if args.imbalanced:
            make_imbalanced(pipe.transformer, architectures.match(pipe.transformer), args.seed)
        return pipe

    pipe = load()
    statistics = calibrate(
        pipe, architectures.match(pipe.transformer), ditq_bundled.prompts(name, "calibration"), Calibration(),
        seed=args.seed,
    )  # fmt: skip
    table = tabulate(
        f"{args.model} {args.width}" + (", imbalanced copy (synthetic)" if args.imbalanced else ""), load,
        ditq_bundled.prompts(name, "evaluation")[: args.prompts], statistics,
        {title: (f"svdquant-{args.width}", VARIANTS[title]) for title in args.variants},
        seed=args.seed, sampler={"steps": args.steps, "batch_size": args.batch_size}, metrics=BASIC,
    )  # fmt: skip
    differences = {}
    print(f"\nlatent SQNR in dB, minus that of '{WHOLE}', mean [95 % interval]")
    for title in args.variants if WHOLE in args.variants else ():
        if title != WHOLE:
            pairs = (table.values[row]["latent_sqnr_db"] for row in (title, WHOLE))
            gap = differences[title] = paired_difference(*pairs).model_dump()
            print(f"  {title:32} {gap['mean']:+6.2f} {ends(gap, '+.2f')}")
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {**environment(), "arguments": arguments, "rows": table.rows, "latent_sqnr_db_differences": differences}
    print("written to", write(args.name, result, args.out))


if __name__ == "__main__":
    main()
