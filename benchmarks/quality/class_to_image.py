"""Q-DiT's ablation ladder and other methods on a class-conditional model: FID, KID, IS, precision and paired PSNR.

``python benchmarks/quality/class_to_image.py`` quantizes ``bundled:emoji-class`` step by step as in Table 5 of the
paper (nearest with static ranges, + groups, + dynamic activations, + GPTQ, + searched group sizes) and by the
baselines, at W4A8, W4A4 and W3A8. It generates every class seven times (2,149 images per row) from noise that
calibration and search did not use, the same for all rows. It compares the images with the model's training artwork and
with the 16-bit images, with 95 % bootstrap intervals (paired where rows are compared), and writes
``benchmarks/results/class_to_image.json`` and a sheet of images.

The plans of the search come from ``granularity_search.py`` (``--plans`` is its folder). Without them that row is left
out. Images are kept in ``--folder``: run the command again to resume.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import RESULTS, environment, write

import ditq
from ditq import api, architectures
from ditq import recipe as recipes
from ditq.calibration import Statistics, calibrate
from ditq.comparison import BUNDLED_NETWORK, bundled_real
from ditq.metrics.measure import measure
from ditq.plan import Plan
from ditq.recipe import Calibration
from ditq.report.sheet import sheet
from ditq.sampling import PictureCache, Samples, Sampling, sample

METRICS = ("fid", "kid", "inception_score", "precision", "concept_accuracy", "psnr_db", "latent_sqnr_db")
GROUPS = ("weights.granularity=group", "weights.group_size=128", "activations.granularity=group",
          "activations.group_size=128")  # fmt: skip
NEAREST = ("rounding=nearest",)
STATIC = ("activations.dynamic=false", "activations.symmetric=true")
# Each row is the one before and one change; all start from qdit-*, so the layers kept in 16 bit are the same.
LADDER: dict[str, tuple[str, ...]] = {
    "RTN, channel and tensor": (
        *NEAREST, *STATIC, "weights.granularity=channel", "weights.group_size=null", "activations.granularity=tensor",
        "activations.group_size=null",
    ),
    "+ groups of 128": (*NEAREST, *STATIC),
    "+ dynamic activations": (*NEAREST, "activations.symmetric=true"),
    "+ asymmetric activations": NEAREST,
    "+ GPTQ": (),
}  # fmt: skip
# Which rounding the candidates of the search had; nearest is the paper's. The plans themselves are rounded by GPTQ.
SEARCHES = {"+ search": "nearest", "+ search by GPTQ": "recipe"}
BASELINES = ("ptq4dm", "ptq4dit", "smoothquant", "gptq", "viditq")


def plan_of(args: argparse.Namespace, row: str, width: str, statistics: Statistics) -> tuple[Any, Plan] | None:
    """A pipeline with its transformer quantized, and the plan; None for a row that cannot be had."""
    pipe = api.load(args.model)
    if row in SEARCHES:
        path = args.plans / f"qdit-{width}-evolution-{SEARCHES[row]}.plan.json"
        if not path.is_file():
            print(f"{row}: there is no {path}; run granularity_search.py first", file=sys.stderr)
            return None
        return pipe, ditq.quantize(pipe, Plan.from_dict(json.loads(path.read_text())), statistics=statistics).plan
    recipe, overrides = (f"qdit-{width}", LADDER[row]) if row in LADDER else (f"{row}-{width}", ())
    if recipe not in recipes.names():
        return None
    return pipe, ditq.quantize(pipe, recipe, overrides=list(overrides), statistics=statistics, seed=args.seed).plan


def draw(args: argparse.Namespace, pipe: Any, classes: list[str], row: str) -> Samples:
    begin, done = time.perf_counter(), 0

    def tell(n: int) -> None:
        nonlocal done
        done += n
        print(
            f"\r{row} {done}/{len(classes)}, {time.perf_counter() - begin:.0f} s", end="", flush=True, file=sys.stderr
        )

    sampling = Sampling(seed=args.seed, steps=args.steps, batch_size=args.batch_size)
    samples = sample(
        pipe,
        architectures.match(pipe.transformer),
        classes,
        sampling,
        on_batch=tell,
        cache=PictureCache(args.folder / "pictures"),
    )
    print(file=sys.stderr)
    # The whole trajectory of every row would take gigabytes.
    samples.trajectory, samples.timesteps = samples.trajectory[:, -1:].clone(), samples.timesteps[-1:]
    return samples


def facts(plan: Plan) -> dict[str, Any]:
    planned, full = plan.memory()
    sizes = Counter(layer.weight.group_size for layer in plan.quantized if layer.weight)
    return {
        "average_bits": plan.average_bits,
        "size_ratio": planned / full,
        "layers": len(plan.quantized),
        "kept_16bit": sorted({layer.role for layer in plan.kept}),
        "group_sizes": {str(size): count for size, count in sorted(sizes.items(), key=str)},
        "rounded_by_gptq": sum(layer.rounding == "gptq" for layer in plan.quantized),
        "plan": plan.hash(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-class")
    parser.add_argument("--widths", nargs="+", default=["w4a8", "w4a4", "w3a8"])
    parser.add_argument("--rows", nargs="+", default=[*LADDER, *SEARCHES, *BASELINES])
    parser.add_argument("--per-class", type=int, default=7, help="pictures of every class")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("class_to_image"), help="keeps pictures")
    parser.add_argument("--plans", type=Path, default=Path("granularity_search"), help="folder of searched plans")
    parser.add_argument("--name", default="class_to_image", help="name of the result file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    pipe = api.load(args.model)
    names = list(dict.fromkeys(pipe.labels))
    classes = names * args.per_class
    settings = Calibration(prompts=len(names), batch_size=32, steps=args.steps, rows=8192, calls=4)
    statistics = calibrate(pipe, architectures.match(pipe.transformer), names, settings, seed=args.seed,
                           cache=args.folder / "calibration", resume=True)  # fmt: skip
    reference = draw(args, pipe, classes, "16 bit")
    arguments = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    result: dict[str, Any] = {
        **environment(), "arguments": arguments, "pictures": len(classes),
        "calibration": settings.model_dump(mode="json"), "network": BUNDLED_NETWORK, "rows": {}, "steps": {},
    }  # fmt: skip
    pictures = [("16 bit", reference.images)]
    for width in args.widths:
        drawn: dict[str, Samples] = {}
        about: dict[str, Any] = {}
        for row in args.rows:
            if (made := plan_of(args, row, width, statistics)) is None:
                continue
            about[row] = facts(made[1])
            drawn[row] = draw(args, made[0], classes, f"{width} {row}")
            pictures.append((f"{width} {row}", drawn[row].images))
        measured = measure(
            reference, drawn, metrics=METRICS, network=BUNDLED_NETWORK, real=bundled_real(), seed=args.seed
        )
        for row, entry in about.items():
            entry |= {metric: measured.scores[row][metric].model_dump(mode="json") for metric in METRICS}
        result["rows"][width] = about
        order = [row for row in LADDER if row in drawn]
        pairs = [*pairwise(order), *((order[-1], row) for row in SEARCHES if row in drawn and order)]
        steps: dict[tuple[str, str], dict[str, Any]] = {pair: {} for pair in pairs}
        for d in measured.differences:
            if (d.a, d.b) in steps:
                steps[d.a, d.b][d.metric] = {"gain": -d.difference.mean, "ci95": [-x for x in d.difference.ci95[::-1]]}
        result["steps"][width] = {f"{a} -> {b}": found for (a, b), found in steps.items()}
        show(width, len(classes), result["rows"][width], result["steps"][width])
        write(args.name, result)
    shown = slice(0, 12)
    sheet([(label, images[shown]) for label, images in pictures], classes[shown], zoom=1).save(
        RESULTS / f"{args.name}.png"
    )
    print("\nwritten to", write(args.name, result))


def show(width: str, n: int, rows: dict[str, Any], steps: dict[str, Any]) -> None:
    """The table of one width, the 16-bit model first, then what each step of the ladder changed."""
    print(f"\n{width}: {n} pictures a row; mean [95 % interval]")
    print(f"{'row':26} " + " ".join(f"{metric:>27}" for metric in METRICS) + "  bits  size")
    own = next(iter(rows.values()))
    print(f"{'16 bit':26} " + " ".join(f"{_interval(own[metric]['reference'])}" for metric in METRICS))
    for row, entry in rows.items():
        print(f"{row:26} " + " ".join(_interval(entry[metric]) for metric in METRICS)
              + f" {entry['average_bits']:5.2f} {entry['size_ratio']:5.3f}")  # fmt: skip
    for step, found in steps.items():
        print(f"{step}: " + ", ".join(
            f"{metric} {d['gain']:+.3g} [{d['ci95'][0]:+.3g}, {d['ci95'][1]:+.3g}]" for metric, d in found.items()
        ))  # fmt: skip


def _interval(score: dict[str, Any] | None) -> str:
    if score is None:
        return f"{'':27}"
    return f"{score['mean']:9.4g} [{score['ci95'][0]:7.4g}, {score['ci95'][1]:7.4g}]"


if __name__ == "__main__":
    main()
