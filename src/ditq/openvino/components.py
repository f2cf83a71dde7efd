"""Other components of a pipeline as OpenVINO graphs in floating point: the VAE's decoder and T5 text encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditq.errors import DitqError
from ditq.openvino import storage as files
from ditq.openvino.manifest import Manifest
from ditq.openvino.segment import Part, write_segment
from ditq.openvino.settings import compile_config
from ditq.trace.stacks import capture_module

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")

# Sizes of the two example calls, all different: images in latent pixels, texts in tokens.
LATENTS = ((2, 4, 6), (3, 5, 4))
TEXTS = ((2, 5), (3, 7))


def export_components(pipe: Any, root: Path, engine: Mapping[str, Any]) -> dict[str, str]:
    """Writes graphs of a pipeline's other components, and sets the engine in their configs.

    Args:
        root: folder of the saved pipeline; ``root/vae/openvino`` and so on are written.
        engine: the ``engine`` field of the configs, see ``ditq.checkpoint.backend.DitqConfig``.

    Returns:
        For each component of the pipeline: "" if it is a graph now, else why it stays in torch.
    """
    modules = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {
        name: _export(module, root / name, engine) for name, module in modules.items() if isinstance(module, nn.Module)
    }


def _export(module: nn.Module, folder: Path, engine: Mapping[str, Any]) -> str:
    kind = type(module).__name__
    if kind not in _CALLS:
        return f"a {kind} (supported: {', '.join(_CALLS)})"
    name, call = _CALLS[kind]
    graphs = folder / str(engine["name"])
    shutil.rmtree(graphs, ignore_errors=True)
    graphs.mkdir()
    try:
        _write(module, name, call(module), graphs)
    except (DitqError, RuntimeError) as error:
        shutil.rmtree(graphs)
        return files.first_line(error)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "ditq", "engine": dict(engine)}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return ""


@torch.no_grad()
def _write(module: nn.Module, name: str, calls: tuple[Callable[[], Any], Callable[[], Any]], folder: Path) -> None:
    import openvino as ov

    inner = module.get_submodule(name)
    first, second = (capture_module(inner, name, call) for call in calls)
    segment, check = write_segment(Part(name, {name: inner}, (first, second)), folder)
    program = files.program(folder, segment, compile_config(0))
    check.run(name, program, program)
    Manifest(
        openvino=ov.__version__, architecture=type(module).__name__, group_size=0, segments=(segment,)
    ).write(folder, plan=None)  # fmt: skip


def _decode(vae: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    channels, dtype = vae.config.latent_channels, vae.dtype

    def call(batch: int, height: int, width: int) -> Callable[[], Any]:
        return lambda: vae.decode(torch.randn(batch, channels, height, width, dtype=dtype))

    return call(*LATENTS[0]), call(*LATENTS[1])


def _encode(encoder: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    def call(batch: int, tokens: int) -> Callable[[], Any]:
        ids = torch.randint(1, encoder.config.vocab_size, (batch, tokens))
        mask = torch.ones_like(ids)
        mask[0, tokens // 2 :] = 0  # one padded text in the batch
        return lambda: encoder(ids, attention_mask=mask)

    return call(*TEXTS[0]), call(*TEXTS[1])


# By class of the component: the module inside that becomes a graph, and two example calls.
_CALLS: dict[str, tuple[str, Callable[[Any], tuple[Callable[[], Any], Callable[[], Any]]]]] = {
    "AutoencoderKL": ("decoder", _decode),
    "T5EncoderModel": ("encoder", _encode),
    "UMT5EncoderModel": ("encoder", _encode),
}
