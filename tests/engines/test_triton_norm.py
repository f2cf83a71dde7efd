"""Norms and nonlinearities that quantize: the codes of the same steps in float32, but for ties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_helpers import DEVICES, assert_codes, moved, why_not

from ditq.numerics import Rotation, scaled_signs

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

import ditq.engines.triton.activation as activation
import ditq.engines.triton.norm as norm
from ditq.engines.triton.rows import Target


def target(k: int, *, balanced: bool = False, symmetric: bool = True, groups: int = 1, block: int = 32) -> Target:
    if not balanced:
        return Target(None, None, 0, 8, symmetric, groups, None)
    signs = scaled_signs(Rotation(k, block, seed=2), torch.device("cpu"))
    return Target(torch.rand(k) + 0.5, signs, block, 8, symmetric, groups, None)


def rows(m: int, k: int) -> Tensor:
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None] + 0.7
    x[m // 2] = 0
    return x


def check(operation: object, device: str, *arguments: object) -> None:
    found = operation.launch(*moved(arguments, device))  # type: ignore[attr-defined]
    assert_codes(found, operation.reference(*arguments), exact=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("m", "k"), [(0, 32), (1, 8), (5, 100), (9, 1152)])
def test_norms(m: int, k: int, device: str) -> None:
    check(norm, device, rows(m, k) if m else torch.empty(0, k), 1e-6, None, None, None, None, *target(k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_modulation(tokens: int, dtype: torch.dtype, device: str) -> None:
    """Samples end within a program's rows; shift and scale are chunks of a wider tensor."""
    k = 96
    wide = (torch.randn(6 // tokens, 6 * k) * 0.3).to(dtype)
    x, weight, bias = rows(6, k).to(dtype), torch.rand(k).to(dtype), torch.randn(k).to(dtype)
    shift, factor = wide[:, :k], wide[:, k : 2 * k]
    check(norm, device, x, 1e-6, None, None, factor, shift, *target(k))
    check(norm, device, x, 1e-6, weight, bias, factor, shift, *target(k, balanced=True, symmetric=False))


def test_the_reference_is_that_of_torch() -> None:
    x, weight, bias = torch.randn(4, 32) + 1, torch.rand(32), torch.randn(32)
    shift, factor = torch.randn(2, 32), torch.randn(2, 32)
    to = target(32)
    layer = F.layer_norm(x, (32,), weight, bias, 1e-5)
    modulated = (layer.view(2, 2, 32) * factor[:, None] + shift[:, None]).view(4, 32)
    assert_codes(norm.reference(x, 1e-5, weight, bias, factor, shift, *to), to.reference(modulated), exact=False)
    plain = F.layer_norm(x, (32,), weight, None, 1e-5)
    assert_codes(norm.reference(x, 1e-5, weight, None, None, None, *to), to.reference(plain), exact=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [3, 12])
def test_groups(groups: int, device: str) -> None:
    x = rows(5, 384)
    to = target(384, groups=groups, symmetric=False, balanced=True)
    check(norm, device, x, 1e-6, None, None, None, None, *to)
    check(activation, device, x, "gelu", False, *to)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", activation.FUNCTIONS)
def test_activations(function: str, gated: bool, device: str) -> None:
    x = torch.randn(7, 400) * 3
    check(activation, device, x, function, gated, *target(200 if gated else 400, symmetric=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", activation.FUNCTIONS)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy's exp, in the interpreter; 1 / inf is right
def test_activations_of_large_numbers_in_half_precision(function: str, dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(5, 128) * torch.tensor([1e-4, 1, 30, 100, 200])[:, None]).to(dtype)
    check(activation, device, x, function, False, *target(128, balanced=True))
