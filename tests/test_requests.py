"""Wrong arguments of the verbs: one message before the work."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from helpers import tiny_dit, tiny_pixart
from torch import nn

import ditq
from ditq.errors import UsageError
from ditq.recipe import load
from ditq.requests import check_prompts, seed_of
from ditq.sampling import Sampling


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_a_seed_out_of_range_is_one_message(seed: int) -> None:
    for use in (lambda: seed_of(load("rtn-w8a8"), seed), lambda: Sampling(seed)):
        with pytest.raises(UsageError, match=f"seed must be 0 to .*got {seed}"):
            use()


@pytest.mark.parametrize("prompts", ["1", b"1", io.StringIO("1\n"), 1], ids=["text", "bytes", "file", "number"])
def test_every_verb_refuses_prompts_that_are_no_list(prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_dit()
    monkeypatch.setattr("ditq.api.load", lambda *_, **__: pytest.fail("too late"))
    for use in (
        lambda: ditq.quantize(pipe, "viditq-w4a8", prompts=prompts),
        lambda: ditq.search(pipe, "rtn-w4a8", prompts),
        lambda: ditq.compare("bundled:emoji-class", pipe, prompts),
        lambda: ditq.export("bundled:emoji-class", "out", attention="int8", prompts=prompts),
    ):
        with pytest.raises(UsageError, match="prompts must be a list of strings, got"):
            use()


def test_prompts_may_be_an_iterator() -> None:
    pipe = tiny_dit()
    quick = ["calibration.steps=2", "calibration.prompts=2", "calibration.rows=64"]
    ditq.quantize(pipe, "viditq-w4a8", prompts=(str(i) for i in range(2)), overrides=quick)
    assert ditq.compare(tiny_dit(), pipe, (str(i) for i in range(2)), steps=1).metrics["psnr_db"].n == 2


def test_the_largest_seed_is_one_for_every_verb(tmp_path: Path) -> None:
    pipe = tiny_dit()
    quick = ["calibration.steps=2", "calibration.prompts=2", "calibration.rows=64", "balance.rotate=true"]
    ditq.quantize(pipe, "viditq-w4a8", prompts=["0", "1"], overrides=quick[:3], seed=2**62)
    ditq.load(ditq.save(pipe, tmp_path / "out"))
    assert ditq.compare(tiny_dit(), pipe, ["0", "1"], steps=1, seed=2**62).metrics["psnr_db"].n == 2


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: Any) -> nn.Module:
    model.transformer_blocks[0] = compiled(model.transformer_blocks[0])
    return model  # type: ignore[no-any-return]


def offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, "cpu")  # type: ignore[no-any-return]


def model_offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload_with_hook

    return cpu_offload_with_hook(model, "cpu")[0]  # type: ignore[no-any-return]


def group_offloaded(model: nn.Module) -> nn.Module:
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    return model


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (compiled, r"wraps a PixArtTransformer2DModel.*pipe\.transformer = pipe\.transformer\._orig_mod"),
        (nn.DataParallel, r"wraps a PixArtTransformer2DModel.*pipe\.transformer = pipe\.transformer\.module"),
        (compiled_in_place, r"transformer is compiled.*without compile\(\)"),
        (compiled_blocks, r"transformer\.transformer_blocks\.0 is compiled"),
        (offloaded, r"is offloaded \(by accelerate\).*pipe\.remove_all_hooks\(\)"),
        (model_offloaded, r"is offloaded \(by accelerate\)"),
        (group_offloaded, r"is offloaded \(by diffusers\)"),
        (on_meta, r"is offloaded \(by a device map\)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("bare", [False, True], ids=["pipeline", "bare"])
def test_a_compiled_or_offloaded_transformer_is_refused(
    change: Callable[[nn.Module], nn.Module], advice: str, bare: bool
) -> None:
    pipe = tiny_pixart()
    model = change(pipe.transformer)
    pipe.transformer = model
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=advice):
        ditq.quantize(model if bare else pipe, "rtn-w8a8")
    if not bare:
        with pytest.raises(UsageError, match=advice):
            ditq.search(pipe, "rtn-w4a8", ["a"])
    assert [type(module) for module in model.modules()] == kinds


def test_quantizing_works_after_the_advice() -> None:
    pipe = tiny_pixart()
    pipe.transformer = compiled(pipe.transformer)
    pipe.transformer = pipe.transformer._orig_mod
    offloaded(pipe.transformer)
    pipe.remove_all_hooks()
    assert ditq.quantize(pipe, "rtn-w8a8").plan.quantized


def test_an_open_file_is_no_list_of_prompts() -> None:
    with pytest.raises(UsageError, match="got an open file: pass prompts="):
        check_prompts(io.StringIO("a tree\n"))  # type: ignore[arg-type]


def test_export_of_a_hub_id_says_how_to_get_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export reads folders only.*hf download owner/name"):
        ditq.export("owner/name", tmp_path / "out")


def test_a_prompt_of_bytes_that_are_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Prompt 2 of 2 is not Unicode text.*--prompts FILE"):
        ditq.compare(tiny_pixart(), tiny_pixart(), ["a tree", b"gr\xc3\xbcn".decode("ascii", "surrogateescape")])
