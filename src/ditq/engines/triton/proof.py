"""Every kernel against its reference on small inputs, before the engine is used on a device.

The references run on the CPU, in plain torch. The tolerances:

- *Exact* checks: codes, zero points, scales and sums of codes must be equal. So must outputs whose scales are powers
  of two, since float32 represents them without rounding.
- *Close* codes: the operations before the rounding (a norm, a nonlinearity, smoothing, a rotation) sum in a different
  order, so a number near a tie may be rounded to the other side. Codes minus zero points may differ by one, for at
  most one code in ``RARE``; scales by at most ``SCALE`` of themselves. The sums must be exactly those of the kernel's
  codes.
- *Close* outputs are rounded to bf16: each may differ by ``STEP`` of itself (half a step of bf16), plus ``ROUNDING``
  of the largest one for the float32 sums before.

A success is saved on disk for one device name, one torch, one Triton and one state of these files; failures are not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ditq.engines.triton import activation, expand, linear, norm, quantize
from ditq.engines.triton.engine import rotates
from ditq.engines.triton.rows import INTERPRETED, Codes, Target
from ditq.engines.triton.tiles import LARGEST, Tile, Work, architecture, tiles
from ditq.engines.triton.tuning import write
from ditq.folders import cache_root
from ditq.numerics import Rotation, pack, scaled_signs

RARE = 200
SCALE = 1e-4
STEP = 2**-7 if INTERPRETED else 2**-8  # the interpreter truncates instead of rounding
ROUNDING = 1e-5


class Check(NamedTuple):
    """One kernel in one of its forms.

    Attributes:
        name: for messages.
        run: runs it on a device and returns the difference as text, or None.
    """

    name: str
    run: Callable[[torch.device], str | None]


def prove(device: torch.device) -> str | None:
    """The first check that fails on this device, and its difference; or None. See ``ditq.engines.Engine.prove``."""
    record = record_of(device)
    if record.exists():
        return None
    done = 0
    for check in checks(device):
        try:
            difference = check.run(device)
        except Exception as error:
            difference = _in_short(error)
        if difference is not None:
            return f"{check.name}: {difference}"
        done += 1
    with suppress(OSError):  # without a writable cache the next process repeats the proof
        write(record, {"format": 1, "device": _name(device), "checks": done})
    return None


def checks(device: torch.device) -> Iterator[Check]:
    """All checks for a device, each kernel in the forms that the engine uses there."""
    yield from _quantizers(device)
    yield from _prologues(device)
    yield from _expansions()
    yield from _products(linear.capability_of(device))
    yield from _epilogues(linear.capability_of(device))


def record_of(device: torch.device) -> Path:
    """The file that records that the checks passed."""
    known = (_name(device), str(linear.capability_of(device)), torch.__version__, triton.__version__, sources())
    return cache_root() / "triton" / f"proved-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.json"


@cache
def sources() -> str:
    """A digest of the kernels and of these checks."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the interpreter on {device}"


def _in_short(error: Exception) -> str:
    """Type and first line; a compiler's message may have hundreds of lines."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return type(error).__name__ + (f": {lines[0][:300]}" if lines else "")


# ------------------------------------------------------------------------------------------- quantizers


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(m: int, k: int, seed: int) -> Tensor:
    """Rows of magnitudes from 1e-3 to 1e3; one row of zeros, one row of numbers on the ties of 8-bit codes."""
    x = torch.randn(m, k, generator=_random(seed), dtype=torch.float32)
    x = x * torch.logspace(-3, 3, m, dtype=torch.float32)[:, None] + 0.1
    x[m // 2] = 0
    x[m // 3] = torch.arange(k).float() - k // 2 + 0.5
    x[m // 3, :2] = torch.tensor([127.0, -127.0])  # the scale of this row is 1
    return x


def _target(
    k: int, *, bits: int = 8, symmetric: bool = True, groups: int = 1, smooth: bool = False, block: int = 0,
    given: float | None = None,
) -> Target:  # fmt: skip
    """Smoothing scales and signs are random; ``given`` is one static scale."""
    signs = scaled_signs(Rotation(k, block, seed=1), torch.device("cpu")) if block else None
    scale = torch.rand(k, generator=_random(2), dtype=torch.float32) + 0.5 if smooth else None
    return Target(
        scale,
        signs,
        block,
        bits,
        symmetric,
        groups,
        None if given is None else torch.full((1, 1), given, dtype=torch.float32),
    )


def _coded(name: str, module: Any, *arguments: Any, exact: bool = False) -> Check:
    """A check of the quantizing kernel of ``module``; its launch is looked up when the check runs."""

    def run(device: torch.device) -> str | None:
        found: Codes = module.launch(*moved(arguments, device))
        return compare_codes(tuple(t.cpu() for t in found), module.reference(*arguments), exact=exact)

    return Check(name, run)


def _quantizers(device: torch.device) -> Iterator[Check]:
    plain, odd = _rows(37, 96, 3), _rows(11, 75, 4)
    name = "quantize_rows"
    yield _coded(f"{name}, 8 bits per token", quantize, plain, *_target(96), exact=True)
    yield _coded(f"{name}, 8 bits, 75 columns", quantize, odd, *_target(75, symmetric=False), exact=True)
    yield _coded(
        f"{name}, 4 bits in groups, asymmetric", quantize, plain, *_target(96, bits=4, symmetric=False, groups=3),
        exact=True,
    )  # fmt: skip
    yield _coded(f"{name}, static scale, bf16", quantize, plain.bfloat16(), *_target(96, given=0.05), exact=True)
    yield _coded(f"{name}, smoothed", quantize, plain, *_target(96, smooth=True))
    broken = plain.clone()
    broken[5, 7], broken[9, 0] = float("nan"), float("inf")

    def marked(device: torch.device) -> str | None:
        scale = quantize.launch(*moved((broken, *_target(96)), device))[1].cpu()[:, 0]
        rows = (~scale.isfinite()).nonzero().flatten().tolist()
        return None if rows == [5, 9] else f"rows 5 and 9 are not finite, and rows {rows} are marked"

    yield Check(f"{name}, rows that are not finite", marked)
    for block in (16, 32, 64, 128):
        if rotates(Rotation(256, block, 1), 256, device):
            yield _coded(
                f"{name}, rotated by blocks of {block}", quantize, _rows(21, 256, 5),
                *_target(256, smooth=block == 128, symmetric=block != 64, block=block),
            )  # fmt: skip


def _prologues(device: torch.device) -> Iterator[Check]:
    """Norms and nonlinearities; the last check of each uses all options."""
    k, samples = 192, 3
    x = torch.randn(7 * samples, k, generator=_random(6), dtype=torch.float32) * 3 + 0.7
    x[4] = 0
    wide = torch.randn(samples, 6 * k, generator=_random(7), dtype=torch.float32)
    weight, bias, factor, shift = wide[0, :k], wide[1, :k], wide[:, k : 2 * k] + 1, wide[:, 4 * k : 5 * k]
    block = 64 if rotates(Rotation(k, 64, 1), 64, device) else 0
    full = _target(k, symmetric=False, groups=3, smooth=True, block=block)
    yield _coded("norm_quantize, affine", norm, x, 1e-5, weight, bias, None, None, *_target(k))
    yield _coded(
        "norm_quantize, modulated, bf16", norm, x.bfloat16(), 1e-6, None, None, factor.bfloat16(), shift.bfloat16(),
        *_target(k, smooth=True),
    )  # fmt: skip
    yield _coded(
        "norm_quantize, modulated and balanced, in groups", norm, x, 1e-6, None, None, factor, shift,
        *full,
    )  # fmt: skip
    yield _coded("activation_quantize, GELU", activation, x, "gelu", False, *_target(k, symmetric=False))
    yield _coded(
        "activation_quantize, tanh GELU, bf16", activation, x.bfloat16(), "gelu_tanh", False, *_target(k, smooth=True)
    )
    yield _coded("activation_quantize, SiLU", activation, x, "silu", False, *_target(k))
    yield _coded(
        "activation_quantize, SwiGLU, balanced", activation, torch.cat([x, x.flip(0)], 1), "silu", True,
        *full._replace(groups=1),
    )  # fmt: skip


def compare_codes(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], *, exact: bool) -> str | None:
    """The difference between codes, scales, zero points and sums on the CPU as text, or None."""
    codes, scale, zero, sums = found
    groups = scale.shape[1]
    if exact:
        pairs = zip(("codes", "scales", "zero points", "sums of codes"), found, expected, strict=True)
        return next((text for what, a, b in pairs if (text := differing(what, a, b)) is not None), None)
    own = codes.unflatten(1, (groups, -1)).sum(-1, dtype=torch.int32)
    if (text := differing("sums of codes", sums, own)) is not None:
        return text
    apart = (_centred(codes, zero, groups) - _centred(expected[0], expected[2], groups)).abs()
    if int(apart.max()) > 1 or int((apart > 0).sum()) > math.ceil(apart.numel() / RARE):
        return f"{int((apart > 0).sum())} of {apart.numel()} codes differ, by up to {int(apart.max())}"
    error = float(((scale - expected[1]).abs() / expected[1]).max())
    return None if error <= SCALE else f"scales differ by up to {error:.1e} of themselves"


def _centred(codes: Tensor, zero: Tensor, groups: int) -> Tensor:
    """Codes minus zero points, int32 [M, K]."""
    return (
        codes.int() if zero.ndim < 2 else (codes.int().unflatten(1, (groups, -1)) - zero.int()[..., None]).flatten(1)
    )


def differing(what: str, found: Tensor, expected: Tensor, allowed: Tensor | float = 0.0) -> str | None:
    """The number of elements that differ by more than ``allowed``, and the first one, as text; None if all agree."""
    if found.shape != expected.shape:
        return f"{what} have shape {list(found.shape)} instead of {list(expected.shape)}"
    wrong = ~((found.double() - expected.double()).abs() <= allowed)
    if not bool(wrong.any()):
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} {what} differ, the first at {list(at)}: "
        f"{found[at].item():.6g} instead of {expected[at].item():.6g}"
    )


def moved(values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """The tensors among ``values`` on the device."""
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


# --------------------------------------------------------------------------------------------- products


def _expansions() -> Iterator[Check]:
    for bits in (2, 3, 5, 6, 7):
        codes, zero = _codes(bits, 21, 75, 8), _codes(bits, 21, 3, 9) // 2
        arguments = (pack(codes, bits), bits, 75, zero)

        def run(device: torch.device, arguments: tuple[Any, ...] = arguments) -> str | None:
            return differing("codes", expand.launch(*moved(arguments, device)).cpu(), expand.reference(*arguments))

        yield Check(f"expand, {bits} bits", run)


def _codes(bits: int, m: int, k: int, seed: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (m, k), generator=_random(seed)).to(torch.int8)


def _powers(m: int, groups: int, seed: int) -> Tensor:
    """Random scales of 0.5, 1 or 2."""
    return 2.0 ** (torch.randint(-1, 2, (m, groups), generator=_random(seed)).float())


def _product(
    name: str, bits: int, *, m: int = 70, k: int = 256, n: int = 144, x_zero: bool = False, w_zero: bool = True,
    x_groups: int = 1, w_groups: int = 1, one_scale: bool = False, tile: Tile | None = None,
) -> Check:  # fmt: skip
    """A check of an integer product whose scales are powers of two: the output must be exact."""
    x, w = _codes(8, m, k, 10), _codes(bits, n, k, 11)
    rows, columns = (1, 1) if one_scale else (m, n)
    arguments = (
        x, _powers(rows, x_groups, 12), _codes(7, rows, x_groups, 13).short() if x_zero else None, None,
        pack(w, bits), bits, _powers(columns, w_groups, 14), _codes(bits, columns, w_groups, 15) if w_zero else None,
        None, None, None, None, None, torch.float32,
    )  # fmt: skip

    def run(device: torch.device) -> str | None:
        y = linear.launch(*moved(arguments, device), tile=tile).cpu()
        return differing("outputs", y, linear.reference(*arguments))

    return Check(f"int8_linear, {name}" + ("" if tile is None else f", tile {tuple(tile)}"), run)


def _products(capability: int) -> Iterator[Check]:
    """The formats with the smallest tile, and each tile of the table with its main formats."""
    for bits in (8, 4):
        yield _product(f"W{bits}A8, odd sizes", bits, m=33, k=131, n=45)
        yield _product(f"W{bits}A8, all asymmetric", bits, x_zero=True)
        yield _product(f"W{bits}A8, one scale each, symmetric", bits, w_zero=False, one_scale=True)
        yield _product(f"W{bits}A8, groups of the weight", bits, w_groups=4)
    yield _product("W3A8", 3)
    yield _product("W8A8, groups of both, all asymmetric", 8, k=192, x_groups=2, w_groups=6, x_zero=True)
    yield _product("W4A8, odd groups of the input", 4, k=144, x_groups=3, x_zero=True)
    most = LARGEST["more"][architecture(capability)]
    for _, tile in tiles(capability, False):
        yield _product("W8A8", 8, tile=tile)
        if most >= tile.BM * tile.BN:
            yield _product("W4A8", 4, tile=tile)
    for _, tile in tiles(capability, True):
        yield _product("W4A8, groups", 4, w_groups=2, tile=tile)


def _epilogues(capability: int) -> Iterator[Check]:
    """Bias, gate, residual and a low-rank branch, rounded to bf16."""
    cases: tuple[tuple[str, Work, int, int], ...] = (
        ("gate and residual", "more", 128, 0),
        ("gate of several samples and residual", "most", 7, 0),
        ("low rank", "more", 0, 24),
    )
    for what, work, tokens, rank in cases:
        most = LARGEST[work][architecture(capability)]
        tile = next(tile for _, tile in tiles(capability, False) if most >= tile.BM * tile.BN)
        yield _epilogue(what, tokens, rank, tile)


def _epilogue(what: str, tokens: int, rank: int, tile: Tile) -> Check:
    m, k, n = (2 * tokens if tokens == 128 else 35), 256, 144
    # The interpreter does not support products of bf16 matrices.
    kind = torch.float32 if INTERPRETED else torch.bfloat16

    def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=_random(seed), dtype=torch.float32).to(dtype)

    arguments = (
        _codes(8, m, k, 16), torch.rand(m, 1, generator=_random(17), dtype=torch.float32) / k, None, None,
        pack(_codes(8, n, k, 18), 8), 8, torch.rand(n, 1, generator=_random(19), dtype=torch.float32) / 127, None,
        normal(n, seed=20),
        normal(m // tokens, 2 * n, seed=21)[:, n:] if tokens else None,
        normal(m, n, seed=22) if tokens else None,
        normal(m, rank, seed=23, dtype=kind) if rank else None,
        normal(n, rank, seed=24, dtype=kind) if rank else None,
    )  # fmt: skip

    def run(device: torch.device) -> str | None:
        expected = linear.reference(*arguments, torch.float32)
        y = linear.launch(*moved(arguments, device), torch.bfloat16, tile=tile).cpu()
        return differing("outputs", y, expected, STEP * expected.abs() + ROUNDING * expected.abs().max())

    return Check(f"int8_linear, {what}", run)
