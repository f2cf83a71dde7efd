"""Every recipe on a bundled video model: fidelity to the 16-bit videos of the same prompts and seeds, and motion.

``python benchmarks/quality/text_to_video.py`` quantizes ``bundled:emoji-video`` by all recipes and generates 32
held-out prompts with each. It prints a table with 95 % bootstrap intervals and paired differences, and writes
``benchmarks/results/text_to_video.json``, a sheet of frames and an animation of four rows side by side. PSNR and SSIM
are means over the frames of a video.

Videos and finished rows are kept in ``--folder``: run the command again to resume. Several processes with different
``--widths`` can fill it before one run over all of them writes the table.
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
from _recipes import FIDELITY, WIDTHS, Column, recipe_of, show_differences, show_incoherence, tabulate
from environment import RESULTS, environment, write

from ditq import api, architectures
from ditq.calibration import calibrate
from ditq.comparison import BUNDLED_NETWORK
from ditq.recipe import Calibration
from ditq.report.video import overview, save_gif, side_by_side

ANIMATED = ("16 bit", "viditq-w8a8", "viditq-w4a8", "rtn-w4a8")
METHODS = ("rtn-static", "rtn", "smoothquant", "quarot", "ptq4dit", "qdit", "viditq")
VARIANTS = {
    "rtn-w4a8 clip=mse": ("rtn-w4a8", ["clip=mse"]),
    "viditq-w4a8 clip=minmax": ("viditq-w4a8", ["clip=minmax"]),
}
COLUMNS = (
    *FIDELITY, Column("delta_flow", "dFlow px", 3), Column("warping_error", "warping error", 4),
    Column("concept_accuracy", "concept accuracy", 3),
)  # fmt: skip
MOTION = ("flow_score", "dynamic_degree", "motion_smoothness", "subject_consistency", "scene_consistency")
DIFFERENCES = {"psnr_db": "PSNR dB", "delta_flow": "dFlow px"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-video")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--widths", nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--folder", type=Path, default=Path("text_to_video"), help="keeps videos and statistics")
    parser.add_argument("--name", default="text_to_video", help="name of the result file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    name = args.model.removeprefix("bundled:")
    prompts = ditq_bundled.prompts(name, "evaluation")[: args.prompts]
    pipe = api.load(args.model)
    settings = Calibration(steps=args.steps, guidance_scale=args.guidance, calls=1)
    statistics = calibrate(
        pipe, architectures.match(pipe.transformer), ditq_bundled.prompts(name, "calibration"), settings,
        seed=args.seed, cache=args.folder / "calibration", resume=True,
    )  # fmt: skip
    wanted: dict[str, tuple[str, list[str]]] = {}
    for width in args.widths:
        rows = {f"{method}-{width}": recipe_of(method, width) for method in args.methods}
        wanted |= rows | {row: variant for row, variant in VARIANTS.items() if variant[0] in rows}
    table = tabulate(
        args.model, lambda: api.load(args.model), prompts, statistics, wanted, seed=args.seed,
        sampler={"steps": args.steps, "guidance_scale": args.guidance, "batch_size": args.batch_size},
        metrics=[*(column.metric for column in COLUMNS), *MOTION], columns=COLUMNS, network=BUNDLED_NETWORK,
        folder=args.folder,
    )  # fmt: skip
    differences = {metric: table.differences(metric, args.methods, args.widths) for metric in DIFFERENCES}
    for metric, found in differences.items():
        show_differences(found, f"{DIFFERENCES[metric]}, ViDiT-Q minus the other", "viditq")
    if "viditq-w4a8" in table.rows:
        show_incoherence("viditq-w4a8", table.rows["viditq-w4a8"])
    result: dict[str, Any] = {
        **environment(), "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "calibration": settings.model_dump(mode="json"), "network": BUNDLED_NETWORK, "prompts": prompts,
        "rows": table.rows, "paired": differences, "values": table.values,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    chosen = {row: table.pictures[row] for row in ANIMATED if row in table.pictures}
    overview(table.pictures, prompts[:2]).save(RESULTS / f"{args.name}.png", optimize=True)
    columns = 6
    frames = side_by_side({row: videos[:columns] for row, videos in chosen.items()}, prompts[:columns])
    save_gif(frames, RESULTS / f"{args.name}.gif")
    print("\nwritten to", write(args.name, result))


if __name__ == "__main__":
    main()
