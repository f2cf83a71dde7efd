"""``ditq generate``: generates images or videos with a 16-bit or a quantized pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ditq.cli.common import (
    ArchitectureOption,
    BatchSize,
    Device,
    Dtype,
    Frames,
    FramesPerSecond,
    Guidance,
    Height,
    Pipeline,
    PromptFile,
    Quiet,
    Seed,
    Steps,
    Variant,
    Width,
    open_pipeline,
    out,
    pick_architecture,
    pick_fps,
    pick_prompts,
    progress_bars,
)

if TYPE_CHECKING:
    from ditq.report.video import Video

# Formats that --format accepts. By default images are PNG, and videos are written in both formats.
IMAGES, VIDEOS = ("png", "jpg", "webp"), ("gif", "mp4")


def generate(
    pipeline: Pipeline,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt, or a class; may be repeated.")] = None,
    prompts: PromptFile = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the images; must not exist.")] = Path("pictures"),
    file_format: Annotated[
        str | None,
        typer.Option("--format", help=f"For images: {', '.join(IMAGES)}; for videos: gif, mp4 (default: gif,mp4)."),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    fps: FramesPerSecond = None,
    batch_size: BatchSize = 8,
    architecture: ArchitectureOption = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    variant: Variant = None,
    quiet: Quiet = False,
) -> None:
    """Generate an image or a video for each prompt; number i starts from the noise of seed + i.

    Example: ditq generate emoji-w4a8 --prompt "a noto style emoji of a red apple" --out images
    """
    from ditq.files import new_folder
    from ditq.report.wording import counted
    from ditq.sampling import Sampling, draws_videos, sample, size_arguments

    pipe = open_pipeline(pipeline, device, dtype, variant)
    arch = pick_architecture(pipe, architecture)
    video = draws_videos(pipe)
    formats = pick_formats(file_format, video, type(pipe).__name__)
    rate = pick_fps(fps, pipe)
    size = size_arguments(pipe, frames=frames, height=height, width=width)
    chosen = prompt or pick_prompts(pipeline, pipe, arch, prompts, "evaluation", 8)
    with new_folder(out_dir) as folder, progress_bars(quiet) as progress:
        done = 0

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if progress:
                progress("generate", done, len(chosen))

        samples = sample(pipe, arch, chosen, Sampling(seed, steps, guidance, batch_size, size), on_batch=tick)
        for i, image in enumerate(samples.images):
            for suffix in formats:
                _save(image, folder / f"{i:04d}.{suffix}", rate)
        if video:
            _sheet_of_frames(samples.images, chosen, folder / "sheet.png")
        (folder / "prompts.txt").write_text("\n".join(map(str, chosen)) + "\n", "utf-8")
    if not quiet:
        number = counted(len(chosen), "video" if video else "image")
        length = f" of {counted(len(samples.images[0]), 'frame')}" if video else ""
        out.print(f"{number}{length} in {out_dir}", soft_wrap=True)


def pick_formats(option: str | None, video: bool, pipeline: str) -> tuple[str, ...]:
    """The suffixes of ``--format``, checked before anything is generated.

    Args:
        option: comma-separated formats; None: the defaults.
        video: whether the pipeline generates videos.
        pipeline: its class name, for errors.

    Raises:
        UsageError: a format that does not fit the images or videos of the pipeline.
        DitqError: MP4 without OpenCV.
    """
    from ditq.errors import UsageError
    from ditq.report.video import check_mp4

    known = VIDEOS if video else IMAGES
    formats = tuple(dict.fromkeys(x.strip() for x in option.split(","))) if option else known if video else known[:1]
    if wrong := [x for x in formats if x not in known]:
        kind = "videos" if video else "images"
        hint = " Single frames are in sheet.png, next to the videos." if video else ""
        raise UsageError(
            f"{pipeline} generates {kind}: --format must be comma-separated from {', '.join(known)}; "
            f"got {wrong[0]!r}.{hint}"
        )
    if "mp4" in formats:
        check_mp4()
    return formats


def _save(image: Any, path: Path, fps: float) -> None:
    from ditq.report.video import save_gif, save_mp4

    if path.suffix == ".gif":
        save_gif(image, path, fps)
    elif path.suffix == ".mp4":
        save_mp4(image, path, fps)
    else:
        image.convert("RGB").save(path, quality=95)


def _sheet_of_frames(videos: list[Video], prompts: list[str], path: Path) -> None:
    """Writes an image with one video per row, its frames from left to right."""
    from ditq.report.sheet import sheet
    from ditq.report.video import stills

    sheet([(prompt, stills(video)) for prompt, video in zip(prompts, videos, strict=True)]).save(path)


VERB = generate
