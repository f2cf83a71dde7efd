"""A made-up comparison, the same every time: reports of two quantized models and images to go with them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ditq.metrics.score import Interval, Score, verdict
from ditq.report.document import (
    Curve,
    LayerErrors,
    MetricInfo,
    ModelReport,
    PairDifference,
    Report,
    Skipped,
    StepTime,
)

THINGS = "apple rocket panda owl castle guitar cactus ghost key fox".split()
FRAMES = 8
REFERENCE_BYTES = 18_214_912
STEPS = 20
TIMESTEPS = [999.0 - 50 * i for i in range(STEPS)]
ROLES = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.out", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.out", "ff.net.0.proj": "ffn.up",
    "ff.net.2": "ffn.down",
}  # fmt: skip
KEPT = {"adaln_single.linear": "modulation", "caption_projection.linear_1": "embedder", "proj_out": "final"}

INFOS = {
    info.name: info
    for info in (
        MetricInfo(name="psnr_db", title="PSNR", unit="dB", higher_is_better=True, family="fidelity",
                   about="Peak signal-to-noise ratio to the 16-bit image of the same prompt and seed."),
        MetricInfo(name="ssim", title="SSIM", unit="", higher_is_better=True, family="fidelity",
                   about="Structural similarity to the 16-bit image (Wang et al. 2004)."),
        MetricInfo(name="latent_sqnr_db", title="Latent SQNR", unit="dB", higher_is_better=True, family="fidelity",
                   about="Signal to quantization noise of the final latents."),
        MetricInfo(name="feature_distance", title="Feature distance", unit="", higher_is_better=False,
                   family="fidelity", about="Distance of normalised feature maps to those of the 16-bit image."),
        MetricInfo(name="alignment", title="Concept probability", unit="", higher_is_better=True, family="alignment",
                   about="Probability that a classifier gives to the concept that the prompt names."),
        MetricInfo(name="kid", title="KID", unit="", higher_is_better=False, family="distribution",
                   about="Unbiased squared maximum mean discrepancy to real images (Bińkowski et al. 2018)."),
        MetricInfo(name="fid", title="FID", unit="", higher_is_better=False, family="distribution",
                   about="Fréchet distance of Gaussians fitted to features (Heusel et al. 2017)."),
        MetricInfo(name="recall", title="Recall", unit="", higher_is_better=True, family="distribution",
                   about="Share of real images within the manifold of drawn ones (Kynkäänniemi et al. 2019)."),
        MetricInfo(name="warping_error", title="Warping error", unit="", higher_is_better=False, family="temporal",
                   about="Difference of a frame to its predecessor, moved along the optical flow."),
        MetricInfo(name="motion_smoothness", title="Motion smoothness", unit="", higher_is_better=True,
                   family="temporal", about="How well frames are interpolated from their neighbours."),
    )
}  # fmt: skip

# Per model: metric -> (mean, half width), or (mean, half width, reference mean, difference, its half width).
_VALUES: dict[str, dict[str, tuple[float, ...]]] = {
    "viditq-w8a8": {
        "psnr_db": (48.84, 0.41), "ssim": (0.9990, 0.0002), "latent_sqnr_db": (36.57, 0.31),
        "feature_distance": (0.0021, 0.0003), "alignment": (0.712, 0.061, 0.713, -0.001, 0.004),
        "kid": (0.0132, 0.0041, 0.0131, 0.0001, 0.0006), "fid": (31.4, 2.2, 31.2, 0.2, 0.7),
        "recall": (0.44, 0.05, 0.45, -0.01, 0.03), "warping_error": (0.0124, 0.0011, 0.0124, 0.00001, 0.0002),
        "motion_smoothness": (0.981, 0.004, 0.981, 0.0, 0.001),
    },
    "viditq-w4a8": {
        "psnr_db": (29.42, 0.66), "ssim": (0.9678, 0.0031), "latent_sqnr_db": (16.53, 0.34),
        "feature_distance": (0.0310, 0.0026), "alignment": (0.694, 0.062, 0.713, -0.019, 0.021),
        "kid": (0.0151, 0.0043, 0.0131, 0.0020, 0.0013), "fid": (34.9, 2.4, 31.2, 3.7, 1.6),
        "recall": (0.47, 0.05, 0.45, 0.02, 0.04), "warping_error": (0.0139, 0.0013, 0.0124, 0.0015, 0.0006),
        "motion_smoothness": (0.977, 0.004, 0.981, -0.004, 0.002),
    },
}  # fmt: skip
_BYTES = {"viditq-w8a8": 10_054_631, "viditq-w4a8": 5_865_202}


def _interval(mean: float, half: float, n: int) -> Interval:
    return Interval(mean=mean, ci95=(mean - half, mean + half), n=n)


def _score(name: str, values: tuple[float, ...], n: int) -> Score:
    info = INFOS[name]
    network = None if name in ("psnr_db", "ssim", "latent_sqnr_db") else "emoji-classifier"
    own = _interval(values[0], values[1], n).model_dump()
    if len(values) == 2:
        return Score(**own, higher_is_better=info.higher_is_better, network=network)
    difference = _interval(values[3], values[4], n)
    return Score(
        **own, higher_is_better=info.higher_is_better, network=network, reference=_interval(values[2], values[1], n),
        difference=difference, verdict=verdict(difference, info.higher_is_better),
    )  # fmt: skip


def _layers(bits: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": name, "role": role, "weight_bits": 16, "activation_bits": 16,
         "granularity": {"weights": None, "activations": None}, "balance": "none", "rounding": None,
         "incoherence": None, "reason": f"{role} layers stay in 16 bit"}
        for name, role in KEPT.items()
    ]  # fmt: skip
    for block in range(8):
        for i, (name, role) in enumerate(ROLES.items()):
            balance = "rotate" if role.startswith("ffn") else ("smooth 0.3 (norm)" if i < 3 else "none")
            rows.append(
                {"name": f"transformer_blocks.{block}.{name}", "role": role, "weight_bits": bits,
                 "activation_bits": 8, "granularity": {"weights": "channel", "activations": "token"},
                 "balance": balance, "rounding": "nearest",
                 "incoherence": {"weight_before": 3.9, "weight_after": 2.6, "input_before": 7.7, "input_after": 3.5},
                 "reason": "recipe"}
            )  # fmt: skip
    return rows


def _layer_errors(bits: int) -> LayerErrors:
    rng = np.random.default_rng(bits)
    names = [f"transformer_blocks.{b}.{name}" for b in range(8) for name in ROLES]
    roles = [role for _ in range(8) for role in ROLES.values()]
    depth = np.repeat(np.arange(8), len(ROLES))[:, None]
    time = np.linspace(0, 1, STEPS)[None]
    of_role = np.array([{"ffn.down": -6.0, "self_attn.out": -3.0}.get(role, 1.0) for role in roles])[:, None]
    sqnr = 5.2 * bits - 1 - 0.9 * depth + of_role - 7 * (time - 0.3) ** 2 + rng.normal(0, 0.5, (len(names), STEPS))
    return LayerErrors(
        layers=names, roles=roles, timesteps=TIMESTEPS, sqnr_db=np.round(sqnr, 2).tolist(), prompts=4
    )  # fmt: skip


def _curve(last: float, n: int) -> Curve:
    mean = [last + 16 * (1 - (i + 1) / STEPS) ** 0.7 for i in range(STEPS)]
    half = [0.15 + 0.2 * i / STEPS for i in range(STEPS)]
    return Curve(
        timesteps=TIMESTEPS, mean=mean, ci95=[(m - h, m + h) for m, h in zip(mean, half, strict=True)], n=n
    )  # fmt: skip


def _model(name: str, kind: str, n: int) -> ModelReport:
    bits = int(name[-3])
    return ModelReport(
        name=name, path=f"models/{name}", fingerprint=f"{bits:064x}", pipeline="PixArtAlphaPipeline", recipe=name,
        plan_hash=f"{bits + 1:016x}", nominal_bits={"weights": bits, "activations": 8},
        average_bits={8: 8.64, 4: 4.97}[bits], transformer_bytes=_BYTES[name], seconds_per_picture=0.31,
        step_time=StepTime(ms_median=42.0 if bits == 8 else 63.4, ms_min=40.0, runs=15, batch=8,
                           ratio_to_reference=1.40 if bits == 8 else 0.93),
        metrics={metric: _score(metric, values, n) for metric, values in _VALUES[name].items()
                 if kind == "video" or INFOS[metric].family != "temporal"},
        latent_sqnr_by_step=_curve(_VALUES[name]["latent_sqnr_db"][0], n), layer_errors=_layer_errors(bits),
        layers=_layers(bits),
    )  # fmt: skip


def report(kind: Literal["image", "video"] = "image", prompts: int = 30) -> Report:
    """A report of two models; the 8-bit one is measurably the better one in PSNR, not in recall."""
    infos = [info for info in INFOS.values() if kind == "video" or info.family != "temporal"]
    psnr, recall = _interval(19.42, 0.5, prompts), _interval(-0.03, 0.05, prompts)
    return Report(
        title="ditq comparison: emoji-t2i",
        date="2026-01-05",
        summary=[
            "viditq-w8a8 takes 0.55 of the memory and shows no measurable difference to the 16-bit model.",
            "viditq-w4a8 takes 0.32 of the memory; its images are 29.4 dB from the 16-bit ones and measurably "
            "worse in KID and FID.",
        ],
        kind=kind,
        reference=ModelReport(
            name="emoji-t2i", path="bundled:emoji-t2i", fingerprint="e" * 64, pipeline="PixArtAlphaPipeline",
            transformer_bytes=REFERENCE_BYTES, seconds_per_picture=0.42,
            step_time=StepTime(ms_median=59.0, ms_min=57.5, runs=15, batch=8, ratio_to_reference=1.0),
        ),
        models=[_model(name, kind, prompts) for name in _VALUES],
        differences=[
            PairDifference(metric="psnr_db", a="viditq-w8a8", b="viditq-w4a8", difference=psnr, verdict="better"),
            PairDifference(metric="recall", a="viditq-w8a8", b="viditq-w4a8", difference=recall, verdict="same"),
        ],
        metrics=infos,
        skipped=[Skipped(metric="CLIPScore", reason="the weights of openai/clip-vit-base-patch16 are not here")],
        prompts=[f"a noto style emoji of a {THINGS[i % len(THINGS)]} {i}" for i in range(prompts)],
        seeds=list(range(prompts)),
        sampler={"scheduler": "DPMSolverMultistepScheduler", "steps": STEPS, "guidance_scale": 4.5, "width": 64,
                 "height": 64, "frames": FRAMES if kind == "video" else 1},
        environment={"device": "cpu", "cpu": "Intel(R) Xeon(R) Processor @ 2.80GHz (avx512_vnni)", "threads": 2,
                     "versions": {"ditq": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}},
        command="ditq compare bundled:emoji-t2i models/viditq-w8a8 models/viditq-w4a8 --count 30 --out report",
        real={"name": "emoji artwork", "n": 885},
    )  # fmt: skip


def without_intervals(of: Report) -> Report:
    """The same report as fewer than three prompts would give it: no intervals, no verdicts."""

    def bare(interval: Any) -> Any:
        return interval and interval.model_copy(update={"ci95": None})

    short = of.model_copy(deep=True)
    for model in short.models:
        model.metrics = {
            name: s.model_copy(update={"ci95": None, "reference": bare(s.reference), "difference": bare(s.difference),
                                       "verdict": None})
            for name, s in model.metrics.items()
        }  # fmt: skip
        if model.latent_sqnr_by_step:
            model.latent_sqnr_by_step.ci95 = []
    short.differences = [
        d.model_copy(update={"difference": bare(d.difference), "verdict": None}) for d in of.differences
    ]
    return short


def picture(seed: int, size: int = 64, shift: int = 0) -> Image.Image:
    """A face on white; ``shift`` moves it to the right."""
    rng = np.random.default_rng(seed)
    colour, dark = tuple(rng.integers(60, 256, 3)), tuple(rng.integers(0, 60, 3))
    big = Image.new("RGB", (4 * size, 4 * size), "white")
    draw = ImageDraw.Draw(big)
    at = lambda *xy: [4 * size * v + (4 * shift if i % 2 == 0 else 0) for i, v in enumerate(xy)]  # noqa: E731
    draw.ellipse(at(0.12, 0.12, 0.88, 0.88), fill=colour)
    draw.ellipse(at(0.30, 0.35, 0.40, 0.48), fill=dark)
    draw.ellipse(at(0.60, 0.35, 0.70, 0.48), fill=dark)
    draw.arc(at(0.30, 0.40, 0.70, 0.72), 20, 160, fill=dark, width=size // 6)
    return big.resize((size, size), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(0.4))


def quantized(image: Image.Image, bits: int, seed: int = 0) -> Image.Image:
    """The image with as much noise as so few bits leave."""
    noise = np.random.default_rng(seed).normal(0, {8: 1.0, 4: 9.0}[bits], (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def pictures(of: Report, size: int = 64) -> dict[str, list[Any]]:
    """One image, or list of frames, for each model and prompt; the reference first."""
    drawn: dict[str, list[Any]] = {model.name: [] for model in (of.reference, *of.models)}
    for seed in of.seeds:
        frames = [picture(seed, size, shift) for shift in range(FRAMES if of.kind == "video" else 1)]
        for name, column in drawn.items():
            shown = frames if name == of.reference.name else [quantized(f, int(name[-3]), seed) for f in frames]
            column.append(shown if of.kind == "video" else shown[0])
    return drawn
