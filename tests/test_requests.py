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
from ditq.allocation import ACTIVATIONS, WEIGHTS, Bits, Choices, Evolution
from ditq.errors import UsageError
from ditq.recipe import load
from ditq.requests import check_prompts, search_job, seed_of
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


# ------------------------------------------------------------------------------------- search


def job(options: dict[str, Any] | None = None, **changes: Any) -> Bits | dict[str, Any]:
    """``search_job`` with the defaults of ``ditq.search``."""
    defaults: dict[str, Any] = {
        "weights": (), "activations": (), "unit": "layer", "segments": 1, "budget": None, "strategy": None,
        "metrics": None,
    }  # fmt: skip
    return search_job(**{"error": None, **defaults, **changes}, options=options or {})


def test_without_bits_a_search_is_one_of_group_sizes_by_evolution() -> None:
    assert job() == {"strategy": "evolution", "budget": None}
    assert job(budget="uniform:64") == {"strategy": "evolution", "budget": ("uniform:64",)}
    assert job(budget=1e12, strategy="random") == {"strategy": "random", "budget": (1e12,)}
    own = Evolution(4, 2, 1, 1)
    assert job(strategy=own) == {"strategy": own, "budget": None}
    for sizes in ({"sizes": [32, 64]}, {"choices": Choices(weights=(8, 4))}):  # not of bits, despite the budget
        assert job(sizes, budget="5GB") == {"strategy": "evolution", "budget": ("5GB",)}


def test_bits_are_chosen_by_the_prediction_error_unless_asked_otherwise() -> None:
    assert job(weights=[8, 4], budget="weights:5") == Bits(("weights:5",), weights=(8, 4))
    chosen = job(
        weights=[8, 4], activations=[8, 6], unit="role", segments=3, budget=["5GB", "activations:7"],
        strategy="decoupled",
        options={"moments": 2, "fitness": None, "rounding": "nearest", "calibration": [], "progress": None},
    )  # fmt: skip
    expected = Bits(("5GB", "activations:7"), (8, 4), (8, 6), unit="role", segments=3, strategy="decoupled")
    assert chosen == expected
    metrics = {"content": "clip_score"}
    found = job(weights=[8], budget="weights:8", strategy="decoupled", metrics=metrics)
    assert isinstance(found, Bits) and found.metrics == metrics


@pytest.mark.parametrize(
    ("budget", "weights", "activations"),
    [
        ("5GB", WEIGHTS, ()),
        ("weights:4", WEIGHTS, ()),
        ("activations:6", (), ACTIVATIONS),
        (["5GB", "activations:6"], WEIGHTS, ACTIVATIONS),
    ],
)
def test_a_budget_in_bytes_or_bits_alone_starts_a_search_of_bits(
    budget: Any, weights: tuple[int, ...], activations: tuple[int, ...]
) -> None:
    found = job(budget=budget)
    assert isinstance(found, Bits)
    assert (found.weights, found.activations, found.strategy) == (weights, activations, "error")


def test_bits_by_candidates_are_of_one_part() -> None:
    expected = {
        "strategy": "evolution", "budget": ("weights:5",), "choices": Choices(weights=(8, 4), unit="block")
    }  # fmt: skip
    assert job({"trials": 3}, weights=[8, 4], budget="weights:5", strategy="evolution", unit="block") == expected
    found = job(budget="weights:5", strategy="uniform")
    assert isinstance(found, dict) and found["choices"] == Choices(weights=WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"strategy": "annealing"}, {}, "Unknown strategy 'annealing'.*decoupled, error, evolution, greedy, program"),
        ({"strategy": "greedy"}, {}, r"'greedy' chooses bits: pass weights=\[8, 4, 3\]"),
        ({"strategy": "error", "budget": "5GB"}, {"sizes": [32]}, "'error' chooses bits"),
        ({"weights": [8, 4], "budget": "weights:5"}, {"sizes": [32]}, r"bits \(weights, activations\) or sizes"),
        ({"weights": [8, 4], "strategy": "random"}, {"choices": Choices()}, "or choices, not both"),
        ({"weights": [8, 4], "budget": "weights:5"}, {"trials": 3}, "trials has no effect with strategy 'error'"),
        ({"budget": "5GB", "strategy": "greedy"}, {"storage": "f"}, "storage has no effect with strategy 'greedy'"),
        ({"budget": "5GB", "unit": "model"}, {}, "layer, block or role, got 'model'"),
        ({"weights": [8, 4]}, {}, "Bits of weights need a budget of their own"),
        ({"budget": "5 apples"}, {}, "A budget must be .* got '5 apples'"),
        ({"segments": 2}, {}, "segments has no effect with strategy 'evolution'"),
        ({"metrics": {"content": "ssim"}}, {}, "metrics has no effect with strategy 'evolution'"),
        ({"unit": "block"}, {}, "unit has no effect in a search of group sizes"),
        (
            {"weights": [8], "activations": [8], "strategy": "random", "budget": "weights:8"}, {},
            "'random' chooses bits of weights or of activations, one at a time; error, greedy, decoupled choose both",
        ),
        ({"weights": [8, 4], "strategy": "random", "unit": "model"}, {}, "Unknown unit 'model'"),
        ({"weights": [9], "strategy": "random"}, {}, "Bits of weights must be 2 to 8, or 16"),
    ],
)  # fmt: skip
def test_wrong_searches(changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        job(options, **changes)


def test_a_wrong_search_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.allocation.allocate_bits", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UsageError, match="patience has no effect with strategy 'error'"):
        ditq.search(tiny_dit(), "rtn-w4a8", ["1"], budget="weights:4", patience=1.0)
