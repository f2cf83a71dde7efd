"""``ditq generate``: draw pictures with a 16-bit or a quantized pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditq.cli.common import (
    ArchitectureOption,
    BatchSize,
    Device,
    Dtype,
    Guidance,
    Pipeline,
    PromptFile,
    Quiet,
    Seed,
    Steps,
    open_pipeline,
    out,
    pick_architecture,
    pick_prompts,
    progress_bars,
)


def generate(
    pipeline: Pipeline,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, or a class; may be given many times.")] = None,
    prompts: PromptFile = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the pictures; must not exist.")] = Path(
        "pictures"
    ),
    steps: Steps = None,
    guidance: Guidance = None,
    batch_size: BatchSize = 8,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw one picture for each prompt; picture i starts from the noise of seed + i.

    Example: ditq generate emoji-w4a8 --prompt "a noto style emoji of a red apple" --out pictures
    """
    from ditq import api
    from ditq.sampling import sample

    pipe = open_pipeline(pipeline, device, dtype)
    arch = pick_architecture(pipe, architecture)
    wanted = prompt or pick_prompts(pipeline, pipe, arch, prompts, "evaluation", 8)
    with api.new_folder(out_dir) as folder, progress_bars(quiet) as progress:
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if progress:
                progress("generate", done, len(wanted))

        drawn = sample(
            pipe, arch, wanted, seed=seed, steps=steps, guidance_scale=guidance, batch_size=batch_size, on_batch=tick
        )
        for i, image in enumerate(drawn.images):
            image.save(folder / f"{i:04d}.png")
        (folder / "prompts.txt").write_text("\n".join(map(str, wanted)) + "\n")
    if not quiet:
        out.print(f"{len(wanted)} pictures in {out_dir}", markup=False)


VERB = generate
