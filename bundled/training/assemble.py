"""Puts a trained model together as a stock diffusers pipeline folder, with its model card.

``python assemble.py t2i --work DIR --out ../src/ditq_bundled/models`` writes ``emoji-t2i`` (fp16
safetensors), its loss curve, a sample sheet drawn by the stock pipeline, and a card; ``class`` and ``video``
likewise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import clips
import torch
from artwork import CONCEPTS, STYLES, caption
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    LattePipeline,
    PixArtAlphaPipeline,
)
from diffusion import SCHEDULER, ClassToImage, TextToImage
from PIL import Image, ImageDraw
from transformers import AutoTokenizer
from video import TextToVideo, evaluation

NAMES = {"t2i": "emoji-t2i", "class": "emoji-class", "video": "emoji-video"}
FOLDERS = {  # in the work folder: tokenizer and autoencoder
    "t2i": ("tokenizer", "vae"), "class": ("tokenizer", "vae"), "video": ("video-tokenizer", "video-vae"),
}  # fmt: skip
SHEET = (
    "red-apple panda rocket strawberry octopus guitar hamburger sunflower tiger-face penguin soccer-ball pizza "
    "snowman cactus butterfly castle ghost bicycle watermelon owl fire unicorn key mushroom frog doughnut "
    "umbrella crown fox christmas-tree robot sailboat"
).split()


def averaged(work: Path, kind: str) -> tuple[torch.nn.Module, dict]:
    """The model with its averaged weights, and the training log."""
    state = torch.load(work / kind / "checkpoint.pt", weights_only=True)
    words = len(AutoTokenizer.from_pretrained(work / FOLDERS[kind][0]))
    model = {"t2i": lambda: TextToImage(words), "class": ClassToImage, "video": lambda: TextToVideo(words)}[kind]()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state["ema"].items()}, strict=False)
    return model.eval(), state


def half(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters in fp16; refuses a model that does not fit its range."""
    module = module.half()
    bad = [name for name, p in module.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise SystemExit(f"{bad[0]} does not fit fp16")
    return module


def pipeline(work: Path, kind: str) -> tuple[DiffusionPipeline, dict]:
    model, state = averaged(work, kind)
    tokenizer, vae = FOLDERS[kind]
    vae = AutoencoderKL.from_pretrained(work / vae)
    vae.register_to_config(_name_or_path="emoji-vae")  # not the folder it happened to lie in
    scheduler = DPMSolverMultistepScheduler(**SCHEDULER)
    if kind != "class":
        stock = PixArtAlphaPipeline if kind == "t2i" else LattePipeline
        pipe = stock(
            tokenizer=AutoTokenizer.from_pretrained(work / tokenizer),
            text_encoder=half(model.text_encoder), vae=half(vae),
            transformer=half(model.transformer), scheduler=scheduler,
        )  # fmt: skip
    else:
        labels = dict(enumerate(sorted(CONCEPTS)))
        pipe = DiTPipeline(half(model.transformer), half(vae), scheduler, id2label=labels)
        pipe.register_to_config(id2label=labels)  # the pipeline reads them from its index, but does not write them
    return pipe, state


def minutes(log: list[dict]) -> float:
    """Minutes of all runs of a log: each resumed run counts from zero."""
    total, last = 0.0, 0.0
    for row in log:
        total += row["minutes"] - last if row["minutes"] >= last else row["minutes"]
        last = row["minutes"]
    return total


def loss_curve(log: list[dict], path: Path, what: str = "v-prediction mean squared error, moving average") -> None:
    """A plain plot of the smoothed loss over steps."""
    width, height, margin = 640, 280, 44
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    steps, losses = [row["step"] for row in log], [row["loss"] for row in log]
    top, bottom = max(losses), min(losses)
    point = lambda s, v: (  # noqa: E731
        margin + (width - 2 * margin) * s / max(steps),
        height - margin - (height - 2 * margin) * (v - bottom) / max(1e-9, top - bottom),
    )
    draw.line([point(s, v) for s, v in zip(steps, losses, strict=True)], fill="#1f5fbf", width=2)
    draw.rectangle([margin, margin, width - margin, height - margin], outline="#999999")
    for value in (top, bottom):
        draw.text((4, point(0, value)[1] - 6), f"{value:.3f}", fill="black")
    draw.text((margin, height - 30), f"step 0 .. {max(steps)}; {what}", fill="black")
    page.save(path)


def draw_sheet(pipe: DiffusionPipeline, kind: str, path: Path) -> list[str]:
    """Thirty-two pictures at 20 steps by the stock pipeline, eight to a row, named in the card."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(SHEET))]
    common = {"num_inference_steps": 20, "generator": generators}
    pipe.set_progress_bar_config(disable=True)
    if kind == "t2i":
        styles = list(STYLES)
        texts = [caption(c, styles[i % 2]) for i, c in enumerate(SHEET)]
        images = pipe(prompt=texts, use_resolution_binning=False, clean_caption=False, **common).images
    else:
        texts = SHEET
        images = pipe(class_labels=pipe.get_label_ids(texts), **common).images
    page = Image.new("RGB", (8 * 100, 4 * 100), "white")
    for i, image in enumerate(images):
        page.paste(image.resize((96, 96), Image.Resampling.LANCZOS), (i % 8 * 100, i // 8 * 100))
    page.save(path)
    return texts


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: {tag}
tags: [{tags}]
---
# {name}

A small diffusion transformer ({architecture}, {parameters:.1f} M parameters) that draws emoji at 64 x 64 pixels. It
exists to show and test quantization on a model that was really trained; it is no product.

| | |
| --- | --- |
| transformer | {blocks} blocks, width 256, 4 heads of 64, patch 4 on 16 x 16 x 4 latents (16 tokens a picture) |
| autoencoder | `AutoencoderKL`, 0.65 M parameters, 28.1 dB PSNR on the taught pictures, trained on the same artwork |
| {condition_key} | {condition} |
| artwork | {pictures} pictures of {concepts} concepts, rendered from `@iconify/json` 2.2.535 |
| licences | Noto Emoji and its first version: Apache-2.0; Fluent Emoji flat: MIT |
| objective | v-prediction, cosine schedule, 10 % of conditions dropped for guidance |
| optimizer | Muon for hidden matrices, AdamW for the rest, batch 128, averaged weights (0.998), seed 0 |
| training | {steps} steps, about {minutes:.0f} minutes on two CPU cores; last loss {loss:.3f} |
| weights | fp16 safetensors, made from float32 |

Made by `bundled/training/artwork.py`, `vae.py`, `diffusion.py {kind}`, `assemble.py {kind}` of the ditq repository.

```python
{example}
```

![samples](samples.png)

Twenty steps of DPM-Solver++, the pipeline's default guidance, seeds 0 to 31, not selected: {texts}.

![loss](loss.png)

Limits: it knows the taught concepts only, as clean graphics on white; details of similar concepts mix.
"""

EXAMPLE = {
    "t2i": """pipe = DiffusionPipeline.from_pretrained(path)
# PixArt's pipelines round sizes to their published resolutions unless told not to.
pipe("a noto style emoji of a red apple", use_resolution_binning=False).images[0]""",
    "class": """pipe = DiffusionPipeline.from_pretrained(path)
pipe(class_labels=pipe.get_label_ids(["red-apple"]), num_inference_steps=20).images[0]""",
}


VIDEO_STEPS, VIDEO_GUIDANCE = 20, 4.0


def video_sheet(pipe: DiffusionPipeline, path: Path) -> list[str]:
    """The first ten evaluation prompts, a clip a row, frame by frame, each drawn by a call of its own."""
    texts = evaluation()
    pipe.set_progress_bar_config(disable=True)
    page = Image.new("RGB", (clips.FRAMES * 68, len(texts) * 82), "white")
    for row, text in enumerate(texts):
        frames = pipe(
            text, video_length=clips.FRAMES, height=64, width=64, clean_caption=False, output_type="pil",
            num_inference_steps=VIDEO_STEPS, guidance_scale=VIDEO_GUIDANCE,
            generator=torch.Generator().manual_seed(row),
        ).frames[0]  # fmt: skip
        ImageDraw.Draw(page).text((2, row * 82 + 2), text, fill="black")
        for i, frame in enumerate(frames):
            page.paste(frame, (i * 68, row * 82 + 16))
    page.save(path)
    return texts


VIDEO_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
tags: [latte, emoji]
---
# emoji-video

A small diffusion transformer (Latte, {parameters:.1f} M parameters) that sets emoji in motion: {frames} frames of
64 x 64 pixels. It exists to show and test quantization on a video model that was really trained; it is no product.

| | |
| --- | --- |
| transformer | {blocks} spatial blocks (self-attention, cross-attention, FFN) and {blocks} temporal ones in turn, width 256, 4 heads of 64, patch 4 on 16 x 16 x 4 latents (16 tokens a frame, {tokens} a clip) |
| autoencoder | the `AutoencoderKL` of emoji-t2i, trained on with frames of such clips (28.6 dB PSNR on them); frame by frame |
| text encoder | T5 encoder, 2 layers, width 256, trained jointly; byte-pair tokenizer over the captions |
| clips | {clips} clips of {concepts} concepts: {motions}, and two objects crossing; half of the others before a {backgrounds} background |
| held out | {pairs} pairs of concept and motion, two motions a concept, and {partners} pairs that cross |
| artwork | Fluent Emoji flat (MIT), rendered from `@iconify/json` 2.2.535 |
| objective | v-prediction, cosine schedule, 10 % of captions dropped for guidance |
| optimizer | Muon for hidden matrices, AdamW for the rest, batch 24 in two processes, products in bf16, averaged weights (0.997), seed 0; noisy times more often (shift 2.5, see Limits) |
| training | started from emoji-t2i; {steps} steps, about {minutes:.0f} minutes on a shared machine of two CPU cores; last loss {loss:.3f} |
| weights | fp16 safetensors, made from float32 |

Made by `bundled/training/vae.py --clips`, `clips.py`, `video.py`, `assemble.py video` of the ditq repository; the commands
are in `bundled/README.md`.

```python
pipe = DiffusionPipeline.from_pretrained(path)
# LattePipeline asks for 16 frames of 512 x 512 pixels unless told otherwise.
pipe("{example}", video_length={frames}, height=64, width=64, guidance_scale={guidance}).frames[0]
```

![samples](samples.png)

{sampling} steps of DPM-Solver++ at guidance {guidance}, seeds 0 to {last}, not selected. No caption of these occurred in
training: {texts}.

![loss](loss.png)

## Limits

It knows the taught concepts and motions only; a motion takes all {frames} frames; details of objects are lost.
"""  # noqa: E501


def video_card(stock: DiffusionPipeline, state: dict, texts: list[str]) -> str:
    config = stock.transformer.config
    pairs = clips.held_out()
    partners = sum(motion == clips.CROSSING for _, motion in pairs)
    return VIDEO_CARD.format(
        parameters=sum(p.numel() for p in stock.transformer.parameters()) / 1e6,
        frames=config.video_length, blocks=config.num_layers, tokens=config.video_length * 16,
        clips=clips.CLIPS, concepts=len(clips.CONCEPTS), motions=", ".join(clips.MOTIONS),
        backgrounds=", ".join(list(clips.BACKGROUNDS)[1:-1]) + f" or {list(clips.BACKGROUNDS)[-1]}",
        pairs=len(pairs) - partners, partners=partners,
        steps=state["step"], minutes=minutes(state["log"]), loss=state["log"][-1]["loss"], sampling=VIDEO_STEPS,
        guidance=VIDEO_GUIDANCE, last=len(texts) - 1, texts=", ".join(texts), example=texts[0],
    )  # fmt: skip


def image_card(kind: str, stock: DiffusionPipeline, state: dict, texts: list[str]) -> str:
    is_t2i = kind == "t2i"
    return CARD.format(
        name=NAMES[kind],
        kind=kind,
        tag="text-to-image" if is_t2i else "unconditional-image-generation",
        tags="pixart, emoji" if is_t2i else "dit, emoji",
        architecture="PixArt, adaLN-single and cross-attention" if is_t2i else "DiT, adaLN-zero",
        parameters=sum(p.numel() for p in stock.transformer.parameters()) / 1e6,
        blocks=stock.transformer.config.num_layers,
        condition_key="text encoder" if is_t2i else "classes",
        condition="T5 encoder, 2 layers, width 256, trained jointly; byte-pair tokenizer over the captions"
        if is_t2i
        else f"{len(CONCEPTS)} concepts, each in up to {len(STYLES)} styles; trunk started from emoji-t2i",
        pictures=885, concepts=len(CONCEPTS), steps=state["step"], minutes=minutes(state["log"]),
        loss=state["log"][-1]["loss"],
        example=EXAMPLE[kind], texts=", ".join(texts),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(NAMES))
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src" / "ditq_bundled" / "models")
    args = parser.parse_args()
    pipe, state = pipeline(args.work, args.kind)
    folder = args.out / NAMES[args.kind]
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    if args.kind != "class":
        # transformers would load the encoder in the stored fp16, diffusers loads the rest in float32.
        config = folder / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2))
    loss_curve(state["log"], folder / "loss.png")
    stock = DiffusionPipeline.from_pretrained(folder)
    sheet = folder / "samples.png"
    if args.kind == "video":
        card = video_card(stock, state, video_sheet(stock, sheet))
    else:
        card = image_card(args.kind, stock, state, draw_sheet(stock, args.kind, sheet))
    (folder / "README.md").write_text(card)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(json.dumps({"folder": str(folder), "bytes": size, "step": state["step"]}))


if __name__ == "__main__":
    main()
