"""Wrote the folders in ``v0.1/``: run once, with ditq 0.1 (commit 6c1538f) and its tests on PYTHONPATH.

    python tests/data/make_v0_1.py tests/data/v0.1

Each folder holds a checkpoint and ``expected.safetensors``: the inputs of one call, the output that ditq 0.1 computed
from what it had saved and loaded again, and in the metadata where that was. Random weights of tiny models.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import example_inputs, tiny_model, tiny_statistics, tiny_text_encoder, tiny_tokenizer, tiny_vae
from safetensors.torch import save_file

import ditq

# Architecture, recipe, overrides; transformers alone, of one block.
MODELS = {
    "pixart-folded": ("pixart", "viditq-w4a8", ["balance.choose=always", "balance.alpha=0.5"]),
    "dit-groups": ("dit", "qdit-w4a8", ["weights.group_size=32", "activations.group_size=32"]),
    "dit-timesteps": ("dit", "smoothquant-w4a8", ["weights.bits=3", "balance.timesteps=[[0, 499], [500, 999]]"]),
    "pixart-static": ("pixart", "smoothquant-w4a8", ["activations={bits: 8, granularity: tensor}"]),
}


def note(folder: Path, inputs: dict[str, torch.Tensor], output: torch.Tensor) -> None:
    where = {
        "ditq": ditq.__version__, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    tensors = {f"input.{name}": value for name, value in inputs.items()} | {"output": output.contiguous()}
    save_file(tensors, folder / "expected.safetensors", metadata=where)


@torch.no_grad()
def transformer(root: Path, name: str) -> None:
    architecture, recipe, overrides = MODELS[name]
    width = {"num_attention_heads": 2, "num_layers": 1}
    model = tiny_model(architecture, **width, **({"cross_attention_dim": 64} if architecture == "pixart" else {}))
    ditq.quantize(model, recipe, statistics=tiny_statistics(model, architecture), overrides=overrides)
    model.save_pretrained(root / name)
    loaded = type(model).from_pretrained(root / name)
    inputs = {k: v for k, v in example_inputs(architecture).items() if isinstance(v, torch.Tensor)}
    more = {} if architecture == "dit" else {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    note(root / name, inputs, loaded(**inputs, **more, return_dict=False)[0])


def scheduler() -> Any:
    import diffusers

    return diffusers.DDPMScheduler(beta_schedule="linear", variance_type="learned_range", clip_sample=False)


@torch.no_grad()
def pipelines(root: Path) -> None:
    """A 16-bit Open-Sora and a quantized Latte: their ``model_index.json`` name modules of ditq."""
    from ditq.architectures.opensora import OpenSoraPipeline
    from ditq.architectures.vchitect import LatteClassPipeline

    made = {
        "opensora-16-bit": OpenSoraPipeline(
            tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), tiny_model("stdit", hidden_size=64, depth=1),
            scheduler(),
        ),
        "latte-quantized": LatteClassPipeline(
            tiny_vae(), tiny_model("latte-class", depth=2, hidden_size=64), scheduler()
        ),
    }  # fmt: skip
    ditq.quantize(made["latte-quantized"], "rtn-w4a8")
    for name, pipe in made.items():
        if "16" in name:
            pipe.to(torch.bfloat16)
        pipe.save_pretrained(root / name)
        loaded = type(pipe).from_pretrained(root / name)
        condition = {"prompt": "a red cat"} if "16" in name else {"class_labels": 3}
        generator = torch.Generator().manual_seed(5)
        latents = loaded(**condition, num_inference_steps=2, generator=generator, output_type="latent").frames
        note(root / name, {}, latents)


@torch.no_grad()
def exported(root: Path) -> None:
    import diffusers

    from ditq import api

    work = root / "work"
    pipe = diffusers.DiTPipeline(
        transformer=tiny_model("dit", num_attention_heads=2, num_layers=1, num_embeds_ada_norm=1000), vae=tiny_vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(), id2label={0: "thing"},
    )  # fmt: skip
    ditq.quantize(pipe, "rtn-w8a8")
    api.export(ditq.save(pipe, work / "w8a8"), work / "exported")
    shutil.copytree(work / "exported" / "transformer", root / "dit-exported")
    shutil.rmtree(work)
    model = diffusers.DiTTransformer2DModel.from_pretrained(root / "dit-exported")
    inputs = example_inputs("dit")
    note(root / "dit-exported", inputs, model(**inputs, return_dict=False)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(exist_ok=True)
    for each in MODELS:
        transformer(target, each)
    pipelines(target)
    exported(target)
