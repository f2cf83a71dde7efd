"""Seconds per image of the bundled models, end to end, and whether both engines generate the same images.

``python benchmarks/cpu/pictures.py`` generates images for the same prompts and noise with every pipeline in turn:

* 16-bit weights in torch (fp32 and bf16);
* each recipe with the torch engine;
* each recipe with OpenVINO, as exported by ``ditq export --whole-pipeline``: in fp32 between the layers, and in bf16
  if the CPU supports it; static recipes also with int8 attention.

Text encoder, sampler and decoder are included. It writes ``benchmarks/results/cpu_pictures_MODEL.json`` and a bar
plot, both in milliseconds per image. ``psnr_db`` compares a row with the fp32 images, and with the torch engine's
images of the same plan.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import Row, row, save, torch_bytes, trim
from _variants import has_bf16, openvino_bytes

import ditq
from ditq import api, architectures
from ditq.calibration import calibrate
from ditq.metrics.fidelity import psnr_db
from ditq.openvino.options import Attention, Shapes
from ditq.recipe import Calibration, load
from ditq.sampling import Samples, Sampling, sample

BASELINES = ("torch bf16", "torch fp32")


def pipelines(model: str, recipes: list[str], calibration: list[str], seed: int, shapes: Shapes) -> dict[str, Any]:
    """Every variant as a pipeline of its own."""
    out = {"torch fp32": api.load(model), "torch bf16": api.load(model, dtype=torch.bfloat16)}
    arch = architectures.match(out["torch fp32"].transformer)
    found = None
    if any(load(recipe).needs_calibration for recipe in recipes):
        settings = Calibration(prompts=len(calibration))
        found = calibrate(out["torch fp32"], arch, calibration, settings, seed=seed)
    hints = ("f32", "bf16") if has_bf16() else ("f32",)
    for recipe in recipes:

        def quantized(recipe: str = recipe) -> Any:
            pipe = api.load(model)
            ditq.quantize(pipe, recipe, statistics=found, seed=seed)
            return pipe

        out[f"ditq {recipe}, torch engine"] = quantized()
        for hint in hints:
            name = f"ditq {recipe}, OpenVINO{'' if hint == 'f32' else ' bf16'}"
            out[name] = exported(quantized(), shapes, hint)
            if "static" in recipe:
                out[f"{name}, int8 attention"] = exported(quantized(), shapes, hint, "int8", calibration)
    trim()
    return out


def exported(
    pipe: Any, shapes: Shapes, hint: str, attention: Attention = "auto", prompts: list[str] | None = None
) -> Any:
    """The pipeline as OpenVINO runs all of it."""
    options: dict[str, str | int] = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="ditq-bench-") as folder:
        source, out = Path(folder) / "quantized", Path(folder) / "exported"
        pipe.save_pretrained(source)
        ditq.export(
            source, out, shapes=shapes, attention=attention, prompts=prompts, whole_pipeline=True, options=options
        )
        return api.load(out)


def weights_bytes(pipe: Any) -> int:
    """Of the transformer."""
    stacks = [m for m in pipe.transformer.modules() if type(m).__name__ == "CompiledStack"]
    return torch_bytes(pipe.transformer) + sum(openvino_bytes(stack.program.compiled) for stack in stacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=("emoji-t2i", "emoji-class"))
    parser.add_argument("--recipes", nargs="+", default=("rtn-w8a8", "rtn-w4a8", "viditq-w8a8", "viditq-w4a8"))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4, help="batches that every pipeline draws")
    parser.add_argument("--shapes", choices=("dynamic", "static"), default="static", help="of ditq export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="cpu_pictures", help="of the result files")
    args = parser.parse_args()
    import ditq_bundled

    for model in args.models:
        calibration = ditq_bundled.prompts(model, "calibration")[:16]
        prompts = ditq_bundled.prompts(model, "evaluation")
        pipes = pipelines(f"bundled:{model}", list(args.recipes), calibration, args.seed, args.shapes)
        arch = architectures.match(pipes["torch fp32"].transformer)
        for batch in args.batch_sizes:
            seconds: dict[str, list[float]] = {name: [] for name in pipes}
            drawn: dict[str, list[Samples]] = {name: [] for name in pipes}
            for number in range(args.rounds + 1):
                begin = batch * max(0, number - 1)  # the first round is warm-up and draws the same as the second
                wanted = prompts[begin : begin + batch]
                for name, pipe in pipes.items():
                    samples = sample(
                        pipe, arch, wanted, Sampling(seed=args.seed + begin, steps=args.steps, batch_size=batch)
                    )
                    if number:
                        seconds[name].append(samples.seconds[0])
                        drawn[name].append(samples)
            rows = [
                row(name, [1e3 * s for s in values], weights_bytes=weights_bytes(pipes[name]))
                for name, values in seconds.items()
            ]
            closeness = {r.name: psnr(r, drawn) for r in rows}
            title = f"One picture of {model}, {args.steps} steps, drawn {batch} at a time"
            name = f"{args.name}_{model}_batch{batch}"
            save(name, title, rows, BASELINES, arguments=vars(args), psnr_db=closeness)
            for r in rows:
                print(f"  {r.name:44} PSNR dB: " + ", ".join(f"{k} {v:.1f}" for k, v in closeness[r.name].items()))


def psnr(r: Row, drawn: dict[str, list[Samples]]) -> dict[str, float]:
    """Mean over the pictures, against the torch engine of the same plan and against fp32."""

    def mean(reference: str) -> float:
        batches = zip(drawn[reference], drawn[r.name], strict=True)
        return statistics.mean(psnr_db(a, b) for x, y in batches for a, b in zip(x.images, y.images, strict=True))

    found = {} if r.name == "torch fp32" else {"fp32": mean("torch fp32")}
    if not r.name.startswith("ditq"):
        return found
    twin = r.name.partition(", ")[0] + ", torch engine"
    return found if twin == r.name else {**found, "torch engine": mean(twin)}


if __name__ == "__main__":
    main()
