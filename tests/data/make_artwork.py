"""Makes ``artwork.png``: 256 real images that the bundled models learned, 16 x 16 of them, 64 x 64 pixels each.

``python tests/data/make_artwork.py --work DIR`` (fetches the artwork, see ``bundled/training/artwork.py``). Every
image is of another concept; ``artwork.json`` names them, row by row, as [style, concept]. Styles ``noto`` and
``classic`` are Noto Emoji (Apache-2.0), ``fluent`` is Fluent Emoji (MIT).
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "bundled" / "training"))
from artwork import load  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--work", type=Path, default=Path("work"))
art = load(parser.parse_args().work)
chosen = random.Random(0).sample(sorted(set(art["concept"][art["taught"]])), 256)
rows = []
for i, concept in enumerate(chosen):
    found = np.flatnonzero(art["taught"] & (art["concept"] == concept))
    rows.append(int(found[i % len(found)]))
sheet = np.concatenate([np.concatenate(list(art["images"][rows[r : r + 16]]), axis=1) for r in range(0, 256, 16)])
Image.fromarray(sheet).save(HERE / "artwork.png", optimize=True)
(HERE / "artwork.json").write_text(json.dumps([[str(art["style"][i]), str(art["concept"][i])] for i in rows]))
