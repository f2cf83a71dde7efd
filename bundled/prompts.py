"""Writes the prompt lists of the bundled models: 64 for calibration and 128 for evaluation, 48 of clips.

``python bundled/prompts.py`` is deterministic and gives the committed files back byte for byte. The two
lists of an image model share no concept, so evaluation never sees what calibration saw; styles take turns, so
each has a third of every list. Captions use the first of the three phrasings of the training. Of clips, the
evaluation names pairs of concept and motion that training held out; the calibration names others.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "training"))

import clips  # noqa: E402
from artwork import CONCEPTS, STYLES, caption  # noqa: E402

SEED = 0
SIZES = {"calibration": 64, "evaluation": 128}

# Concepts that the artwork of ``classic`` lacks: the models never saw these pairs.
NOT_IN_CLASSIC = frozenset(
    """
    basket beetle broccoli bullseye coconut cricket cupcake cut-of-meat dumpling giraffe hedgehog hiking-boot
    hippopotamus kangaroo kite leafy-green llama lobster magnet mango moon-cake mosquito parrot peacock pie
    potted-plant pretzel raccoon sandwich sauropod swan t-rex takeout-box teddy-bear yarn zebra
    """.split()
)


def draw(seed: int) -> dict[str, list[str]]:
    """Disjoint lists of concepts, one a split."""
    shuffled = random.Random(seed).sample(CONCEPTS, sum(SIZES.values()))
    lists, start = {}, 0
    for split, size in SIZES.items():
        lists[split] = shuffled[start : start + size]
        start += size
    return lists


def captions(concepts: list[str]) -> list[str]:
    """One caption a concept; each takes the least used of the styles that have a picture of it."""
    used = dict.fromkeys(STYLES, 0)
    style_of = {}
    for concept in sorted(concepts, key=lambda c: c not in NOT_IN_CLASSIC):  # the choosy ones first
        styles = [style for style in STYLES if style != "classic" or concept not in NOT_IN_CLASSIC]
        style_of[concept] = min(styles, key=used.__getitem__)
        used[style_of[concept]] += 1
    return [caption(concept, style_of[concept]) for concept in concepts]


def motions(seed: int) -> dict[str, list[str]]:
    """Captions of clips: half of those with one object name a background, one in six or eight is a crossing."""
    rng = random.Random(seed)
    closed = clips.held_out()
    singles = [((c,), m) for c in clips.CONCEPTS for m in clips.MOTIONS if ((c,), m) not in closed]
    pairs = [((a, b), clips.CROSSING) for a in clips.CONCEPTS for b in clips.CONCEPTS if a != b]
    crossings = [pair for pair in pairs if pair not in closed]
    unseen = [pair for pair in closed if pair[1] != clips.CROSSING]
    partners = [pair for pair in closed if pair[1] == clips.CROSSING]
    chosen = {
        "calibration": rng.sample(singles, 56) + rng.sample(crossings, 8),
        "evaluation": unseen + rng.sample(partners, 8),
    }
    colours = list(clips.BACKGROUNDS)[1:]
    lists = {}
    for split, named in chosen.items():
        rng.shuffle(named)
        lists[split] = [
            clips.caption(c, m, colours[i // 2 % len(colours)] if i % 2 and m != clips.CROSSING else "white")
            for i, (c, m) in enumerate(named)
        ]
    return lists


def main() -> None:
    folder = HERE / "src" / "ditq_bundled" / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for split, concepts in draw(SEED).items():
        (folder / f"emoji-t2i-{split}.txt").write_text("\n".join(captions(concepts)) + "\n", encoding="utf-8")
    for split, concepts in draw(SEED + 1).items():
        (folder / f"emoji-class-{split}.txt").write_text("\n".join(concepts) + "\n", encoding="utf-8")
    for split, texts in motions(SEED + 2).items():
        (folder / f"emoji-video-{split}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
