"""Mixed precision at equal average bits: ViDiT-Q-MP against error-only, MixDQ, SDNQ, AutoQuantize, uniform and random.

``python benchmarks/quality/mixed_precision.py`` measures the sensitivity of every layer of a bundled model on its
calibration prompts, allocates the bits of the weights (or ``--part activations``) by every rule within the same
average bits, and generates held-out prompts with each allocation, from the same noise. It prints a table with 95 %
bootstrap intervals, paired differences, the rank agreement of the scores between halves of the prompts, and which
group of roles moves which metric (ViDiT-Q, Fig. 20), and writes
``benchmarks/results/mixed_precision_MODEL_PART.json``.

The study of sensitivity and the images are kept: run it again to resume; several processes share the study.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import ditq_bundled
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import RESULTS, environment, write

from ditq import api, architectures
from ditq import recipe as recipes
from ditq.allocation import Candidates, Choices, Space, integer_program, measure_sensitivity, prediction_error_db
from ditq.allocation.choices import segments_of
from ditq.allocation.decoupled import allocate_decoupled, decoupling, greedy
from ditq.allocation.fitness import kept_moments, outputs_of
from ditq.allocation.rivals import gradient_errors, interleaved_uniform, mixdq, weight_error_rule, weight_errors
from ditq.allocation.scores import Scores
from ditq.allocation.space import Genome
from ditq.allocation.uncertainty import agreement, errors_of
from ditq.calibration import calibrate
from ditq.comparison import BUNDLED_NETWORK
from ditq.conversion import estimate, plan_layers
from ditq.conversion.rollback import restored_on_error
from ditq.metrics import paired_difference
from ditq.metrics.measure import measure
from ditq.metrics.per_image import image_metrics
from ditq.plan import LayerPlan
from ditq.sampling import Sampling, sample
from ditq.trace.calls import Call, merged

WIDTHS = {"weights": (6, 5, 4, 3, 2), "activations": (8, 7, 6, 5, 4)}
BUDGETS = {"weights": (3.0, 3.5, 4.0), "activations": (4.5, 5.0)}
RECIPES = {"weights": "viditq-w4a8", "activations": "viditq-w8a8"}
# ViDiT-Q: the metric of each group of roles. Content: agreement with the prompt; quality: the picture; temporal: flow.
GROUPS = {False: {"content": "concept_score", "quality": "ssim"},
          True: {"content": "concept_score", "quality": "ssim", "temporal": "delta_flow"}}  # fmt: skip
SHOWN = {"psnr_db": "PSNR dB", "latent_sqnr_db": "latent SQNR dB", "concept_score": "concept score"}
SHOWN_VIDEO = {**SHOWN, "delta_flow": "dFlow px", "warping_error": "warping error"}
DRAWS = 2  # of random allocations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-t2i")
    parser.add_argument("--part", default="weights", choices=list(WIDTHS))
    parser.add_argument("--budgets", type=float, nargs="+", default=None, help="average bits")
    parser.add_argument("--unit", default="layer", choices=["layer", "role"])
    parser.add_argument("--probes", type=int, default=32, help="prompts of the sensitivity")
    parser.add_argument("--probe-steps", type=int, default=10)
    parser.add_argument("--moments", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="no metrics of images: prediction error only")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["sensitivity"], help="measure the sensitivity and stop, e.g. to share it")
    parser.add_argument("--folder", type=Path, default=Path("mixed_precision"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    bench = Bench(args)
    if args.only == "sensitivity":
        return
    result = bench.run()
    name = f"mixed_precision_{bench.name}_{args.part}{'_plain' if args.plain else ''}"
    RESULTS.mkdir(exist_ok=True)
    print("\nwritten to", write(name, result))


class Bench:
    """One model and one part: its scores, its space, and what every rule allocates."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = args.model.removeprefix("bundled:")
        self.pipe = api.load(args.model)
        self.model = self.pipe.transformer
        self.architecture = architectures.match(self.model)
        self.video = self.name.endswith("video")
        self.groups = {} if args.plain else GROUPS[self.video]
        probes = ditq_bundled.prompts(self.name, "calibration")
        self.probes, self.calibration = probes[-args.probes :], probes[:32]
        self.prompts = ditq_bundled.prompts(self.name, "evaluation")[: args.prompts]
        self.recipe = recipes.load(RECIPES[args.part])
        self.estimate = estimate(self.model, self.architecture, self.recipe)
        self.begin = time.perf_counter()
        self.scores = self._scores()
        self.seconds = time.perf_counter() - self.begin

    def _scores(self) -> Scores:
        args = self.args
        chosen: dict[str, Any] = {args.part: WIDTHS[args.part], "unit": args.unit}
        self.sampling = Sampling(args.seed, args.probe_steps, batch_size=args.batch_size)
        return measure_sensitivity(
            self.pipe, self.architecture, self.recipe, self.probes, self.sampling, part=args.part,
            choices=Choices(**chosen), moments=args.moments, calibration=self.calibration,
            latent=True, images=image_metrics(sorted(set(self.groups.values())), BUNDLED_NETWORK),
            storage=args.folder / f"{self.name}-{args.part}-{args.unit}{'-plain' if args.plain else ''}.search",
            progress=_ticker(),
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Allocates, generates and compares; returns the JSON."""
        args = self.args
        print(f"\n{args.model}, {args.part} of {self.recipe.name}, {len(self.scores.genes)} genes by {args.unit}")
        found = {name: agreement(self.scores, name) for name in self.scores.metrics}
        for name, by_choice in found.items():
            print(f"  {name}: {by_choice[-1]}")
        table = None if args.plain else self._decoupling()
        with restored_on_error(self.model, always=True):
            rows, differences = self._rows()
        return {
            **environment(), "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
            "recipe": self.recipe.name, "genes": len(self.scores.genes), "sensitivity_seconds": self.seconds,
            "agreement": {n: [vars(a) | {"is_noise": a.is_noise} for a in of] for n, of in found.items()},
            "decoupling": table, "rows": rows, "paired": differences, "prompts": len(self.prompts),
        }  # fmt: skip

    def _decoupling(self) -> dict[str, Any]:
        choice = self.scores.choices[-2]
        d = decoupling(self.scores, choice)
        print(f"\n  one group of roles at {choice}: drop of each metric (standard error), load")
        for group, drops, errors, loads in zip(d.groups, d.drops, d.errors, d.loads, strict=True):
            cells = [
                f"{m} {x:8.4f} ({e:.4f}) {load:.2f}"
                for m, x, e, load in zip(d.metrics, drops, errors, loads, strict=True)
            ]
            print(f"  {group:10}", "   ".join(cells))
        return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(d).items()}

    def _rows(self) -> tuple[dict[str, Any], dict[str, Any]]:
        args = self.args
        statistics = calibrate(
            self.pipe, self.architecture, self.calibration, self.recipe.calibration, seed=args.seed, resume=True
        )
        layers = plan_layers(self.model, self.architecture, self.recipe, statistics, seed=args.seed)
        calls = _calls(self.pipe, self.architecture, self.probes, self.sampling)
        drawn = Sampling(args.seed, args.steps, batch_size=args.batch_size)
        reference = sample(self.pipe, self.architecture, self.prompts, drawn)
        outputs = outputs_of(self.model, calls)
        gradients = weighted = None
        if args.part == "weights":
            space = self._space(layers, 3.0)
            weighted = weight_errors(self.model, self.architecture, space)
            gradients = gradient_errors(self.model, self.architecture, space, calls, seed=args.seed)
        candidates = Candidates(
            self.model, self.architecture, layers, self._space(layers, 8.0, segments=4), statistics, self.recipe,
            args.seed,
        )  # fmt: skip

        def error(space: Space, genome: Genome) -> float:
            candidates.space = space
            candidates.put(genome)
            return prediction_error_db(outputs, outputs_of(self.model, calls))

        shown = SHOWN_VIDEO if self.video else SHOWN
        rows: dict[str, Any] = {}
        differences: dict[str, Any] = {}
        for budget in args.budgets or BUDGETS[args.part]:
            space = self._space(layers, budget)
            rules = self._rules(space, layers, budget, weighted, gradients, error)
            print(f"\n  {budget:g} bits on average: " + "  ".join(f"{title:>22}" for title in shown.values()))
            values: dict[str, Mapping[str, list[float]]] = {}
            for rule, (of, genome) in rules.items():
                predicted = error(of, genome)
                images = sample(self.pipe, self.architecture, self.prompts, drawn)
                metrics = measure(reference, {rule: images}, metrics=list(shown), network=BUNDLED_NETWORK)
                values[rule] = metrics.values[rule]
                intervals = {m: metrics.scores[rule][m].model_dump(mode="json") for m in shown}
                cells = [f"{i['mean']:8.3f} {_interval(i['ci95'])}" for i in intervals.values()]
                used = of.averages(genome)[args.part]
                print(f"  {rule:22} {used:5.3f} " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)
                rows[f"{rule} {budget:g}"] = {
                    "bits": used, "prediction_error_db": predicted, **intervals,
                    "counts": {str(c): genome.count(c) for c in sorted(set(genome), key=str)},
                }  # fmt: skip
            for one in ("error-only", "decoupled"):
                for other in values:
                    if other != one:
                        gaps = {m: paired_difference(values[one][m], values[other][m]).model_dump() for m in shown}
                        differences[f"{one} - {other} {budget:g}"] = gaps
            self._print_gaps(differences, budget)
        return rows, differences

    def _rules(
        self,
        space: Space,
        layers: Sequence[LayerPlan],
        budget: float,
        weighted: list[dict[int | str, float]] | None,
        gradients: list[dict[int | str, float]] | None,
        error: Callable[[Space, Genome], float],
    ) -> dict[str, tuple[Space, Genome]]:
        """The allocation of every rule, with its space."""
        args, scores = self.args, self.scores
        errors = errors_of(space, scores)  # of the final latents
        genomes: dict[str, Genome] = {"uniform": interleaved_uniform(space)}
        for draw in range(DRAWS):
            genomes[f"random {draw + 1}"] = space.random(Random(args.seed + draw))
        if weighted is not None:
            genomes["SDNQ's rule"] = weight_error_rule(space, weighted)
            genomes["weight error, program"] = integer_program(space, weighted)
        if gradients is not None:
            genomes["gradient, program"] = integer_program(space, gradients)
        # MixDQ ranks the content group by SSIM, and the other by SQNR.
        ssim = {} if args.plain else {"content": "ssim"}
        genomes["MixDQ"] = mixdq(space, scores, lambda g: error(space, g), **ssim).genome
        genomes["prediction error"] = integer_program(space, errors_of(space, scores, "prediction"))
        genomes["error-only greedy"] = greedy(space, errors)
        genomes["error-only"] = integer_program(space, errors)
        if not args.plain:
            for within in ("greedy", "program"):
                allocation = allocate_decoupled(space, scores, metrics=self.groups, within=within)  # type: ignore[arg-type]
                genomes[f"decoupled {within}" if within == "greedy" else "decoupled"] = allocation.genome
            for note in allocation.notes:
                print(f"  note: {note}")
            print("  budgets:", {group: round(bits, 2) for group, bits in allocation.budgets.items()})
        rules = {name: (space, genome) for name, genome in genomes.items()}
        if args.part == "activations":
            timed = self._space(layers, budget, segments=4)
            rules["error-only, 4 segments"] = timed, integer_program(timed, errors_of(timed, scores))
        return rules

    def _space(self, layers: Sequence[LayerPlan], budget: float, segments: int = 1) -> Space:
        args = self.args
        inside = {linear.name for group in self.architecture.groups(self.model) for linear in group.linears}
        searched = [layer for layer in layers if layer.weight is not None and layer.name in inside]
        whole = self.estimate.model_copy(update={"layers": tuple(layers)})
        parts = segments_of(self.scores.steps, segments) if args.part == "activations" and segments > 1 else ()
        chosen: dict[str, Any] = {args.part: WIDTHS[args.part], "unit": args.unit, "segments": parts}
        return Space.of(
            searched, self.scores.rows, choices=Choices(**chosen), budget=f"{args.part}:{budget}",
            other_bytes=whole.memory()[0] - sum(layer.stored_bytes() for layer in searched),
        )  # fmt: skip

    def _print_gaps(self, differences: Mapping[str, Any], budget: float) -> None:
        for name, gaps in differences.items():
            if name.endswith(f" {budget:g}"):
                cells = [f"{m} {g['mean']:+.3f} {_interval(g['ci95'])}" for m, g in gaps.items()]
                print(f"    {name:48} " + "  ".join(cells))


def _calls(pipe: Any, architecture: Any, prompts: Sequence[str], sampling: Sampling) -> list[Call]:
    """Calls along the trajectories of some prompts, one for each, with noise of their own."""
    with kept_moments(pipe.transformer, architecture, 1, sampling.seed) as recorder:
        sample(pipe, architecture, list(prompts[:16]), sampling.shifted(40_000).batch(16), decode=False)
    return merged(recorder.calls(), architecture)


def _interval(ci: Sequence[float] | None) -> str:
    return "" if ci is None else f"[{ci[0]:.3f}, {ci[1]:.3f}]"


def _ticker() -> Callable[[str, int, int], None]:
    begin = time.perf_counter()

    def tick(stage: str, done: int, total: int) -> None:
        print(f"\r{stage} {done}/{total} {time.perf_counter() - begin:5.0f} s", end="", flush=True, file=sys.stderr)

    return tick


if __name__ == "__main__":
    main()
