"""Peak memory of quantizing a video transformer of real size by ViDiT-Q, calibration included.

``python benchmarks/quality/calibration_memory.py`` builds a Latte-1 for 16 frames of 256 x 256 pixels (28 spatial and
28 temporal blocks, width 1152, random weights in float32) and quantizes it by a recipe through its pipeline. It
reports the peak memory of the process after each stage, weights and libraries included. It uses one step and two
prompts, which is the calibration batch at this size. More of them take more time but not more memory, because the
sample of inputs is bounded.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, write

import ditq
from ditq import api, architectures

PROMPTS = ["a noto style emoji of a red apple", "a fluent style emoji of a red apple"]  # of as many tokens
LIMIT_GIB = 8.0  # what calibration shall stay within


def pipeline(args: argparse.Namespace) -> Any:
    """A LattePipeline of real size around text encoder and autoencoder of a bundled model."""
    import diffusers

    small = api.load("bundled:emoji-t2i")
    sizes = {**architectures.load("latte").sizes["Latte-1"], "caption_channels": small.text_encoder.config.d_model}
    sizes |= {"num_layers": args.blocks, "video_length": args.frames, "sample_size": args.side // 8}
    torch.manual_seed(args.seed)
    transformer = diffusers.LatteTransformer3DModel(**sizes).to(getattr(torch, args.dtype)).eval()
    text_encoder = small.text_encoder.to(transformer.dtype)
    pipe = diffusers.LattePipeline(small.tokenizer, text_encoder, small.vae, transformer, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def peak() -> float:
    """Of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="viditq-w4a8")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = pipeline(args)
    model = pipe.transformer
    parameters = sum(p.numel() for p in model.parameters())
    tokens = args.frames * (args.side // 16) ** 2
    peaks = {"model": peak()}
    print(f"{parameters / 1e6:.0f} M parameters, {tokens} tokens a video, {args.dtype}: {peak():.2f} GiB", flush=True)

    def tell(stage: str, done: int, total: int) -> None:
        peaks[stage] = peak()
        print(f"{stage} {done}/{total}: {peak():.2f} GiB", end="\n" if done == total else "\r", flush=True)

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        plan = ditq.quantize(
            pipe, args.recipe, prompts=PROMPTS[: args.prompts], cache=Path(cache),
            overrides=[f"calibration.steps={args.steps}"], progress=tell, seed=args.seed,
        ).plan  # fmt: skip
    result = {
        **environment(), "arguments": vars(args), "parameters": parameters, "tokens": tokens,
        "layers": len(plan.quantized), "peak_gib": peak(), "peak_gib_by_stage": peaks, "limit_gib": LIMIT_GIB,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip
    print(f"peak {peak():.2f} GiB, of {LIMIT_GIB:g}; written to {write('calibration_memory', result)}")
    if peak() > LIMIT_GIB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
