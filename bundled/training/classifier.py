"""Trains the emoji classifier: a small ResNet that ditq's metrics look through, for the bundled models.

``python classifier.py --work DIR`` draws the artwork (five sets), passes it through the bundled autoencoder, trains or
resumes, measures on held-out artwork and on pictures of the bundled diffusion models, and writes
``../src/ditq_bundled/networks/emoji-classifier``: a stock ``ResNetForImageClassification`` folder with its card, and
``reference.safetensors``, the features of the pictures that the diffusion models learned.

Every step draws its batch from its own seed, so an interrupted run goes on as if it had not been interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ditq_bundled
import numpy as np
import torch
from artwork import PIXELS, STYLES, fetch, load
from assemble import half, loss_curve, minutes
from augment import augment
from common import Ema, Run, schedule
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812
from transformers import ResNetConfig, ResNetForImageClassification

from ditq.metrics import aggregate
from ditq.metrics.networks.base import Features
from ditq.metrics.networks.emoji import EmojiClassifier

NAME = "emoji-classifier"
MORE = {"fluent-3d": ("fluent-emoji", "MIT"), "fx": ("fxemoji", "Apache-2.0")}
CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Hour hands, and pairs that a mirrored picture would confuse.
UNFIT = ("oclock", "thirty", "-left", "-right", "left-", "right-")

# What FxEmoji calls some concepts; most of its other names are Unicode's without hyphens.
FX_NAMES = {
    "americasglobe": "globe-showing-americas", "aubergine": "eggplant", "billiards": "pool-8-ball",
    "blackscissors": "scissors", "blacktelephone": "telephone", "bunny": "rabbit-face", "bunnyside": "rabbit",
    "cat": "cat-face", "catside": "cat", "cellphone": "mobile-phone", "chilipepper": "hot-pepper",
    "curryandrice": "curry-rice", "directhit": "bullseye", "dog": "dog-face", "dogside": "dog",
    "doveofpeace": "dove", "dragonhead": "dragon-face", "dragonside": "dragon", "dromedarycamel": "camel",
    "earofmaize": "ear-of-corn", "europeancastle": "castle", "evergreen": "evergreen-tree",
    "fallingleaf": "fallen-leaf", "gem": "gem-stone", "hampster": "hamster", "heels": "high-heeled-shoe",
    "housebuilding": "house", "leopardside": "leopard", "lock": "locked", "mouse": "mouse-face",
    "mouseside": "mouse", "pandaface": "panda", "pig": "pig-face", "pigside": "pig", "poo": "pile-of-poo",
    "present": "wrapped-gift", "racecar": "racing-car", "sliceofpizza": "pizza", "spurtingwhale": "spouting-whale",
    "steamlocomotive": "locomotive", "tie": "necktie", "tiger": "tiger-face", "tigerside": "tiger",
    "wave": "water-wave", "wolfface": "wolf",
}  # fmt: skip

CONFIG = {
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 2, 2, 2],
    "layer_type": "basic",
}
# Noise on unit-variance latents before they are decoded again; what diffusion and quantization leave is of this kind.
LATENT_NOISE = (0.0, 0.2, 0.4)
NEAR_COPY = 14  # dB of PSNR


def pictures(work: Path) -> dict[str, np.ndarray]:
    """The artwork of the classes: ``images`` [N, 64, 64, 3] uint8 with ``concept``, ``style`` and ``taught`` [N].

    Classes are the taught concepts, and those of the categories above that three of the four sets with Unicode's
    names drew; all their pictures count, also FxEmoji's.
    """
    parts = [load(work), load(work, "artwork-more.npz", MORE)]
    art = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    wanted = set()
    with tarfile.open(fetch(work)) as tar:
        for icons, _ in STYLES.values():
            named = json.load(tar.extractfile(f"package/json/{icons}.json"))["categories"]
            wanted |= {name for category in CATEGORIES for name in named[category]}
    is_fx = art["style"] == "fx"
    drawn = Counter(art["concept"][~is_fx].tolist())
    taught = set(art["concept"][art["taught"]].tolist())
    fit = {c for c in wanted if drawn[c] >= 3 and not any(word in c for word in UNFIT)} | taught
    by_fx_name = {c.replace("-", ""): c for c in fit} | FX_NAMES
    art["concept"] = np.array(
        [by_fx_name.get(c.replace("-", ""), "") if fx else c for c, fx in zip(art["concept"], is_fx, strict=True)]
    )
    art["taught"] = art["taught"] & ~is_fx & (art["style"] != "fluent-3d")
    kept = np.isin(art["concept"], sorted(fit))
    return {key: values[kept] for key, values in art.items()}


def decoded(work: Path, images: torch.Tensor) -> torch.Tensor:
    """What the bundled autoencoder makes of uint8 pictures [N, 3, 64, 64], at each latent noise: [3, N, 3, 64, 64]."""
    from diffusers import AutoencoderKL

    path = work / "classifier-decoded.npy"
    if not path.exists():
        vae = AutoencoderKL.from_pretrained(ditq_bundled.path("emoji-t2i") / "vae").float()
        generator = torch.Generator().manual_seed(0)
        levels = []
        with torch.no_grad():
            means = [vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(64)]
            for sigma in LATENT_NOISE:
                noisy = (z + sigma * torch.randn(z.shape, generator=generator) for z in means)
                levels.append(torch.cat([to_bytes(vae.decode(z).sample * 0.5 + 0.5) for z in noisy]))
        np.save(path, torch.stack(levels).numpy())
    return torch.from_numpy(np.load(path))


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def hold_out(concepts: np.ndarray, seed: int) -> np.ndarray:
    """[N] bool: one picture of every concept that has at least three, drawn by lot."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(concepts), dtype=bool)
    for concept in np.unique(concepts):
        rows = np.flatnonzero(concepts == concept)
        if len(rows) >= 3:
            held[rng.choice(rows)] = True
    return held


def batches(
    versions: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, size: int, seed: int, first: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless augmented batches ([size, 3, 64, 64] in [0, 1], [size]) from step ``first`` on.

    ``versions`` [V, N, 3, 64, 64] uint8 holds the artwork and what the autoencoder made of it; half of a batch is
    the artwork itself.
    """
    step = first
    while True:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.multinomial(weights, size, replacement=True, generator=rng)
        decoded = torch.randint(1, len(versions), (size,), generator=rng)
        version = torch.where(torch.rand(size, generator=rng) < 0.5, 0, decoded)
        yield augment(versions[version, rows].float() / 255, rng), labels[rows]
        step += 1


class Normalised:
    """Channel means and deviations of the training pictures, as the preprocessor of the network states them."""

    def __init__(self, images: torch.Tensor) -> None:
        x = images.float().div(255)
        self.mean = x.mean((0, 2, 3)).mul(1000).round().div(1000)
        self.std = x.std((0, 2, 3)).mul(1000).round().div(1000)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean[:, None, None]) / self.std[:, None, None]
        return x.to(memory_format=torch.channels_last)


def new_network(names: list[str]) -> ResNetForImageClassification:
    labels = [name.replace("-", " ") for name in names]
    config = ResNetConfig(
        **CONFIG,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def train(args: argparse.Namespace, network: torch.nn.Module, versions, labels, weights, normalised) -> Run:
    """Trains to ``args.steps``, from the checkpoint where there is one; leaves the averaged weights in ``network``."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=args.lr
    )
    ema = Ema({"network": network}, 0.998)
    run = Run(args.work / "classifier", {"network": network}, [optimizer], ema)
    network.train()
    average = run.log[-1]["loss"] if run.log else 0.0
    data = batches(versions, labels, weights, args.batch, args.seed, run.step)
    while run.step < args.steps:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(run.step, args.steps, final=0.02)
        x, y = next(data)
        loss = F.cross_entropy(network(normalised(x)).logits, y, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        run.step += 1
        ema.update(run.step)
        average = loss.item() if average == 0 else 0.98 * average + 0.02 * loss.item()
        if run.step % 25 == 0:
            run.record(loss=average)
        if run.step % 200 == 0:
            run.save()
    run.save()
    ema.copy_to({"network": network})
    # Averaged weights have other activations than any step had: batch statistics are taken again.
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean over batches
    with torch.no_grad():
        for _ in range(60):
            network(normalised(next(data)[0]))
    network.eval()
    return run


def drawn(work: Path) -> dict[str, np.ndarray]:
    """Pictures [128, 64, 64, 3] of each bundled diffusion model: its evaluation prompts, 20 steps, seeds 0 to 127."""
    from ditq import api, architectures
    from ditq.sampling import sample

    path = work / "classifier-drawn.npz"
    if not path.exists():
        found = {}
        for name in ditq_bundled.names():
            pipe = api.load(f"bundled:{name}")
            samples = sample(
                pipe, architectures.match(pipe.transformer), ditq_bundled.prompts(name, "evaluation"), steps=20
            )
            found[name] = np.stack([np.asarray(image) for image in samples.images])
        np.savez_compressed(path, **found)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def export(network: ResNetForImageClassification, normalised: Normalised, folder: Path) -> None:
    """Writes the stock folder: 16-bit weights that load as float32, and how pictures are normalised."""
    shutil.rmtree(folder, ignore_errors=True)
    half(network.to(memory_format=torch.contiguous_format)).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "size": {"height": PIXELS, "width": PIXELS},
        "resample": 2,
        "do_normalize": True,
        "image_mean": [round(v, 3) for v in normalised.mean.tolist()],
        "image_std": [round(v, 3) for v in normalised.std.tolist()],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def see(extractor: EmojiClassifier, images: torch.Tensor) -> Features:
    """Features of uint8 pictures [n, 3, 64, 64]."""
    with torch.no_grad():
        return Features.cat([extractor.features(x.float() / 255) for x in images.split(128)])


def write_reference(extractor: EmojiClassifier, images: torch.Tensor, names: list[str], folder: Path) -> None:
    """What the network sees in the pictures that the diffusion models learned, as ``style/concept`` names them."""
    seen = see(extractor, images)
    arrays = {key: getattr(seen, key).half().contiguous() for key in ("pooled", "spatial", "probabilities")}
    # One key only: the order of several is not fixed, and the file should be the same every time.
    save_file(arrays, folder / "reference.safetensors", metadata={"pictures": json.dumps(names)})


def likeness(art: dict[str, np.ndarray], held: np.ndarray) -> np.ndarray:
    """Of every held-out picture: PSNR in dB to the most similar training picture of its concept."""
    images = art["images"].astype(np.float32)
    trained = {c: images[(art["concept"] == c) & ~held] for c in np.unique(art["concept"])}
    errors = [((trained[art["concept"][i]] - images[i]) ** 2).mean((1, 2, 3)).min() for i in np.flatnonzero(held)]
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-6))


def row(what: str, seen: Features, labels: torch.Tensor, chosen: np.ndarray | None = None) -> str:
    """A line of the card's table: top-1 and top-5 in per cent with their 95 % intervals."""
    best = seen.probabilities.topk(5, dim=1).indices == labels[:, None]
    if chosen is not None:
        best = best[torch.from_numpy(chosen)]
    cells = [aggregate(100 * hits.float().numpy()) for hits in (best[:, 0], best.any(1))]
    return (
        f"| {what} | {len(best)} | "
        + " | ".join(f"{c.mean:.1f} [{c.ci95[0]:.1f}, {c.ci95[1]:.1f}]" for c in cells)
        + " |"
    )


def table(
    extractor: EmojiClassifier, art: dict[str, np.ndarray], held: np.ndarray, versions: torch.Tensor,
    labels: torch.Tensor, pictures_drawn: dict[str, np.ndarray],
) -> str:  # fmt: skip
    """Accuracy on what the network was not trained on."""
    test = torch.from_numpy(held)
    y = labels[test]
    seen = see(extractor, versions[0][test])
    known = np.isin(art["concept"], art["concept"][art["taught"]])[held]
    unlike = likeness(art, held) < NEAR_COPY
    lines = [
        row("held-out artwork", seen, y),
        row(f"… without a near copy (under {NEAR_COPY} dB to any training picture of the concept)", seen, y, unlike),
        row("… of the concepts that the diffusion models learn", seen, y, known),
        row("… of these, without a near copy", seen, y, known & unlike),
    ]
    for style in (*STYLES, *MORE):
        of_style = (art["style"] == style)[held]
        copies = f"{100 * (~unlike[of_style]).mean():.0f} % with a near copy"
        lines.append(row(f"… in style `{style}` ({copies})", seen, y, of_style))
    lines.append(row("held-out artwork through the bundled autoencoder", see(extractor, versions[1][test]), y))
    for sigma, version in zip(LATENT_NOISE[1:], versions[2:], strict=True):
        lines.append(row(f"… with latent noise {sigma}", see(extractor, version[test]), y))
    for model, images in pictures_drawn.items():
        wanted = [
            re.sub(r".* emoji of an? ", "", p).replace("-", " ") for p in ditq_bundled.prompts(model, "evaluation")
        ]
        y = torch.tensor([list(extractor.labels).index(concept) for concept in wanted])
        seen = see(extractor, torch.from_numpy(images).permute(0, 3, 1, 2))
        lines.append(row(f"drawn by `{model}` from its evaluation prompts", seen, y))
    return "\n".join(lines)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags: [resnet, emoji]
---
# {name}

A small ResNet ({parameters:.1f} M parameters) that tells {classes} concepts of emoji artwork apart at 64 x 64 pixels.
ditq's metrics look through it where the bundled diffusion models are measured: its pooled features carry distribution
distances, its probabilities say whether a picture shows what was asked for. Numbers seen through it can be compared
with one another, not with those of other networks.

| | |
| --- | --- |
| network | `ResNetForImageClassification`, basic blocks {depths}, widths {widths}, pooled features {width} |
| artwork | {pictures} pictures rendered from `@iconify/json` 2.2.535: {trained} for training, {held} held out |
| styles | {styles} |
| licences | Noto Emoji, its first version and FxEmoji: Apache-2.0; Fluent Emoji, flat and 3-D: MIT |
| classes | the {taught} concepts of the diffusion models, and those of {categories} that three sets share |
| held out | one picture of every concept that has at least three, drawn by lot |
| augmentation | warps, colour, blur, JPEG-like blocks, posterizing, noise, erased squares; half of the pictures went \
through the bundled autoencoder, two thirds of those with noise on the latents |
| optimizer | AdamW, label smoothing 0.1, batch {batch}, averaged weights (0.998), seed {seed} |
| training | {steps} steps, about {minutes:.0f} minutes on a shared CPU core; last loss {loss:.2f} |
| weights | fp16 safetensors, made from float32 |

Made by `bundled/training/classifier.py` of the ditq repository.

## Accuracy

Per cent with 95 % bootstrap intervals, the right one among {classes} concepts.

| pictures | n | top-1 | top-5 |
| --- | --- | --- | --- |
{table}

Held-out artwork is another set's picture of a known concept. Flat and 3-D Fluent are one design with and without
shading, so what is held out of one was nearly always seen in the other: their lines say little. Read the lines without
near copies, and those of `classic` and `fx`, as the accuracy on another artist's picture of the concept.
The last lines measure the diffusion models and this network together: a concept that is drawn badly counts as wrong,
and most of the artwork that those models imitate was training artwork here.

```python
from transformers import ResNetForImageClassification, ViTImageProcessor
network = ResNetForImageClassification.from_pretrained(path)
inputs = ViTImageProcessor.from_pretrained(path)(picture, return_tensors="pt")
network.config.id2label[int(network(**inputs).logits.argmax())]
```

![loss](loss.png)

`reference.safetensors` holds the features of the {reference} pictures that the diffusion models learned, as float16:
`pooled` [{reference}, {width}], `spatial` [{reference}, 448] (the first 7 channels at stride 8) and `probabilities`
[{reference}, {classes}]; its metadata names the pictures, `style/concept`. The network was trained on {share:.0f} % of
them.

Limits: it knows clean graphics on white. Animals and their faces, or kinds of vehicles, are close classes, and it
mixes some of them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src" / "ditq_bundled" / "networks")
    args = parser.parse_args()

    art = pictures(args.work)
    names = sorted(set(art["concept"].tolist()))
    labels = torch.from_numpy(np.searchsorted(names, art["concept"]))
    images = torch.from_numpy(art["images"]).permute(0, 3, 1, 2).contiguous()
    held = hold_out(art["concept"], args.seed)
    versions = torch.cat([images[None], decoded(args.work, images)])
    taught = set(art["concept"][art["taught"]].tolist())
    # Concepts that the diffusion models learn are seen three times as often as the others.
    weights = torch.tensor([3.0 if c in taught else 1.0 for c in art["concept"]]) * torch.from_numpy(~held)
    normalised = Normalised(images[~held])
    torch.manual_seed(args.seed)
    network = new_network(names)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {len(names)} classes", flush=True)
    run = train(args, network, versions, labels, weights, normalised)

    folder = args.out / NAME
    export(network, normalised, folder)
    loss_curve(run.log, folder / "loss.png", "cross-entropy with label smoothing 0.1, moving average")
    extractor = EmojiClassifier(folder)
    learned = [f"{s}/{c}" for s, c in zip(art["style"][art["taught"]], art["concept"][art["taught"]], strict=True)]
    write_reference(extractor, images[torch.from_numpy(art["taught"])], learned, folder)
    card = CARD.format(
        name=NAME, parameters=sum(p.numel() for p in network.parameters()) / 1e6, classes=len(names),
        depths=CONFIG["depths"], widths=CONFIG["hidden_sizes"], width=CONFIG["hidden_sizes"][-1],
        pictures=len(images), trained=(~held).sum(), held=held.sum(), taught=len(taught),
        styles=", ".join(f"`{style}` {(art['style'] == style).sum()}" for style in (*STYLES, *MORE)),
        categories=", ".join(CATEGORIES).lower(), batch=args.batch, seed=args.seed, steps=run.step,
        minutes=minutes(run.log), loss=run.log[-1]["loss"],
        reference=len(learned), share=100 * (~held)[art["taught"]].mean(),
        table=table(extractor, art, held, versions, labels, drawn(args.work)),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
