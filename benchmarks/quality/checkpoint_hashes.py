"""Whether quantization still computes the same checkpoints: one SHA-256 over all tensors, for every recipe.

``python benchmarks/quality/checkpoint_hashes.py`` quantizes ``bundled:emoji-t2i`` by every measured recipe, and the
two other bundled models by one recipe of each family, with few prompts and steps (seed 0, one thread). It compares
each checkpoint with ``benchmarks/results/checkpoint_hashes.json`` and exits with status 1 if
any differs. ``--write`` writes the file again. Floating-point sums depend on the processor: compare on the model that
the file names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import ditq_bundled
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import RESULTS, environment, write

import ditq
from ditq import recipe as recipes

FILE = "checkpoint_hashes"
PROMPTS = {"emoji-t2i": 16, "emoji-class": 16, "emoji-video": 4}


def jobs() -> list[tuple[str, str]]:
    """(model, recipe) of every checkpoint."""
    others = [(model, f"{name}-w4a8") for model in ("emoji-class", "emoji-video") for name in recipes.families()]
    return [("emoji-t2i", name) for name in recipes.names()] + others


def prompts(model: str, pipe: Any) -> list[str]:
    if model == "emoji-class":
        return list(pipe.labels)[::7][: PROMPTS[model]]
    return ditq_bundled.prompts(model, "calibration")[: PROMPTS[model]]


def steps(model: str, recipe: str) -> list[str]:
    few = "calibration.steps=4" if model == "emoji-video" else "calibration.steps=10" if "qdit" in recipe else ""
    return [few] if few and recipes.load(recipe).needs_calibration else []


def digest(model: str, recipe: str) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors as they are saved."""
    pipe = ditq.load(f"bundled:{model}")
    pipe.set_progress_bar_config(disable=True)
    needed = {"prompts": prompts(model, pipe)} if recipes.load(recipe).needs_calibration else {}
    ditq.quantize(pipe, recipe, overrides=steps(model, recipe), seed=0, **needed)
    tensors, _ = pipe.transformer.hf_quantizer.get_state_dict_and_metadata(pipe.transformer.state_dict())
    whole = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        data = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        one = hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode() + data).hexdigest()
        whole.update(f"{name} {one}\n".encode())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results file instead of comparing with it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    known: dict[str, str] = {}
    if not args.write:
        known = json.loads((RESULTS / f"{FILE}.json").read_text())["sha256"]
    found: dict[str, str] = {}
    for model, recipe in jobs():
        key = f"{model}/{recipe}"
        found[key] = digest(model, recipe)
        verdict = "" if args.write else "equal" if known.get(key) == found[key] else "DIFFERS"
        print(f"{key:40} {found[key][:16]} {verdict}")
    if args.write:
        print(write(FILE, {**environment(), "sha256": found}))
    elif found != known:
        sys.exit(1)


if __name__ == "__main__":
    main()
