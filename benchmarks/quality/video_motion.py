"""Whether the motion in a generated clip is that of its prompt, judged from the pixels alone, for ``emoji-video``.

``python benchmarks/quality/video_motion.py`` generates the evaluation prompts, which were held out from training, with
the 16-bit model and with each of ``--recipes``. It classifies every clip as one of the eleven motions, prints how
often that is the named motion, and writes ``benchmarks/results/video_motion.json``.

The object of a clip is all that differs from its background. For every frame the program computes the object's centre,
spread, opacity, how far its upper half is right of its lower half, and its rotation against the fullest frame. It
compares these with the trajectory of each motion in ``bundled/training/clips.py``, and with an object that stands
still; the nearest one is the result. It uses neither the prompt nor the identity of the object.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "bundled" / "training"))
import clips
from environment import environment, write

STILL = "still"
MOTIONS = (*clips.MOTIONS, clips.CROSSING, STILL)
# What counts as one unit of difference: pixels of the centre, of the halves' distance; logarithm of the spread;
# opacity; share of frames turned differently.
SCALES = {"centre": 6.0, "halves": 10.0, "spread": 0.3, "opacity": 0.3, "turn": 0.5}
FAINT = 0.1  # frames with less ink than this share of the fullest show nothing whose place could be told
TURNS = 8


def ink(frames: Tensor) -> Tensor:
    """How much each pixel of [F, 3, H, W] in [0, 1] differs from the background, [F, H, W] in [0, 1].

    The background is the median colour of the frame's outermost two pixels, over all frames.
    """
    edge = torch.cat([frames[..., :2, :].flatten(2), frames[..., -2:, :].flatten(2)], 2)
    colour = edge.transpose(0, 1).flatten(1).median(1).values
    difference = (frames - colour[:, None, None]).abs().amax(1)
    return (difference - 0.1).clamp(min=0)  # the decoder's noise


def halves(drawn: Tensor) -> float:
    """How many pixels the centre of the upper half of one frame's ink [H, W] lies right of that of the lower half."""
    at = torch.arange(drawn.shape[-1]) + 0.5
    rows = drawn.sum(1)
    upper = at < float((rows * at).sum() / rows.sum())
    x = [float((part.sum(0) * at).sum() / part.sum().clamp(min=1e-6)) for part in (drawn[upper], drawn[~upper])]
    return x[0] - x[1]


def turns(frames: Tensor, centres: Tensor, spreads: Tensor, reference: int) -> list[int]:
    """Eighths of a clockwise turn that take the reference frame to each of [F, C, H, W], cut out at one size."""
    pixels = frames.shape[-1]

    def cut(frame: int, eighths: int) -> Tensor:
        angle = 2 * math.pi * eighths / TURNS
        zoom = float(2.2 * spreads[frame]) / (pixels / 2)
        dx, dy = (2 * centres[frame] / pixels - 1).tolist()
        cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
        theta = torch.tensor([[[cos, sin, dx], [-sin, cos, dy]]])
        grid = F.affine_grid(theta, [1, frames.shape[1], 24, 24], align_corners=False)
        found = F.grid_sample(frames[frame][None], grid, align_corners=False).flatten()
        return found / found.norm().clamp(min=1e-6)

    still = cut(reference, 0)
    return [int(np.argmax([float(cut(f, -e) @ still) for e in range(TURNS)])) for f in range(len(frames))]


def trajectory(frames: Tensor) -> dict[str, np.ndarray]:
    """What a clip [F, 3, H, W] in [0, 1] shows, frame by frame.

    Returns:
        ``centre`` [F, 2], ``halves`` [F], ``spread`` [F] without their means, ``opacity`` [F] with 1 as the highest,
        ``turn`` [F] in eighths; ``seen`` [F] tells where there is enough ink. Empty where no frame shows anything.
    """
    drawn = ink(frames)
    mass = drawn.sum((1, 2))
    if mass.max() < 10:
        return {}
    at = torch.arange(drawn.shape[-1]) + 0.5
    safe = mass.clamp(min=1e-6)
    x, y = (drawn.sum(1) * at).sum(1) / safe, (drawn.sum(2) * at).sum(1) / safe
    away = (at[None, None, :] - x[:, None, None]) ** 2 + (at[None, :, None] - y[:, None, None]) ** 2
    spread = ((drawn * away).sum((1, 2)) / safe).sqrt().clamp(min=1)
    density = mass / spread**2
    seen = mass > FAINT * mass.max()
    centres = torch.stack([x, y], 1)
    deviating = frames - frames[:, :, :2].flatten(2).median(2).values[..., None, None]
    found = {
        "centre": centres - centres[seen].mean(0),
        "halves": torch.tensor([halves(one) if there else 0.0 for one, there in zip(drawn, seen, strict=True)]),
        "spread": spread.log() - spread.log()[seen].mean(),
        "opacity": density / density[seen].max(),
        "turn": torch.tensor(turns(deviating, centres, spread, int(mass.argmax()))),
    }
    found["halves"] -= found["halves"][seen].mean()
    values = {name: value.numpy() for name, value in found.items()} | {"seen": seen.numpy()}
    values["opacity"][mass.numpy() < 0.02 * float(mass.max())] = 0.0
    return values


def expected(motion: str, count: int) -> dict[str, np.ndarray]:
    """The same of an ideal clip of ``count`` frames."""
    poses = [(32.0, 32.0, 36.0, 0.0, 1.0) if motion == STILL else clips.pose(motion, f, 0) for f in range(count)]
    x, y, size, angle, opacity = (np.array(values) for values in zip(*poses, strict=True))
    centre, apart = np.stack([x, y], 1), np.zeros(count)
    if motion == clips.CROSSING:
        apart = x - np.array([clips.pose(motion, f, 0, 1)[0] for f in range(count)])
        centre = np.zeros((count, 2))
    return {
        "centre": centre, "halves": apart, "spread": np.log(size), "opacity": opacity,
        "turn": np.round(angle / (360 / TURNS)).astype(int),
    }  # fmt: skip


def distance(found: dict[str, np.ndarray], motion: str) -> float:
    """How far a clip's trajectory is from that of a motion, in the units of ``SCALES``."""
    seen = found["seen"]
    ideal = expected(motion, len(seen))
    for name in ("centre", "spread", "halves"):
        ideal[name] = ideal[name] - ideal[name][seen].mean(0)
    fullest = int(np.argmax(np.where(found["turn"] == 0, found["opacity"], -1)))
    differences = {
        name: np.sqrt(np.mean((found[name] - ideal[name])[seen] ** 2)) for name in ("centre", "halves", "spread")
    }
    differences["opacity"] = np.sqrt(np.mean((found["opacity"] - ideal["opacity"]) ** 2))
    turned = (ideal["turn"] - ideal["turn"][fullest]) % TURNS
    differences["turn"] = np.mean((found["turn"] != turned)[seen])
    return float(sum((value / SCALES[name]) ** 2 for name, value in differences.items()))


def shown(frames: Tensor) -> str:
    """The motion that a clip [F, 3, H, W] in [0, 1] shows, one of ``MOTIONS``; ``"nothing"`` of an empty one."""
    found = trajectory(frames)
    return min(MOTIONS, key=lambda motion: distance(found, motion)) if found else "nothing"


def named(prompt: str) -> str:
    """The motion in a prompt."""
    text = prompt.split(" on a ")[0]
    return next(motion for motion in (*clips.MOTIONS, clips.CROSSING) if text.endswith(f" {motion}"))


def tensor(video: Sequence[Any]) -> Tensor:
    """Frames as PIL images to [F, 3, H, W] in [0, 1]."""
    return (
        torch.stack([torch.from_numpy(np.asarray(f.convert("RGB")).copy()) for f in video]).permute(0, 3, 1, 2) / 255
    )


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share."""
    p, n = right / total, total
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def tally(prompts: Sequence[str], videos: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Of clips and their prompts: how many show the named motion, in all and by motion, and what the others show."""
    judged = [(named(prompt), shown(tensor(video))) for prompt, video in zip(prompts, videos, strict=True)]
    right = [asked == seen for asked, seen in judged]
    motions = dict.fromkeys(asked for asked, _ in judged)
    return {
        "right": sum(right), "of": len(right), "interval": wilson(sum(right), len(right)),
        "by_motion": {m: [sum(a == s for a, s in judged if a == m), sum(a == m for a, _ in judged)] for m in motions},
        "mistakes": dict(Counter(f"{asked}: {seen}" for asked, seen in judged if asked != seen)),
        "shown": [seen for _, seen in judged],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:emoji-video")
    parser.add_argument("--recipes", nargs="*", default=["viditq-w8a8", "viditq-w4a8", "rtn-w4a8"])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="video_motion", help="name of the result file")
    args = parser.parse_args()

    import ditq_bundled

    import ditq
    from ditq import api, architectures
    from ditq.sampling import Sampling, sample

    name = args.model.removeprefix("bundled:")
    prompts = ditq_bundled.prompts(name, "evaluation")[: args.prompts]
    rows = {}
    for recipe in (None, *args.recipes):
        pipe = api.load(args.model)
        if recipe:
            ditq.quantize(pipe, recipe, prompts=ditq_bundled.prompts(name, "calibration"), seed=args.seed)
        sampling = Sampling(seed=args.seed, steps=args.steps, guidance_scale=args.guidance, batch_size=16)
        drawn = sample(pipe, architectures.match(pipe.transformer), prompts, sampling)
        row = rows[recipe or "16 bit"] = tally(prompts, drawn.images)
        low, high = row["interval"]
        print(f"{recipe or '16 bit':14} {row['right']} of {row['of']}, {low:.2f} to {high:.2f}", flush=True)
        for motion, (right, of) in row["by_motion"].items():
            print(f"  {motion:14} {right} of {of}")
        print(f"  mistakes: {row['mistakes']}", flush=True)
    result = {**environment(), "arguments": vars(args), "prompts": prompts, "rows": rows}
    print("written to", write(args.name, result))


if __name__ == "__main__":
    main()
