"""Tiny models and complete tiny pipelines of random weights, so that no test needs a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ditq import architectures
from ditq.architectures import Architecture
from ditq.calibration import Statistics
from ditq.calibration.capture import Capture
from ditq.conversion.storage import dtype_of
from ditq.numerics import Grid
from ditq.numerics.grid import Levels
from ditq.plan import LayerPlan
from ditq.recipe import load as load_recipe

WORDS = "<pad> </s> <unk> a red green blue small big cat dog house tree on in the snow sea".split()
PROMPTS = ["a red cat", "the big dog on the sea", "a small house in the snow", "blue tree"]
CLASSES = ["3", "7", "11", "0"]

# Parts of the names of layers that write to the residual stream.
RESIDUAL = (".attn", ".cross_attn", ".ff.", ".ff_context.", ".ffn.", ".mlp.", ".proj_mlp.", ".proj_out.")


def grid(bits: int, symmetric: bool = True, granularity: str = "row", group_size: int | None = None) -> Grid:
    """A grid; "row" is what a weight calls channel and an input token."""
    kind: Any = "channel" if granularity == "row" else granularity
    return Grid(bits=bits, symmetric=symmetric, granularity=kind, group_size=group_size)


def alphas(recipe: str) -> list[str]:
    """An override for few choices of alpha, where the recipe smooths at all."""
    return ["balance.alpha=[0.3, 0.6]"] if load_recipe(recipe).balance.smooth else []


# ------------------------------------------------------------------------------------- transformers


def tiny_model(architecture: str, seed: int = 0, **config: Any) -> nn.Module:
    """The ``example`` model of an architecture file, with no parameter left constant."""
    example = architectures.load(architecture).example
    assert example is not None
    torch.manual_seed(seed)
    model = architectures.load(architecture).model_class()(**{**example.config, **config})
    return perturbed(model).eval()


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Makes a fresh model one in which mistakes show.

    Constant parameters (norms, biases, gates) get noise, and the blocks weigh more against the residual
    stream: in a fresh model a wrongly wired layer moves the output by as little as -60 dB.
    """
    for name, p in model.named_parameters():
        if p.numel() > 1 and p.min() == p.max():
            p.add_(0.2 * torch.randn_like(p))
        if name.endswith("scale_shift_table"):
            p.mul_(8)
        elif name.endswith("norm1.linear.bias"):
            p.mul_(4)
        elif any(part in name for part in RESIDUAL):
            p.mul_(3)
    return model


def example_inputs(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The ``example`` inputs of an architecture file."""
    example = architectures.load(architecture).example
    assert example is not None
    generator = torch.Generator().manual_seed(seed)
    return {name: _made(spec, generator, dtype) for name, spec in example.inputs.items()}


def _made(spec: dict[str, Any], generator: torch.Generator, dtype: torch.dtype) -> Any:
    ((kind, value),) = spec.items()
    if kind == "tuple":
        return tuple(_made(part, generator, dtype) for part in value)
    if kind == "normal":
        return torch.randn(value, generator=generator).to(dtype)
    if kind == "below":  # numbers from 0, of this shape
        ((limit, shape),) = value.items()
        return torch.randint(0, limit, shape, generator=generator)
    if kind == "ones":
        return torch.ones(value, dtype=dtype)
    return {"value": torch.tensor, "keyword": lambda x: x}[kind](value)


@torch.no_grad()
def run(model: nn.Module, architecture: str, seed: int = 0, **changes: Any) -> Tensor:
    """The model's output on its example inputs."""
    dtype = dtype_of(model)
    return model(**{**example_inputs(architecture, seed, dtype), **changes}, return_dict=False)[0]


def tiny_statistics(
    model: nn.Module, architecture: str | Architecture, timesteps: Sequence[int] = (900, 10)
) -> Statistics:
    """Statistics of the example inputs at a few timesteps, without a pipeline."""
    arch = architectures.load(architecture)
    capture = Capture(arch, arch.groups(model), rows=64, seed=0)
    with capture.watching(model):
        for i, t in enumerate(timesteps):
            run(model, arch.name, seed=i, timestep=torch.tensor([t, t]))
    return capture.statistics()


# ---------------------------------------------------------------------------------------- pipelines

SCHEDULER = {"num_train_timesteps": 1000, "timestep_spacing": "trailing", "solver_order": 2}


def tiny_vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(7)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    ).eval()


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )


def tiny_text_encoder(width: int = 64) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(8)
    return T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_pixart(seed: int = 0) -> diffusers.PixArtAlphaPipeline:
    """A complete PixArtAlphaPipeline that draws 16 x 16 images."""
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        transformer=tiny_model("pixart", seed),
        scheduler=diffusers.DPMSolverMultistepScheduler(**SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit(seed: int = 0) -> diffusers.DiTPipeline:
    """A complete DiTPipeline of 1000 classes; number 1000 is the pipeline's "no class"."""
    pipe = diffusers.DiTPipeline(
        transformer=tiny_model("dit", seed, num_embeds_ada_norm=1000),
        vae=tiny_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**SCHEDULER),
        id2label={i: f"thing{i}" for i in range(1000)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"pixart": tiny_pixart, "dit": tiny_dit}
CONDITIONS = {"pixart": PROMPTS, "dit": CLASSES}
QUICK = ("calibration.steps=2", "calibration.prompts=2", "calibration.batch_size=2", "calibration.rows=64")


@torch.no_grad()
def draw(pipe: Any, condition: str | None = None, steps: int = 2, guidance_scale: float = 3.0) -> Tensor:
    """One image of a tiny pipeline as an array, from fixed noise."""
    generator = torch.Generator().manual_seed(5)
    kwargs: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": generator}
    if isinstance(pipe, diffusers.DiTPipeline):
        kwargs["class_labels"] = [int(condition or CLASSES[0])]
    else:
        kwargs |= {"prompt": condition or PROMPTS[0], "use_resolution_binning": False, "clean_caption": False}
    return torch.from_numpy(pipe(**kwargs, output_type="np").images)


# ------------------------------------------------------------------------------------- layers, plans


def weight_format(
    bits: int = 4, granularity: str = "channel", symmetric: bool = False, group: int | None = None,
    levels: Levels = "uniform",
) -> Grid:  # fmt: skip
    return Grid(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group, levels=levels)  # type: ignore[arg-type]


def token_format(
    bits: int = 8, granularity: str = "token", symmetric: bool = True, group: int | None = None,
    levels: Levels = "uniform",
) -> Grid:  # fmt: skip
    return Grid(
        bits=bits, symmetric=symmetric, granularity=granularity,  # type: ignore[arg-type]
        group_size=group, dynamic=True, levels=levels,
    )  # fmt: skip


def full_weights(bits: int = 4, granularity: str = "channel", group: int | None = None) -> Grid:
    return Grid(bits=bits, granularity=granularity, group_size=group, full=True)  # type: ignore[arg-type]


def normal_weights(bits: int = 4, granularity: str = "channel", group: int | None = None) -> Grid:
    return weight_format(bits, granularity, symmetric=True, group=group, levels="normal")


def layer_plan(name: str = "layer", k: int = 32, n: int = 24, **fields: Any) -> LayerPlan:
    """A W4A8 plan of one linear; fields replace."""
    defaults: dict[str, Any] = {
        "name": name, "role": "ffn.up", "in_features": k, "out_features": n,
        "weight": weight_format(), "activation": token_format(),
    }  # fmt: skip
    return LayerPlan(**{**defaults, **fields})
