"""Hadamard matrices by construction, and rotations by them.

Two kinds. ``hadamard``: Sylvester's and Paley's matrices, with random signs of the channels (QuaRot). ``regular``:
Kronecker powers of a regular matrix of order 4, without signs (ConvRot, arXiv 2512.03673). All rows of a regular
matrix have the same sum, so no output channel collects the mean of the inputs as the first one of Sylvester's does.

Orders of the first kind are 1, 2, Paley's q + 1 (q prime, 3 mod 4) and 2 (q + 1) (q prime, 1 mod 4), and these times
powers of two: 12, 20, 28, 36, 44, 60, 76, 84, 108, 140 and so on, hence 1152 = 36 * 32, 4608 = 36 * 128. Orders of the
second are 4, 16, 64 and 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

RotationKind = Literal["hadamard", "regular"]

REGULAR = (4, 16, 64, 256)
"""Orders of the regular matrices that are used: larger ones gain little, and readers of ConvRot have no kernels."""

# The largest power-of-two factor of a transform. For the widths of current models the other factor is 8 to 144.
_INNER_LIMIT = 128


def is_supported(n: int) -> bool:
    """Whether :func:`hadamard_matrix` can construct order ``n``."""
    return n >= 1 and _core_order(n) is not None


def largest_block(n: int, limit: int = 128) -> int:
    """The largest power of two that divides ``n`` and is at most ``limit``.

    Raises:
        ValueError: ``n`` or ``limit`` is not positive.
    """
    if n < 1 or limit < 1:
        raise ValueError(f"n and limit must be positive, got {n} and {limit}")
    return min(n & -n, 1 << (limit.bit_length() - 1))


def largest_regular_block(n: int) -> int | None:
    """The largest of :data:`REGULAR` that divides ``n``; None if 4 does not."""
    return max((block for block in REGULAR if n % block == 0), default=None)


def hadamard_matrix(n: int, kind: RotationKind = "hadamard") -> Tensor:
    """H with entries +-1 and H H^T = n I, float32 [n, n] on the CPU; its two factors are cached.

    ``hadamard``: H = kron(P, S): S the Sylvester matrix of the largest power of two for which P, a Paley matrix of
    order n / 2^k, is known (P = [1] if n is a power of two). Not symmetric in general.

    ``regular``: a Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]. Symmetric; every
    row sums to sqrt(n).

    Raises:
        ValueError: no construction is implemented; the message gives the nearest orders that have one.
    """
    outer, inner = _factors(n, kind)
    cpu = torch.device("cpu")
    # A Kronecker product is a new tensor, so no caller can write into the cache.
    return torch.kron(_cached_matrix(outer, kind, cpu), _cached_matrix(inner, kind, cpu))


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) blockdiag(H, ..., H) / sqrt(block), an orthogonal matrix [size, size].

    Attributes:
        size: K, the number of channels.
        block: the order of H; equal to ``size`` for the full transform.
        seed: of the signs; 0 for the kind ``regular``, whose signs are all +1.
        kind: of H.

    Raises:
        ValueError: ``block`` does not divide ``size`` or has no matrix of this kind, or the seed is negative, or not
            0 for a regular matrix.
    """

    size: int
    block: int
    seed: int = 0
    kind: RotationKind = "hadamard"

    def __post_init__(self) -> None:
        if self.block < 1 or self.size < 1 or self.size % self.block:
            raise ValueError(f"block must divide size {self.size}, got {self.block}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.kind == "regular" and self.seed:
            raise ValueError(f"a regular rotation has no random signs: its seed must be 0, got {self.seed}")
        _factors(self.block, self.kind)


def signs(size: int, seed: int) -> Tensor:
    """Random signs, +-1, float32 [size] on the CPU; the same on every machine and for every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    bits = torch.randint(0, 2, (size,), generator=generator, device="cpu")
    return (2 * bits - 1).to(torch.float32)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """``x @ Q`` for x [..., K], float32 [..., K].

    With H = kron(A, B) and a block of x as a matrix V [order of A, order of B]: v H = A^T V B, two small
    products instead of one K x K.

    Raises:
        ValueError: the last axis of ``x`` is not ``rotation.size``.
    """
    _check_width(x, rotation)
    kind = rotation.kind
    outer, inner = _split(rotation.block, kind)
    scaled = x.float() * _tensors[_signs_key(rotation.size, rotation.block, rotation.seed, kind, x.device)]
    v = scaled.reshape(-1, outer, inner) @ _tensors[_matrix_key(inner, kind, x.device)]
    if outer > 1:
        v = _tensors[_matrix_key(outer, kind, x.device)].T @ v
    return v.reshape(x.shape)


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """``x @ Q^T`` for x [..., K], float32 [..., K]: undoes :func:`rotate`.

    Raises:
        ValueError: the last axis of ``x`` is not ``rotation.size``.
    """
    _check_width(x, rotation)
    outer, inner = _factors(rotation.block, rotation.kind)
    v = x.float().reshape(-1, outer, inner) @ _cached_matrix(inner, rotation.kind, x.device).T
    if outer > 1:
        v = _cached_matrix(outer, rotation.kind, x.device) @ v
    return v.reshape(x.shape) * scaled_signs(rotation, x.device)


def rotation_matrix(rotation: Rotation) -> Tensor:
    """Q itself, float32 [K, K] on the CPU; for inspection and tests, :func:`rotate` does not need it."""
    matrix = hadamard_matrix(rotation.block, rotation.kind)
    blocks = torch.kron(torch.eye(rotation.size // rotation.block, device="cpu"), matrix)
    return scaled_signs(rotation, torch.device("cpu"))[:, None] * blocks


def _check_width(x: Tensor, rotation: Rotation) -> None:
    if x.ndim < 1 or x.shape[-1] != rotation.size:
        raise ValueError(f"x must have {rotation.size} channels on its last axis, got shape {tuple(x.shape)}")


@cache
def _factors(n: int, kind: RotationKind) -> tuple[int, int]:
    """Orders of A and B in H = kron(A, B); B is a power of two, at most ``_INNER_LIMIT``."""
    if kind == "regular":
        if n not in REGULAR:
            orders = ", ".join(map(str, REGULAR))
            raise ValueError(f"regular Hadamard matrices of the orders {orders} are known here, got order {n}")
        return (n // 16, 16) if n > 64 else (1, n)
    core = _core_order(n) if n >= 1 else None
    if core is None:
        below = next((m for m in range(n - 1, 0, -1) if is_supported(m)), None)
        above = next(m for m in range(max(n, 0) + 1, 2 * max(n, 1) + 1) if is_supported(m))
        nearest = " and ".join(str(m) for m in (below, above) if m is not None)
        divides = f"; the largest power of two that divides {n} is {n & -n}" if n >= 1 else ""
        raise ValueError(f"no Hadamard matrix of order {n} is known here, the nearest are {nearest}{divides}")
    inner = min(n // core, _INNER_LIMIT)
    return n // inner, inner


@cache
def _core_order(n: int) -> int | None:
    """The smallest Paley order n / 2^k; 1 for powers of two; None if there is none."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    order = 4 * odd  # all orders above 2 are multiples of 4
    while n % order == 0:
        if _paley_prime(order) is not None:
            return order
        order *= 2
    return None


def _paley_prime(order: int) -> int | None:
    """The prime q of Paley's construction for an order that is a multiple of 4; None if there is none."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == residue and q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1)):
            return q
    return None


# Both caches are filled outside of inference mode: inference tensors cannot be used in training later (LoRA).


@cache
def _cached_matrix(n: int, kind: RotationKind, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        if kind == "regular":
            matrix = torch.ones(1, 1, device="cpu")
            four = 1 - 2 * torch.eye(4, device="cpu").flip(1)
            while len(matrix) < n:
                matrix = torch.kron(matrix, four)
            return matrix.to(device)
        core = _core_order(n)
        assert core is not None
        matrix = _paley(core) if core > 1 else torch.tensor([[1.0]], device="cpu")
        sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
        while len(matrix) < n:
            matrix = torch.kron(matrix, sylvester)
        return matrix.to(device)


@cache
def scaled_signs(rotation: Rotation, device: torch.device) -> Tensor:
    """The signs divided by sqrt(block), float32 [K], so that one product applies the signs and the normalization.

    They are cached: do not write into them.
    """
    with torch.inference_mode(False):
        of_kind = signs(rotation.size, rotation.seed)
        if rotation.kind == "regular":
            of_kind = torch.ones(rotation.size, device="cpu")
        return (of_kind / math.sqrt(rotation.block)).to(device)


# torch.compile can trace neither caches nor random generators. It treats the results of the three functions below as
# constants, and reads the tensors from the dictionary. (Tensors as constants would each need a name.)

_tensors: dict[str, Tensor] = {}


def warm(rotation: Rotation, device: torch.device) -> None:
    """Fills the dictionary for a device. A layer that is compiled before its first call would find it empty: the
    compiler reads the dictionary as it was when the trace began.
    """
    _signs_key(rotation.size, rotation.block, rotation.seed, rotation.kind, device)
    for factor in _factors(rotation.block, rotation.kind):
        _matrix_key(factor, rotation.kind, device)


def _split(n: int, kind: RotationKind) -> tuple[int, int]:
    return _factors(n, kind)


def _matrix_key(n: int, kind: RotationKind, device: torch.device) -> str:
    key = f"{n} {kind} {device}"
    _tensors[key] = _cached_matrix(n, kind, device)
    return key


def _signs_key(size: int, block: int, seed: int, kind: RotationKind, device: torch.device) -> str:
    key = f"{size} {block} {seed} {kind} {device}"
    _tensors[key] = scaled_signs(Rotation(size, block, seed, kind), device)
    return key


for _function in (_split, _matrix_key, _signs_key):
    # The decorator torch.compiler.assume_constant_result sets this too, and imports the whole compiler.
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def _paley(order: int) -> Tensor:
    """Paley's first (order q + 1) or second (order 2 (q + 1)) matrix, float32 on the CPU.

    With the quadratic character chi of the integers mod q and the Jacobsthal matrix J_ij = chi(j - i), C is J
    bordered by ones, C C^T = q I. First: C is skew, H = I + C. Second: C is symmetric,
    H = kron(C, [[1, 1], [1, -1]]) + kron(I, [[1, -1], [-1, -1]]).
    """
    q = _paley_prime(order)
    assert q is not None
    squares = {i * i % q for i in range(1, q)}
    chi = [0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]
    side = -1.0 if q % 4 == 3 else 1.0
    bordered = [[0.0] + [1.0] * q] + [[side] + [chi[(j - i) % q] for j in range(q)] for i in range(q)]
    C = torch.tensor(bordered, device="cpu")
    identity = torch.eye(q + 1, device="cpu")
    if q % 4 == 3:
        return identity + C
    first = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    second = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], device="cpu")
    return torch.kron(C, first) + torch.kron(identity, second)
