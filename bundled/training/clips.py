"""The clips that ``emoji-video`` learns: emoji artwork put in motion, eight frames of 64 x 64 pixels.

``python clips.py --work DIR`` fetches the artwork of ``artwork.py``, draws ``CLIPS`` clips and writes them, frame by
frame through the autoencoder of ``vae.py --clips``, to ``DIR/clips.npz``: ``latents`` [N, 8, 4, 16, 16] float16 and
``caption`` [N].
The same seed gives the same clips. Artwork: Fluent Emoji flat (MIT), one of the sets of the image models.

A caption names the concept, its motion and, half the time, a background: "a red apple moving left on a blue
background". Some pairs of concept and motion are held out of training, for the evaluation prompts: each concept is
seen in the other motions, never in these.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
from pathlib import Path

import numpy as np
import torch
from artwork import PIXELS, STYLES, fetch, svgs
from torch.nn import functional as F  # noqa: N812

FRAMES, CLIPS, SEED = 8, 2048, 0
STYLE = "fluent"
SOURCE, OVERSAMPLING = 96, 2  # pixels of a cut-out; canvas pixels for each pixel of a frame
GRID = 4  # pixels of a frame for each of its latents

# Shapes and colours that differ at the 32 pixels of a moving object, and that look different turned.
CONCEPTS = """
red-apple carrot pineapple watermelon hamburger pizza eggplant cactus sunflower mushroom
panda pig-face frog penguin owl turtle automobile rocket balloon crown
""".split()

# A motion and its reverse stand five apart: they show the same pictures in another order.
MOTIONS = (
    "moving left", "moving up", "growing", "appearing", "rotating",
    "moving right", "moving down", "shrinking", "disappearing", "bouncing",
)  # fmt: skip
CROSSING = "crossing"  # two objects; the first goes right

# Pale, so that every object stands out.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (190, 220, 255),
    "green": (200, 240, 200),
    "yellow": (255, 235, 170),
    "pink": (255, 200, 220),
}


def words(concept: str) -> str:
    plain = concept.replace("-", " ")
    return f"{'an' if plain[0] in 'aeiou' else 'a'} {plain}"


def caption(concepts: tuple[str, ...], motion: str, background: str = "white") -> str:
    """E.g. ``"a panda and an owl crossing"``; a white background goes without saying."""
    text = f"{' and '.join(words(c) for c in concepts)} {motion}"
    return text if background == "white" else f"{text} on a {background} background"


def captions() -> list[str]:
    """Every caption there can be, for the tokenizer."""
    one = [caption((c,), m, b) for c in CONCEPTS for m in MOTIONS for b in BACKGROUNDS]
    return one + [caption((a, b), CROSSING) for a in CONCEPTS for b in CONCEPTS if a != b]


def held_out() -> list[tuple[tuple[str, ...], str]]:
    """Concepts and motion of every clip that training never sees, two motions a concept and one partner.

    A motion and its reverse are never both held out, so every picture occurs in training, in another order.
    """
    pairs = []
    for i, concept in enumerate(CONCEPTS):
        pairs += [((concept,), MOTIONS[i % 10]), ((concept,), MOTIONS[(i + 3) % 10])]
        pairs.append(((concept, CONCEPTS[(i + 7) % len(CONCEPTS)]), CROSSING))
    return pairs


def pose(motion: str, frame: int, lane: int, which: int = 0) -> tuple[float, float, float, float, float]:
    """Centre x and y and size in pixels, clockwise angle in degrees, opacity, of an object in one frame.

    ``lane`` in [-2, 2] shifts the whole path sideways; ``which`` tells the two objects of a crossing apart. Objects
    move by ``GRID`` pixels, so that the latents of one frame are those of another, shifted: far less to learn.
    """
    u = frame / (FRAMES - 1)
    x = y = PIXELS / 2
    size, angle, opacity = 32.0, 0.0, 1.0
    side = GRID * lane
    forth, back = 18 + GRID * frame, 46 - GRID * frame
    if motion in ("moving left", "moving right"):
        x, y = (forth if motion == "moving right" else back), y + side
    elif motion in ("moving up", "moving down"):
        x, y = x + side, (forth if motion == "moving down" else back)
    elif motion in ("growing", "shrinking"):
        size = 12 + 46 * (u if motion == "growing" else 1 - u)
    elif motion in ("appearing", "disappearing"):
        size, x = 40.0, x + side
        opacity = u if motion == "appearing" else 1 - u
    elif motion == "rotating":
        size, angle, x = 40.0, 360 * frame / FRAMES, x + side
    elif motion == "bouncing":  # twice to the ground
        x, y = x + side, 46 - GRID * (7, 5, 0, 5)[frame % 4]
    elif motion == CROSSING:
        size = 24.0
        x, y = (forth, y - 12) if which == 0 else (back, y + 12)
    else:
        raise ValueError(f"no motion is named {motion!r}; known: {', '.join((*MOTIONS, CROSSING))}")
    return x, y, size, angle, opacity


def cutouts(tarball: Path) -> dict[str, torch.Tensor]:
    """Every concept as [4, SOURCE, SOURCE] in [0, 1]: colours times opacity, then opacity."""
    import resvg_py
    from PIL import Image

    found = {}
    for _, name, svg in svgs(tarball, {STYLE: STYLES[STYLE]}):
        if name in CONCEPTS:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SOURCE, height=SOURCE)
            rgba = torch.from_numpy(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))) / 255
            rgba[..., :3] *= rgba[..., 3:]
            found[name] = rgba.permute(2, 0, 1).contiguous()
    return found


def place(cutout: torch.Tensor, poses: list[tuple[float, float, float, float, float]]) -> torch.Tensor:
    """A cut-out [4, S, S] in each pose: [frames, 4, PIXELS, PIXELS], on nothing."""
    theta = []
    for x, y, size, angle, _ in poses:
        zoom, turn = PIXELS / size, math.radians(angle)
        dx, dy = 2 * x / PIXELS - 1, 2 * y / PIXELS - 1
        cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
        theta.append([[cos, sin, -cos * dx - sin * dy], [-sin, cos, sin * dx - cos * dy]])
    side = PIXELS * OVERSAMPLING
    grid = F.affine_grid(torch.tensor(theta), [len(poses), 4, side, side], align_corners=False)
    drawn = F.grid_sample(cutout.expand(len(poses), -1, -1, -1), grid, align_corners=False)
    opacity = torch.tensor([p[4] for p in poses])
    return F.avg_pool2d(drawn, OVERSAMPLING) * opacity[:, None, None, None]


def clip(
    pictures: dict[str, torch.Tensor],
    concepts: tuple[str, ...],
    motion: str,
    background: str = "white",
    lane: int = 0,
) -> torch.Tensor:
    """One clip, [FRAMES, 3, PIXELS, PIXELS] in [-1, 1]; the last object named lies on top."""
    frames = (torch.tensor(BACKGROUNDS[background]) / 255)[None, :, None, None].expand(FRAMES, 3, PIXELS, PIXELS)
    for which, concept in enumerate(concepts):
        drawn = place(pictures[concept], [pose(motion, i, lane, which) for i in range(FRAMES)])
        frames = frames * (1 - drawn[:, 3:]) + drawn[:, :3]
    return frames * 2 - 1


def plan(count: int, seed: int) -> list[tuple[tuple[str, ...], str, str, int]]:
    """Arguments of ``clip`` for a training set: one crossing in eight, every other motion equally often."""
    rng, closed = random.Random(seed), set(held_out())
    singles = [((c,), m) for c in CONCEPTS for m in MOTIONS if ((c,), m) not in closed]
    chosen = []
    while len(chosen) < count:
        concepts, motion = rng.choice(singles)
        if len(chosen) % 8 == 0:
            concepts, motion = tuple(rng.sample(CONCEPTS, 2)), CROSSING
            if (concepts, motion) in closed:
                continue
        background = rng.choice(list(BACKGROUNDS)[1:]) if motion != CROSSING and rng.random() < 0.5 else "white"
        chosen.append((concepts, motion, background, rng.randint(-2, 2)))
    return chosen


def frames(work: Path, count: int, seed: int) -> torch.Tensor:
    """All frames of ``count`` clips, [count * FRAMES, 3, PIXELS, PIXELS] uint8."""
    pictures = cutouts(fetch(work))
    drawn = torch.empty(count, FRAMES, 3, PIXELS, PIXELS, dtype=torch.uint8)
    for i, arguments in enumerate(plan(count, seed)):
        drawn[i] = clip(pictures, *arguments).add(1).mul(127.5).round().byte()
    return drawn.flatten(0, 1)


@torch.no_grad()
def write(work: Path, count: int, seed: int = SEED) -> None:
    """Draws and encodes what ``clips.npz`` lacks of the first ``count`` clips; saves every 256 of them."""
    from diffusers import AutoencoderKL

    path = work / "clips.npz"
    latents: list[np.ndarray] = []
    if path.exists():
        with np.load(path) as stored:
            latents = list(stored["latents"])
    vae = AutoencoderKL.from_pretrained(work / "video-vae").eval()
    pictures = cutouts(fetch(work))
    chosen = plan(count, seed)
    texts = np.array([caption(*arguments[:3]) for arguments in chosen])
    while len(latents) < count:
        chunk = chosen[len(latents) : min(len(latents) + 32, count)]
        drawn = torch.cat([clip(pictures, *arguments) for arguments in chunk])
        z = vae.encode(drawn).latent_dist.mean * vae.config.scaling_factor
        latents += list(z.unflatten(0, (len(chunk), FRAMES)).half().numpy())
        if len(latents) % 256 == 0 or len(latents) == count:
            temporary = path.with_suffix(".tmp.npz")
            np.savez(temporary, latents=np.stack(latents), caption=texts[: len(latents)])
            os.replace(temporary, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--count", type=int, default=CLIPS)
    args = parser.parse_args()
    write(args.work, args.count)
