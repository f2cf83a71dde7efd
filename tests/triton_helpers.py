"""What the tests of the Triton kernels share. They run in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def why_not() -> str | None:
    """Why the kernels cannot run here in any way, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    found = importlib.metadata.version("triton")
    if not torch.cuda.is_available() and tuple(int(x) for x in found.split(".")[:2]) < (3, 9):
        return f"the interpreter of Triton {found} has no fused multiply-add, and breaks with numpy 2.4; 3.9 has both"
    return None


def moved(values: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The tensors among ``values`` on the device, with their strides."""
    return tuple(
        torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device).copy_(v) if isinstance(v, Tensor) else v
        for v in values
    )


def home(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(v.cpu() for v in values)


def assert_codes(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, exact: bool) -> None:
    """Codes, scales, zero points and sums are those of the reference.

    Not exact: what came before was rounded in another order, so a code may be one off where it was near a tie.
    The sums are always those of the codes that were found.
    """
    codes, scale, zero, sums = home(found)
    assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
    groups = scale.shape[1]
    assert codes.dtype == torch.int8
    in_groups = codes.unflatten(1, (groups, codes.shape[1] // groups))
    assert torch.equal(sums, in_groups.sum(-1, dtype=torch.int32))
    if exact:
        assert all(torch.equal(a, b) for a, b in zip((codes, scale, zero), expected[:3], strict=True))
        return
    apart = (codes.int() - expected[0].int()).abs()
    shifted = zero.int() - expected[2].int()  # a zero point may be one off, too, and its group with it
    assert bool((shifted.abs() <= 1).all())
    assert bool((apart <= 1 + (len(shifted) > 0)).all())
    assert (apart > 0).sum() <= 2e-3 * codes.numel() + (shifted != 0).sum() * codes.shape[1] // groups
    assert torch.allclose(scale, expected[1], rtol=1e-4, atol=0)
