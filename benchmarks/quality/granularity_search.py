"""Searched group sizes against uniform ones and other search methods, at one budget of BitOps.

``python benchmarks/quality/granularity_search.py`` searches group sizes for ``bundled:emoji-class`` at W4A8 and W4A4
within the BitOps of uniform g = 128: by evolution, by random search with as many evaluations, and by an integer
program on layer errors. Then it generates held-out classes with every plan, from noise that no search has used. It
reports the distance to the 16-bit model as paired differences to uniform g = 128, with 95 % bootstrap intervals, by
two measures: the search's fitness (prediction error on the 16-bit trajectory), and latent SQNR and PSNR of the
generated images. Weights are rounded to nearest; ``--gptq`` adds rows with GPTQ.

The result is ``benchmarks/results/granularity_search.json``; the plans are in ``--folder``. Everything is kept there:
run the command again to resume, or run several processes at once to share the searches.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _recipes import ends
from environment import environment, write

import ditq
from ditq import api, architectures
from ditq import recipe as recipes
from ditq.allocation import LATENT, PREDICTION, Evolution, SearchResult, prediction_error_db
from ditq.metrics import paired_difference
from ditq.metrics.interval import aggregate
from ditq.metrics.measure import measure
from ditq.plan import Plan
from ditq.sampling import PictureCache, Samples, Sampling, sample

STRATEGIES = ("uniform", "random", "program", "evolution")
DRAWN = ("latent_sqnr_db", "psnr_db")
METRICS = ("prediction_sqnr_db", *DRAWN)
CALIBRATION = ["calibration.steps=20"]
Call = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]  # arguments and output
FITNESS = {"prediction": PREDICTION, "latent": LATENT}


def search(args: argparse.Namespace, recipe: str, strategy: str, prompts: list[str]) -> SearchResult:
    pipe = api.load(args.model)
    numbers = Evolution(args.population, args.top_k, args.population // 2, args.population // 2, args.probability)

    def tell(done: int, total: int, best: float) -> None:
        print(f"\r{recipe} {strategy} {done}/{total} best {best:.4f}", end="", flush=True, file=sys.stderr)

    # Uniform g as the budget names it is the preset, and the first individual, of the random search.
    options: dict[str, Any] = {"trials": 1, "strategy": "random"} if strategy == "uniform" else {
        "trials": args.trials, "strategy": numbers if strategy == "evolution" else strategy
    }  # fmt: skip
    result = ditq.search(
        pipe, recipe, [prompts[i % len(prompts)] for i in range(args.pictures)], sizes=args.sizes, budget=args.budget,
        steps=args.steps, batch_size=32, calibration=prompts, seed=args.seed, overrides=CALIBRATION,
        moments=args.moments, rounding=args.rounding,
        fitness=FITNESS[args.fitness],
        storage=args.folder / f"{recipe}-{strategy}-{args.fitness}-{args.rounding}.search",
        on_trial=tell, **options,
    )  # fmt: skip
    print(file=sys.stderr)
    return result


def draw(args: argparse.Namespace, pipe: Any, prompts: list[str]) -> Samples:
    arch = architectures.match(pipe.transformer)
    cache = PictureCache(args.folder / "pictures")
    return sample(pipe, arch, prompts, Sampling(seed=args.seed, steps=args.held_out_steps, batch_size=32), cache=cache)


def nearest(plan: Plan) -> Plan:
    """The same allocation, rounded to nearest."""
    layers = tuple(layer.model_copy(update={"rounding": "nearest", "gptq": None}) for layer in plan)
    return plan.model_copy(update={"layers": layers})


def predictions(args: argparse.Namespace, prompts: list[str]) -> list[Call]:
    """Calls of the 16-bit transformer along its own trajectories of held-out pictures, all pictures in each."""
    pipe, calls = api.load(args.model), list[Call]()
    pipe.transformer.register_forward_hook(
        lambda model, *call: calls.append((call[0], call[1], call[2][0])), with_kwargs=True
    )
    sampling = Sampling(seed=args.seed, steps=args.steps, batch_size=len(prompts))
    sample(pipe, architectures.match(pipe.transformer), prompts, sampling, decode=False)
    return calls


@torch.no_grad()
def prediction_sqnr_db(calls: list[Call], pipe: Any, n: int) -> list[float]:
    """Of each of n pictures: mean over steps and both halves of the guidance, which lie n rows apart."""
    before = [output for *_, output in calls]
    after = [pipe.transformer(*positional, **named)[0] for positional, named, _ in calls]
    return [-prediction_error_db([x[i::n] for x in before], [x[i::n] for x in after]) for i in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-class")
    parser.add_argument("--recipes", nargs="+", default=["qdit-w4a8", "qdit-w4a4"])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    parser.add_argument("--budget", default="uniform:128")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--probability", type=float, default=0.1)
    parser.add_argument("--fitness", default="prediction", choices=FITNESS)
    parser.add_argument("--pictures", type=int, default=128, help="of one evaluation")
    parser.add_argument("--moments", type=int, default=1, help="timesteps of each picture, for predictions")
    parser.add_argument("--rounding", default="recipe", choices=["recipe", "nearest"], help="of the candidates")
    parser.add_argument("--steps", type=int, default=10, help="of one evaluation")
    parser.add_argument("--held-out", type=int, default=64, help="pictures of the comparison")
    parser.add_argument("--held-out-steps", type=int, default=20)
    parser.add_argument("--gptq", action="store_true", help="rows with GPTQ as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("granularity_search"))
    parser.add_argument("--name", default="granularity_search", help="name of the result file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    import ditq_bundled

    name = args.model.removeprefix("bundled:")
    calibration, held_out = (ditq_bundled.prompts(name, split) for split in ("calibration", "evaluation"))
    held_out = [held_out[i % len(held_out)] for i in range(args.held_out)]
    reference = draw(args, api.load(args.model), held_out)
    calls = predictions(args, held_out)
    arguments = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    result: dict[str, Any] = {**environment(), "arguments": arguments, "rows": {}}
    for recipe in args.recipes:
        drawn: dict[str, Samples] = {}
        predicted: dict[str, list[float]] = {}
        rows: dict[str, Any] = {}
        for strategy in args.strategies:
            found = search(args, recipe, strategy, calibration)
            (args.folder / f"{recipe}-{strategy}-{args.rounding}.plan.json").write_text(found.plan.to_json() + "\n")
            plans = {strategy: nearest(found.plan)} | ({f"{strategy} + GPTQ": found.plan} if args.gptq else {})
            for row, plan in plans.items():
                pipe = api.load(args.model)
                settings = recipes.load(recipe).override(CALIBRATION).calibration
                options = {"prompts": calibration, "calibration": settings, "resume": True}
                done = api.quantize(pipe, plan, **(options if plan.needs_calibration else {}))
                drawn[row] = draw(args, pipe, held_out)
                predicted[row] = prediction_sqnr_db(calls, pipe, len(held_out))
                rows[row] = {
                    "search_fitness_db": found.fitness,
                    "evaluations": len(found.scored),
                    "bit_operations": found.bit_operations,
                    "budget": found.budget,
                    "scale_overhead_bits": found.scale_overhead_bits,
                    "group_sizes": dict(sorted(Counter(found.genome).items())),
                    "by_role": {
                        role: dict(sorted(Counter(x.weight.group_size for x in layers if x.weight).items()))
                        for role in dict.fromkeys(x.role for x in done.plan.quantized)
                        if (layers := [x for x in done.plan.quantized if x.role == role])
                    },
                }
        measured = measure(reference, drawn, metrics=DRAWN)
        values = {row: {"prediction_sqnr_db": predicted[row], **measured.values[row]} for row in rows}
        print(f"\n{recipe}: {len(held_out)} held-out pictures, seed {args.seed}")
        columns = " ".join(f"{metric:>24}" for metric in METRICS)
        print(f"{'row':20} {'evals':>5} {'fitness':>8} {'BitOps':>7} {columns}  differences to {args.strategies[0]}")
        for row, entry in rows.items():
            base = args.strategies[0] + (" + GPTQ" if row.endswith("GPTQ") else "")
            for metric in METRICS:
                gap = paired_difference(values[row][metric], values[base][metric])
                entry[metric] = aggregate(values[row][metric]).model_dump(mode="json")
                entry[f"difference_{metric}"] = gap.model_dump(mode="json")
            print(
                f"{row:20} {entry['evaluations']:5} {entry['search_fitness_db']:8.3f} "
                f"{entry['bit_operations'] / entry['budget']:7.4f} "
                + " ".join(_interval(entry[metric]) for metric in METRICS) + "  "
                + " ".join(_interval(entry[f"difference_{metric}"], "+") for metric in METRICS)
                + f"  {entry['group_sizes']}"
            )  # fmt: skip
        result["rows"][recipe] = rows
    print("\nwritten to", write(args.name, result))


def _interval(value: dict[str, Any], sign: str = "") -> str:
    return f"{value['mean']:{sign}8.2f} {ends(value, f'{sign}.2f')}"


if __name__ == "__main__":
    main()
