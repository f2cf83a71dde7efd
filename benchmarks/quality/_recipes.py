"""Shared code of the recipe tables: quantize a fresh model by each recipe, generate images, measure, print."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

import ditq
from ditq import architectures
from ditq.calibration import Statistics
from ditq.metrics import paired_difference
from ditq.metrics.measure import measure
from ditq.plan import Plan
from ditq.sampling import PictureCache, Samples, Sampling, sample

WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")


@dataclass(frozen=True)
class Column:
    """A metric in the printed table."""

    metric: str
    title: str
    digits: int


# What every table shows, of pictures and of videos.
FIDELITY = (Column("psnr_db", "PSNR dB", 2), Column("ssim", "SSIM", 4), Column("latent_sqnr_db", "latent SQNR dB", 2))


@dataclass
class Table:
    """What was measured.

    Attributes:
        rows: of each recipe every metric as a score, bits, size, what was done to the layers.
        values: of each recipe and metric the value of every prompt, for paired differences; "16 bit" has its own ones.
        pictures: what each row drew, "16 bit" first.
        skipped: metrics that were not measured, and why.
    """

    title: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    pictures: dict[str, list[Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def differences(self, metric: str, methods: Sequence[str], widths: Sequence[str]) -> dict[str, Any]:
        """Paired differences of one metric between every two methods of a width, the last method first."""
        found = {}
        for width in widths:
            pairs = [(b, a) for a, b in combinations(methods, 2)]
            for a, b in ((f"{a}-{width}", f"{b}-{width}") for a, b in pairs):
                if a in self.values and b in self.values:
                    gap = paired_difference(self.values[a][metric], self.values[b][metric])
                    found[f"{a} - {b}"] = gap.model_dump()
        return found


def recipe_of(method: str, width: str) -> tuple[str, list[str]]:
    """A recipe of ditq, and what to set in it."""
    return f"{method}-{width}", []


def tabulate(
    title: str,
    load: Callable[[], Any],
    prompts: Sequence[str],
    statistics: Statistics,
    wanted: Mapping[str, tuple[str, list[str]]],
    *,
    seed: int,
    sampler: Mapping[str, Any],
    metrics: Sequence[str],
    columns: Sequence[Column] = FIDELITY,
    network: str = "auto",
    folder: Path | None = None,
) -> Table:
    """Quantizes a fresh pipeline by every recipe, draws ``prompts``, and compares with the 16-bit pictures.

    Args:
        load: gives a fresh 16-bit pipeline.
        wanted: by the row's name the recipe and its overrides.
        sampler: steps, guidance scale, batch size.
        metrics: all that is measured; ``columns`` are printed.
        folder: keeps what was drawn and every finished row, so that a run that was cut off goes on. A row is made anew
            after any change of ditq, the model, the prompts or what is asked for.
    """
    cache = PictureCache(folder / "pictures") if folder else None
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = load()
    arch = architectures.match(pipe.transformer)

    def draw(pipe: Any, name: str) -> Samples:
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            print(f"\r{name} {done}/{len(prompts)}", end="", flush=True, file=sys.stderr)

        samples = sample(pipe, arch, prompts, Sampling(seed=seed, **sampler), cache=cache, on_batch=tick)
        print("\r", end="", file=sys.stderr)
        return samples

    reference = draw(pipe, "16 bit")
    table = Table(title, pictures={"16 bit": reference.images})
    print(f"\n{title}: {len(prompts)} held-out prompts, {len(reference.timesteps)} steps, seed {seed}")
    print(f"{'recipe':24} " + " ".join(f"{column.title:>23}" for column in columns) + "  bits  size    s")
    asked = [own_code(), reference.fingerprint, list(prompts), seed, dict(sampler), list(metrics), network,
             float(sum(group.absmax.double().sum() for group in statistics.groups.values()))]  # fmt: skip
    for name, (recipe, overrides) in wanted.items():
        begin = time.perf_counter()
        kept = Kept(folder, [*asked, name, recipe, overrides])
        if (row := kept.row(reference, cache, sampler)) is None:
            pipe = load()
            plan = ditq.quantize(pipe, recipe, overrides=overrides, statistics=statistics, seed=seed).plan
            samples = draw(pipe, name)
            found = measure(reference, {name: samples}, metrics=metrics, network=network, seed=seed)
            scores = {metric: score.model_dump(mode="json") for metric, score in found.scores[name].items()}
            row = {
                "scores": {**scores, **facts(plan)}, "values": found.values[name], "own": found.values[""],
                "fingerprint": samples.fingerprint,
            }  # fmt: skip
            kept.write(row)
            row["pictures"] = samples.images
        table.pictures[name], table.values[name], table.rows[name] = row["pictures"], row["values"], row["scores"]
        table.values["16 bit"] = row["own"]
        cells = [_cell(table.rows[name][column.metric], column.digits) for column in columns]
        about = table.rows[name]
        size = f"{about['average_bits']:5.2f} {about['size_ratio']:5.3f} {time.perf_counter() - begin:4.0f}"
        print(f"{name:24} {' '.join(cells)} {size}", flush=True)
    return table


class Kept:
    """A finished row in a file of its own, named by all that it depends on."""

    def __init__(self, folder: Path | None, asked: list[Any]) -> None:
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / "rows" / f"{digest}.json" if folder else None

    def row(self, reference: Samples, cache: PictureCache | None, sampler: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row, with its pictures; None if it is not there, or a picture is not."""
        if self.path is None or cache is None or not self.path.is_file():
            return None
        row: dict[str, Any] = json.loads(self.path.read_text())
        options = {"steps": None, "guidance_scale": None, **sampler}
        options.pop("batch_size", None)
        keys = [cache.key(row["fingerprint"], c, s, options)
                for c, s in zip(reference.conditions, reference.seeds, strict=True)]  # fmt: skip
        found = [cache.get(key) for key in keys]
        row["pictures"] = [sample.picture for sample in found if sample is not None]
        return row if all(found) else None

    def write(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(row))


def own_code() -> str:
    """A digest of all of ditq: code, recipes, architectures."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(resources.files("ditq"))).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def facts(plan: Plan) -> dict[str, Any]:
    """What a plan did: bits, size, the balance and the incoherence of layers."""
    planned, full = plan.memory()
    balances = Counter(
        "+".join(word for word, on in (("smooth", x.smooth), ("rotate", x.rotate)) if on) or "none"
        for x in plan.quantized
    )
    return {
        "average_bits": plan.average_bits,
        "nominal_bits": [plan.nominal_weight_bits, plan.nominal_activation_bits],
        "size_ratio": planned / full,
        "balance": dict(balances),
        "incoherence": incoherence_by_role(plan),
        "kept_16bit": sorted({layer.role for layer in plan.kept}),
    }


def incoherence_by_role(plan: Plan) -> dict[str, dict[str, float]]:
    """Mean incoherence of weights and inputs over the layers of a role, before and after balancing."""
    out: dict[str, dict[str, float]] = {}
    for role in dict.fromkeys(layer.role for layer in plan.quantized):
        found = [x.incoherence.model_dump() for x in plan.quantized if x.role == role and x.incoherence]
        keys = [key for key in found[0] if found[0][key] is not None]
        out[role] = {key: sum(f[key] for f in found) / len(found) for key in keys}
    return out


def show_differences(found: Mapping[str, Any], title: str, first: str) -> None:
    """The paired differences of one method to the others."""
    print(f"\npaired differences in {title}, mean [95 % interval]")
    for pair, d in found.items():
        if pair.startswith(f"{first}-"):
            print(f"  {pair:36} {d['mean']:+6.2f} {ends(d, '+.2f')}")


def show_incoherence(name: str, row: Mapping[str, Any]) -> None:
    """How much the balance of a recipe evened out, by role."""
    print(f"\nincoherence before -> after balancing, {name}, mean over the layers of a role")
    for role, v in row["incoherence"].items():
        inputs = f"inputs {v['input_before']:.2f} -> {v['input_after']:.2f}" if "input_before" in v else ""
        print(f"  {role:18} weights {v['weight_before']:.2f} -> {v['weight_after']:.2f}  {inputs}")


def ends(value: Mapping[str, Any], form: str) -> str:
    """The 95 % interval in brackets; fewer than three pairs have none."""
    return "[n/a]" if value["ci95"] is None else "[" + ", ".join(f"{end:{form}}" for end in value["ci95"]) + "]"


def _cell(score: Mapping[str, Any], digits: int) -> str:
    return f"{score['mean']:8.{digits}f} {ends(score, f'.{digits}f')}".rjust(23)
