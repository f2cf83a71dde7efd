"""A LoRA of the 16-bit model on quantized ones: does it change the images as it changes those of the 16-bit model?

``python benchmarks/quality/lora.py`` makes an imbalanced copy of ``bundled:emoji-t2i`` (synthetic, see
``imbalanced.py``), quantizes it by each recipe, and adds the same random LoRA to all. It prints PSNR to the 16-bit
images of the same prompts and seeds: without the LoRA, with it, and with it fused by ``ditq.fuse_lora``. The result is
``benchmarks/results/lora.json``. The LoRA makes all models more sensitive to rounding, so that the second column is
lower than the first; round-to-nearest, which balances nothing and so cannot change what an adapter sees, says by how
much.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ditq_bundled
import torch
from peft import LoraConfig, inject_adapter_in_model

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from environment import environment, write
from imbalanced import make_imbalanced

import ditq
from ditq import api, architectures
from ditq.calibration import calibrate
from ditq.metrics.measure import measure
from ditq.recipe import Calibration
from ditq.sampling import Samples, Sampling, sample

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
STATES = ("without", "loaded", "fused")


def load(args: argparse.Namespace) -> Any:
    pipe = api.load(args.model)
    make_imbalanced(pipe.transformer, architectures.match(pipe.transformer), args.seed)
    return pipe


@torch.no_grad()
def add_lora(pipe: Any, args: argparse.Namespace) -> None:
    """Adds the same adapter to every model: random numbers, of the size ``--strength``."""
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
    inject_adapter_in_model(config, pipe.transformer)
    generator = torch.Generator().manual_seed(args.seed)
    for name, p in pipe.transformer.named_parameters():
        if "lora_A" in name:
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
        elif "lora_B" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * args.strength)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-t2i")
    parser.add_argument("--recipes", nargs="+", default=["rtn-w8a8", "smoothquant-w8a8", "viditq-w8a8"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--strength", type=float, default=0.1, help="standard deviation of the numbers of B")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    name = args.model.removeprefix("bundled:")
    prompts = ditq_bundled.prompts(name, "evaluation")[: args.prompts]

    def draw(pipe: Any) -> Samples:
        sampling = Sampling(seed=args.seed, steps=args.steps, batch_size=args.prompts)
        return sample(pipe, architectures.match(pipe.transformer), prompts, sampling)

    def psnr(reference: Samples, samples: Samples) -> dict[str, Any]:
        found = measure(reference, {"row": samples}, metrics=["psnr_db"])
        score: dict[str, Any] = found.scores["row"]["psnr_db"].model_dump(mode="json")
        return score

    pipe = load(args)
    plain = draw(pipe)
    statistics = calibrate(
        pipe, architectures.match(pipe.transformer), ditq_bundled.prompts(name, "calibration"), Calibration(),
        seed=args.seed,
    )  # fmt: skip
    add_lora(pipe, args)
    styled = draw(pipe)
    effect = psnr(plain, styled)
    print(f"imbalanced copy of {args.model}: {len(prompts)} held-out prompts, {args.steps} steps, seed {args.seed}")
    print(f"16 bit with the LoRA, to 16 bit without: {effect['mean']:.2f} dB")
    print(f"{'PSNR dB':20} " + " ".join(f"{state:>8}" for state in STATES))
    rows = {}
    for recipe in args.recipes:
        pipe = load(args)
        ditq.quantize(pipe, recipe, statistics=statistics, seed=args.seed)
        row = {"without": psnr(plain, draw(pipe))}
        add_lora(pipe, args)
        row["loaded"] = psnr(styled, draw(pipe))
        ditq.fuse_lora(pipe)
        row["fused"] = psnr(styled, draw(pipe))
        rows[recipe] = row
        print(f"{recipe:20} " + " ".join(f"{row[state]['mean']:8.2f}" for state in STATES), flush=True)
    result = {**environment(), "arguments": vars(args), "effect_psnr_db": effect, "psnr_db": rows}
    print("written to", write("lora", result))


if __name__ == "__main__":
    main()
