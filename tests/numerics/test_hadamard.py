"""Hadamard matrices and rotations against their definitions, in float64."""

import pytest
import torch

from ditq.numerics import (
    Rotation,
    hadamard_matrix,
    is_supported,
    largest_block,
    largest_regular_block,
    rotate,
    rotation_matrix,
    signs,
    unrotate,
)

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64, 72, 76, 80, 84, 96, 108, 120, 128, 140, 144,
          160, 168, 192]  # fmt: skip
# 1152 DiT-XL and PixArt, 4608 its MLP, 2240 Sana, 8960 Wan 1.3B, 13824 Wan 14B, 15360 FLUX
WIDTHS = [256, 384, 768, 1152, 1536, 1920, 2240, 2304, 3072, 4096, 4608, 5120, 5600, 6144, 8960, 12288, 13824, 15360]


# Written down once, so that a change of the generator or of the construction is seen.
PINNED_0 = [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1, -1]
PINNED_1234 = [1, 1, -1, 1, -1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, -1]
PINNED_ROTATION = [-22, 8, -30, 6, -8, 34, -20, 28, -32, 32, 10, -6]


def by_definition(rotation: Rotation) -> torch.Tensor:
    """diag(signs) blockdiag(H, ..., H) / sqrt(block), float64; without signs for a regular H."""
    h = hadamard_matrix(rotation.block, rotation.kind).double()
    blocks = torch.block_diag(*[h] * (rotation.size // rotation.block))
    if rotation.kind == "regular":
        return blocks / rotation.block**0.5
    return signs(rotation.size, rotation.seed).double().diag() @ blocks / rotation.block**0.5


@pytest.mark.parametrize("n", ORDERS)
def test_orthogonal_with_entries_of_one(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.dtype == torch.float32 and h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones(n, n))
    assert torch.equal(h @ h.T, n * torch.eye(n))


def test_every_supported_order_up_to_200_is_a_hadamard_matrix() -> None:
    supported = [n for n in range(201) if is_supported(n)]
    assert set(ORDERS) <= set(supported)
    # 52 and 100 need prime powers, 92, 116, 156, 172, 184 and 188 other constructions than Paley's.
    assert sorted(set(range(4, 201, 4)) - set(supported)) == [52, 92, 100, 116, 156, 172, 184, 188]
    for n in supported:
        h = hadamard_matrix(n)
        assert torch.equal(h @ h.T, n * torch.eye(n)), n
        assert torch.equal(h.abs(), torch.ones(n, n)), n


@pytest.mark.parametrize("width", WIDTHS)
def test_widths_of_models_have_a_full_transform(width: int) -> None:
    assert is_supported(width)


@pytest.mark.parametrize("n", [4, 64, 256, 1024])
def test_powers_of_two_are_sylvester_matrices(n: int) -> None:
    popcount = torch.tensor([[bin(i & j).count("1") for j in range(n)] for i in range(min(n, 8))])
    assert torch.equal(hadamard_matrix(n)[:8], (1 - 2 * (popcount % 2)).float())


@pytest.mark.parametrize(("n", "nearest"), [(3, "2 and 4"), (92, "88 and 96"), (52, "48 and 56"), (0, "1"), (-4, "1")])
def test_unsupported_orders_name_the_nearest(n: int, nearest: str) -> None:
    assert not is_supported(n)
    with pytest.raises(ValueError, match=f"order {n} is known here, the nearest are {nearest}(;|$)"):
        hadamard_matrix(n)


@pytest.mark.parametrize(("n", "limit", "block"), [(1152, 128, 128), (1152, 64, 64), (1152, 100, 64), (36, 128, 4),
                                                   (7, 128, 1), (4096, 128, 128), (4096, 4096, 4096)])  # fmt: skip
def test_largest_block(n: int, limit: int, block: int) -> None:
    assert largest_block(n, limit) == block


@pytest.mark.parametrize(("size", "block"), [
    (1, 1), (2, 2), (12, 12), (20, 20), (28, 28), (64, 64), (76, 76), (256, 256), (1152, 1152), (1152, 128),
    (1152, 64), (1152, 32), (1152, 36), (1152, 288), (768, 768), (1024, 512), (1024, 1024), (280, 140),
])  # fmt: skip
def test_rotate_is_the_matrix_product(size: int, block: int) -> None:
    rotation = Rotation(size, block, seed=3)
    q = by_definition(rotation)
    torch.testing.assert_close(rotation_matrix(rotation).double(), q, rtol=1e-6, atol=0)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 3, size)
    y = rotate(x, rotation)
    assert y.dtype == torch.float32 and y.shape == x.shape
    torch.testing.assert_close(y.double(), x.double() @ q, rtol=0, atol=2e-5)
    torch.testing.assert_close(unrotate(x, rotation).double(), x.double() @ q.T, rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------------- regular matrices


def test_regular_matrices_are_kronecker_powers_of_that_of_order_4() -> None:
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    expected = four
    for n in (4, 16, 64, 256):
        h = hadamard_matrix(n, "regular")
        assert torch.equal(h, expected)
        assert torch.equal(h @ h, n * torch.eye(n))
        assert torch.equal(h, h.T)
        assert torch.equal(h.sum(0), torch.full((n,), n**0.5))
        expected = torch.kron(four, expected)


@pytest.mark.parametrize(("size", "block"), [(4, 4), (48, 16), (1152, 64), (1152, 4), (1536, 256), (256, 256)])
def test_regular_rotation_is_the_matrix_product_and_its_own_inverse(size: int, block: int) -> None:
    rotation = Rotation(size, block, kind="regular")
    q = by_definition(rotation)
    assert torch.equal(rotation_matrix(rotation).double(), q)  # powers of two: nothing is rounded
    x = torch.randn(2, 3, size)
    y = rotate(x, rotation)
    torch.testing.assert_close(y.double(), x.double() @ q, rtol=0, atol=2e-5)
    torch.testing.assert_close(rotate(y, rotation), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(unrotate(y, rotation), x, rtol=0, atol=1e-5)


def test_regular_rotation_spreads_a_common_mean_over_its_block() -> None:
    """Sylvester's first column collects the mean of a block in one channel; here every channel keeps it."""
    x = torch.ones(1, 256)
    assert torch.equal(rotate(x, Rotation(256, 64, kind="regular")), x)


@pytest.mark.parametrize(("n", "block"), [(1152, 64), (4608, 256), (1536, 256), (20, 4), (6, None), (7, None)])
def test_largest_regular_block(n: int, block: int | None) -> None:
    assert largest_regular_block(n) == block


@pytest.mark.parametrize("order", [1, 2, 8, 128, 1024])
def test_other_regular_orders_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"of the orders 4, 16, 64, 256 are known here, got order {order}"):
        hadamard_matrix(order, "regular")


def test_regular_rotation_has_no_seed() -> None:
    with pytest.raises(ValueError, match="its seed must be 0, got 3"):
        Rotation(64, 64, 3, "regular")


@pytest.mark.parametrize(("size", "block"), [(4608, 4608), (4608, 128), (8960, 8960), (13824, 13824), (16384, 16384)])
def test_unrotate_is_the_inverse_and_length_is_kept(size: int, block: int) -> None:
    rotation = Rotation(size, block, seed=0)
    x = torch.randn(3, size)
    y = rotate(x, rotation)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(unrotate(y, rotation), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [4608, 13824])
def test_a_spike_spreads_evenly_over_the_full_width(size: int) -> None:
    x = torch.zeros(1, size)
    x[0, 17] = 1
    torch.testing.assert_close(rotate(x, Rotation(size, size, 5)).abs(), torch.full((1, size), size**-0.5))


def test_products_of_rotated_operands_are_unchanged() -> None:
    x, w, rotation = torch.randn(5, 1152), torch.randn(7, 1152), Rotation(1152, 1152, 1)
    torch.testing.assert_close(rotate(x, rotation) @ rotate(w, rotation).T, x @ w.T, rtol=0, atol=1e-3)


def test_signs_are_pinned() -> None:
    # A checkpoint stores a seed, not the signs: these must never change.
    assert signs(16, 0).tolist() == PINNED_0
    assert signs(16, 1234).tolist() == PINNED_1234


def test_rotation_is_pinned() -> None:
    y = rotate(torch.arange(12.0)[None], Rotation(12, 12, 7)) * 12**0.5
    torch.testing.assert_close(y[0], torch.tensor(PINNED_ROTATION).float(), rtol=0, atol=1e-4)


def test_signs_depend_on_seed_only() -> None:
    before = torch.get_rng_state()
    first = signs(1000, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(signs(1000, 1), first)
    assert not torch.equal(signs(1000, 2), first)
    assert set(first.tolist()) == {-1.0, 1.0} and abs(first.sum()) < 150


def test_cached_matrices_cannot_be_written() -> None:
    hadamard_matrix(12).zero_()
    rotation_matrix(Rotation(12, 12, 0)).zero_()
    assert hadamard_matrix(12).abs().min() == 1
    assert rotation_matrix(Rotation(12, 12, 0)).abs().min() > 0


def test_cache_filled_in_inference_mode_serves_training() -> None:
    rotation = Rotation(56, 28, seed=424242)  # seed and order that no other test has cached
    with torch.inference_mode():
        rotate(torch.ones(1, 56), rotation)
    x = torch.randn(2, 56, requires_grad=True)
    (rotate(x, rotation) * torch.ones(56)).sum().backward()
    assert x.grad is not None
    expected = unrotate(torch.ones(2, 56), rotation)
    torch.testing.assert_close(x.grad, expected)


def test_default_device_does_not_reach_the_cache() -> None:
    rotation = Rotation(88, 44, seed=31)
    with torch.device("meta"):
        q = rotation_matrix(rotation)
    assert q.device.type == "cpu"


def test_half_precision_and_strided_inputs() -> None:
    rotation = Rotation(64, 64, 0)
    x = torch.randn(64, 6).to(torch.bfloat16).T
    assert torch.equal(rotate(x, rotation), rotate(x.float().contiguous(), rotation))
    assert rotate(torch.empty(0, 64), rotation).shape == (0, 64)
    assert rotate(torch.ones(64), rotation).shape == (64,)


@pytest.mark.parametrize(("size", "block", "seed", "message"), [
    (100, 64, 0, "block must divide size 100, got 64"), (92, 92, 0, "no Hadamard matrix of order 92"),
    (64, 0, 0, "block must divide size 64, got 0"), (64, 64, -1, "seed must not be negative, got -1"),
])  # fmt: skip
def test_impossible_rotations(size: int, block: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotation(size, block, seed)


@pytest.mark.parametrize("function", [rotate, unrotate])
def test_wrong_width_is_named(function: object) -> None:
    with pytest.raises(ValueError, match=r"64 channels on its last axis, got shape \(2, 128\)"):
        function(torch.zeros(2, 128), Rotation(64, 64, 0))  # type: ignore[operator]
