"""The artwork the bundled models learn: emoji of three Apache/MIT sets, drawn at 64 x 64 pixels.

``python artwork.py --out DIR`` fetches one npm package (104 MB, checked by its SHA-256), renders
it and writes ``artwork.npz``: ``images`` [N, 64, 64, 3] uint8 on white, with ``concept`` [N],
``style`` [N] and ``taught`` [N] (whether the diffusion models learn it; the autoencoder sees all).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PACKAGE = "@iconify/json@2.2.535"
TARBALL = "iconify-json-2.2.535.tgz"
SHA256_PREFIX = "1a545f86fa224d65"
PIXELS = 64

# name shown in captions -> (icon set, licence of the artwork)
STYLES = {
    "noto": ("noto", "Apache-2.0"),
    "fluent": ("fluent-emoji-flat", "MIT"),
    "classic": ("noto-v1", "Apache-2.0"),
}

# Concepts a person can tell apart at 64 pixels. Faces, hands, flags, clocks, letters and skin tones
# are left out: they differ in details that so small a model cannot learn in hours on two cores.
CONCEPTS = """
ant baby-chick bat bear beetle bird blossom blowfish boar bouquet bug butterfly cactus camel cat cat-face
cherry-blossom chicken chipmunk cow-face crab cricket crocodile deciduous-tree deer dog-face dolphin dove
dragon dragon-face duck eagle elephant evergreen-tree fallen-leaf fish four-leaf-clover fox frog giraffe goat
gorilla hamster hatching-chick hedgehog herb hibiscus hippopotamus honeybee horse horse-face kangaroo koala
lady-beetle leopard lion lizard llama lobster maple-leaf monkey monkey-face mosquito mouse mouse-face mushroom
octopus owl ox palm-tree panda parrot peacock penguin pig pig-face poodle potted-plant rabbit rabbit-face
raccoon ram rat rhinoceros rooster rose rosette sauropod scorpion seedling shamrock shark shrimp snail snake
spider spiral-shell spouting-whale squid sunflower swan t-rex tiger tiger-face tropical-fish tulip turkey turtle
two-hump-camel unicorn water-buffalo whale white-flower wilted-flower wolf zebra
avocado bacon baguette-bread banana beer-mug bento-box birthday-cake bread broccoli burrito candy carrot
cheese-wedge cherries chestnut chocolate-bar cocktail-glass coconut cooking cookie croissant cucumber cupcake
curry-rice custard cut-of-meat dango doughnut dumpling ear-of-corn egg eggplant french-fries fried-shrimp
glass-of-milk grapes green-apple green-salad hamburger honey-pot hot-beverage hot-dog hot-pepper ice-cream
kiwi-fruit leafy-green lemon lollipop mango meat-on-bone melon moon-cake pancakes peach peanuts pear pie
pineapple pizza popcorn pot-of-food potato poultry-leg pretzel red-apple rice-ball sandwich shortcake
soft-ice-cream spaghetti steaming-bowl strawberry sushi taco takeout-box tangerine tomato tropical-drink
watermelon wine-glass
american-football artist-palette balloon baseball basketball bullseye christmas-tree crystal-ball game-die
jack-o-lantern kite pool-8-ball soccer-ball teddy-bear tennis trophy video-game volleyball wrapped-gift yarn
airplane ambulance anchor automobile bicycle bus castle cloud crescent-moon droplet fire fire-engine
globe-showing-americas helicopter high-voltage house kick-scooter locomotive motor-scooter mount-fuji police-car
racing-car rainbow rocket sailboat snowflake snowman star sun taxi tent tractor umbrella volcano water-wave
backpack basket battery bell bomb books briefcase camera candle crown desktop-computer dress drum envelope
gem-stone glasses graduation-cap guitar hammer handbag headphone high-heeled-shoe hiking-boot jeans key laptop
light-bulb lipstick locked magnet mobile-phone money-bag necktie pill ring running-shoe saxophone scissors
shopping-cart sunglasses syringe t-shirt telephone television toilet top-hat trumpet violin watch
alien alien-monster ghost pile-of-poo red-heart robot skull
""".split()

_SKIN_TONE = re.compile(r"(light|medium|dark)(-skin-tone)?$|-skin-tone")


def caption(concept: str, style: str) -> str:
    """The caption of one picture, e.g. ``"a noto style emoji of a red apple"``."""
    words = concept.replace("-", " ")
    return f"a {style} style emoji of {'an' if words[0] in 'aeiou' else 'a'} {words}"


def fetch(folder: Path) -> Path:
    """Downloads the icon package once and returns its tarball.

    Raises:
        RuntimeError: the tarball is not the one whose checksum is written here.
    """
    tarball = folder / TARBALL
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if not digest.startswith(SHA256_PREFIX):
        raise RuntimeError(f"{tarball} has SHA-256 {digest}, expected {SHA256_PREFIX}…")
    return tarball


def svgs(tarball: Path, sets: dict[str, tuple[str, str]] = STYLES) -> Iterator[tuple[str, str, str]]:
    """Style, concept and SVG text of every icon of the sets; skin-tone variants are skipped."""
    with tarfile.open(tarball) as tar:
        for style, (icon_set, _) in sets.items():
            data = json.load(tar.extractfile(f"package/json/{icon_set}.json"))
            for name, icon in data["icons"].items():
                if _SKIN_TONE.search(name):
                    continue
                w = icon.get("width", data.get("width", 16))
                h = icon.get("height", data.get("height", 16))
                box = f"{icon.get('left', 0)} {icon.get('top', 0)} {w} {h}"
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="{box}">{icon["body"]}</svg>'
                )
                yield style, name, svg


def render(tarball: Path, sets: dict[str, tuple[str, str]] = STYLES) -> dict[str, np.ndarray]:
    """Draws every icon of the sets on white."""
    import resvg_py
    from PIL import Image

    images, concepts, styles = [], [], []
    for style, name, svg in svgs(tarball, sets):
        png = resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, height=PIXELS, background="white")
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        if image.size != (PIXELS, PIXELS):  # icons that are not square keep their aspect
            canvas = Image.new("RGB", (PIXELS, PIXELS), "white")
            image.thumbnail((PIXELS, PIXELS))
            canvas.paste(image, ((PIXELS - image.width) // 2, (PIXELS - image.height) // 2))
            image = canvas
        images.append(np.asarray(image))
        concepts.append(name)
        styles.append(style)
    taught = np.isin(concepts, CONCEPTS)
    return {
        "images": np.stack(images),
        "concept": np.array(concepts),
        "style": np.array(styles),
        "taught": taught,
    }


def load(folder: Path, file: str = "artwork.npz", sets: dict[str, tuple[str, str]] = STYLES) -> dict[str, np.ndarray]:
    """The arrays of ``file``, rendered first where they are missing."""
    path = folder / file
    if not path.exists():
        arrays = render(fetch(folder), sets)
        np.savez_compressed(path, **arrays)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("work"))
    arrays = load(parser.parse_args().out)
    missing = sorted(set(CONCEPTS) - set(arrays["concept"]))
    print(f"{len(arrays['images'])} pictures, {arrays['taught'].sum()} taught, missing concepts: {missing}")
    for style in STYLES:
        print(style, int((arrays["style"] == style).sum()), int((arrays["taught"] & (arrays["style"] == style)).sum()))
