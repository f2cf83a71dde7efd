"""The checks of the Triton kernels: right kernels pass on every device, and no broken kernel does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layer_plan
from torch import Tensor, nn
from triton_helpers import DEVICES, why_not

from ditq import engines
from ditq.layers import QuantizedLinear

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

from ditq.engines.triton import TritonEngine, activation, expand, linear, norm, proof, quantize, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHECKS = {check.name: check for check in proof.checks(DEVICE)}
MODULES = {
    "quantize_rows": quantize, "norm_quantize": norm, "activation_quantize": activation, "expand": expand,
    "int8_linear": linear,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, for rows with Inf


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path))
    engines.registry.forget()
    yield
    engines.registry.forget()


def module_of(name: str) -> Any:
    return MODULES[name.partition(",")[0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CHECKS)
def test_kernels_agree_with_their_references(name: str, device: str) -> None:
    assert CHECKS[name].run(torch.device(device)) is None


def test_every_kernel_has_a_check() -> None:
    assert {name.partition(",")[0] for name in CHECKS} == set(MODULES)


def off_by_one(module: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is wrong: by one in one place, or in all codes where one may be rounded differently."""

    def broken(*arguments: Any, **kwargs: Any) -> Any:
        found = launch(*arguments, **kwargs)
        if isinstance(found, Tensor):
            found[0, 1] += 1
            return found
        codes, scale, zero, sums = found
        if scale.isnan().any():
            return codes, torch.ones_like(scale), zero, sums
        codes += torch.where(codes < 0, 1, -1).to(torch.int8)
        return codes, scale, zero, rows.sums_of(codes, scale.shape[1])

    return broken


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_fails_if_its_kernel_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(name)
    monkeypatch.setattr(module, "launch", off_by_one(module, module.launch))
    assert CHECKS[name].run(DEVICE) is not None


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("quantize_rows, 8 bits")])
def test_one_code_is_enough_where_codes_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = quantize.launch

    def broken(*arguments: Any) -> Any:
        codes, *others = plain(*arguments)
        codes[7, 3] += 1
        return codes, *others

    monkeypatch.setattr(quantize, "launch", broken)
    assert str(CHECKS[name].run(DEVICE)).startswith("1 of ")
    assert "codes differ, the first at [7, 3]: " in str(CHECKS[name].run(DEVICE))


# Mistakes within the kernels, and the checks that have to see them. Only the interpreter takes new functions.
MUTANTS: dict[str, tuple[Any, str, Callable[..., Any], list[str]]] = {
    "rounds half away from zero": (
        rows, "nearest", lambda v: (v + rows.tl.where(v > 0, 0.5, -0.5)).to(rows.tl.int32),
        ["quantize_rows, 8 bits per token", "quantize_rows, static scale, bf16"],
    ),
    "does not rotate": (
        rows, "rotate_blocks", lambda y, *_: y,
        [n for n in CHECKS if "rotated" in n] + ["norm_quantize, modulated and balanced, in groups"],
    ),
    "clips no code": (rows, "clip", lambda v, low, high: v, ["quantize_rows, static scale, bf16"]),
    "takes the identity for the nonlinearity": (
        activation, "nonlinear", lambda x, NAME: x, [n for n in CHECKS if n.startswith("activation")]
    ),
    "forgets the zero points": (
        linear, "subtract_zeros", lambda acc, *_: acc,
        [n for n in CHECKS if "asymmetric" in n and n.startswith("int8")]
        + [n for n in CHECKS if n.startswith("int8_linear, W4")],
    ),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels keep their functions")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistakes_within_kernels_are_seen(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, function, names = MUTANTS[mutant]
    monkeypatch.setattr(module, attribute, function)
    assert names
    for name in names:
        assert CHECKS[name].run(DEVICE) is not None, name


# ---------------------------------------------------------------------------------------------- the whole proof


def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two checks only; returns the names of those that run."""
    ran: list[str] = []

    def counted(check: proof.Check) -> proof.Check:
        return check._replace(run=lambda device: ran.append(check.name) or check.run(device))

    two = [counted(CHECKS[name]) for name in ("quantize_rows, 8 bits per token", "expand, 3 bits")]
    monkeypatch.setattr(proof, "checks", lambda device: iter(two))
    return ran


def test_a_success_is_kept_until_the_kernels_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = few(monkeypatch)
    assert proof.prove(DEVICE) is None
    assert proof.prove(DEVICE) is None
    assert len(ran) == 2
    monkeypatch.setattr(proof, "sources", lambda: "other kernels")
    assert proof.prove(DEVICE) is None
    assert len(ran) == 4
    monkeypatch.setattr(proof.triton, "__version__", "4.0.0")
    assert proof.prove(DEVICE) is None
    assert len(ran) == 6


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = few(monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr(expand, "launch", off_by_one(expand, expand.launch))
        assert str(proof.prove(DEVICE)).startswith("expand, 3 bits: 1 of 1575 codes differ, the first at [0, 1]: ")
    assert proof.prove(DEVICE) is None
    assert len(ran) == 4


def test_a_cache_that_cannot_be_written_costs_a_proof_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = few(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path / "file"))
    assert proof.prove(DEVICE) is None
    assert proof.prove(DEVICE) is None
    assert len(ran) == 4


def test_a_kernel_that_does_not_compile_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)

    def launch(*_: Any) -> Any:
        raise RuntimeError("\nPassManager::run failed\nmodule {\n" + 300 * "  ttg.local_load\n")

    monkeypatch.setattr(expand, "launch", launch)
    assert proof.prove(DEVICE) == "expand, 3 bits: RuntimeError: PassManager::run failed"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton engine runs on this machine, in the interpreter where there is no GPU."""
    monkeypatch.setattr(TritonEngine, "why_unavailable", lambda self: None)
    monkeypatch.setattr(TritonEngine, "why_unsupported", lambda *_: None)


def test_the_engine_is_chosen_once_its_kernels_are_proved(here: None) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 24), layer_plan())
    assert engines.choose(layer.plan.weight, layer.plan.activation, DEVICE).name == "triton"  # type: ignore[arg-type]
    assert proof.record_of(DEVICE).exists()
    row = next(row for row in engines.registry.report(DEVICE) if row.name == "triton")
    assert row == ("triton", True, "ready; its kernels agree with their references here", True)


def test_with_a_broken_kernel_the_torch_engine_runs(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(quantize, "launch", off_by_one(quantize, quantize.launch))
    layer = QuantizedLinear.from_linear(nn.Linear(32, 24), layer_plan()).to(DEVICE)
    x = torch.randn(3, 32, device=DEVICE)
    with pytest.warns(
        UserWarning, match="The triton engine is not used: .* quantize_rows, 8 bits per token: .* codes "
    ):
        y = layer(x)
    with engines.use_engine("torch"):
        assert torch.equal(y, layer(x))
    with engines.use_engine("triton"), pytest.raises(engines.registry.DitqError, match="quantize_rows, 8 bits per"):
        layer(x)
    assert not engines.fuses(DEVICE)
    row = next(row for row in engines.registry.report(DEVICE) if row.name == "triton")
    assert (row.available, row.proved) == (False, False)
    assert "quantize_rows, 8 bits per token" in row.reason
