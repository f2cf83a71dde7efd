"""The cost of each recipe family: seconds to quantize ``bundled:emoji-t2i`` at W4A8, calibration included.

``python benchmarks/quality/recipe_cost.py`` prints a table and writes ``benchmarks/results/recipe_cost.json``. With
``--write`` it also writes the ``cost`` of every file in ``src/ditq/recipes``, which ``ditq recipes`` shows. Prompts,
steps and calls are those of the recipe. The calibration cache is not used. Measure on a machine without other load.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ditq_bundled
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, write

import ditq
from ditq import recipe as recipes

RECIPES = Path(recipes.__file__).parent / "recipes"


def seconds(name: str, model: str, seed: int) -> dict[str, float]:
    """Of the stages of one quantization of a fresh pipeline."""
    pipe = ditq.load(f"bundled:{model}")
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        prompts = ditq_bundled.prompts(model, "calibration")
        calibrated = {"prompts": prompts, "cache": Path(cache)} if recipes.load(name).needs_calibration else {}
        result = ditq.quantize(pipe, name, seed=seed, **calibrated)
        return {**result.seconds, "total": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-t2i")
    parser.add_argument("--width", default="w4a8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the costs into the recipe files")
    args = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    names = sorted(recipes.families())
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):  # interleaved: a slow minute of the machine hits all of them
        for name in names:
            runs[name].append(seconds(f"{name}-{args.width}", args.model, args.seed))
    rows: dict[str, Any] = {}
    for name in names:
        totals = [run["total"] for run in runs[name]]
        rows[name] = {"seconds": statistics.median(totals), "runs": runs[name]}
        print(f"{name}-{args.width:8} {statistics.median(totals):7.1f} s")
        if args.write:
            path = RECIPES / f"{name}.yaml"
            cost = f'cost: "{_words(statistics.median(totals))}"\n'
            text = re.sub(r"^cost: .*\n", "", path.read_text(), flags=re.M)
            path.write_text(re.sub(r"^(for_whom: .*\n)", rf"\g<1>{cost}", text, flags=re.M))
    print(write("recipe_cost", {**environment(), "arguments": vars(args), "rows": rows}))


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 1.5 else f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
