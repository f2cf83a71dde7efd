"""Low-rank factors against the full singular value decomposition in float64."""

import pytest
import torch

from ditq.numerics import low_rank


def trained_like(n: int, k: int) -> torch.Tensor:
    """Singular values fall as 1 / i, as those of trained weights do at first."""
    torch.manual_seed(n + k)
    u, v = (torch.linalg.qr(torch.randn(size, min(n, k))).Q for size in (n, k))
    return u @ torch.diag(1 / torch.arange(1.0, min(n, k) + 1)) @ v.T


@pytest.mark.parametrize(("n", "k", "rank"), [(96, 160, 8), (160, 96, 16), (128, 128, 1), (256, 300, 32)])
@pytest.mark.parametrize("flat", [False, True], ids=["trained", "random"])
def test_close_to_the_best_approximation(n: int, k: int, rank: int, flat: bool) -> None:
    w = torch.randn(n, k) if flat else trained_like(n, k)
    up, down = low_rank(w, rank)
    assert (up.shape, down.shape, up.dtype, down.dtype) == ((n, rank), (rank, k), torch.float32, torch.float32)
    best = torch.linalg.svdvals(w.double())[rank:].square().sum()
    error = torch.dist(w, up @ down).double().square()
    assert best * (1 - 1e-5) < error < best * (1.015 if flat else 1.002)


def test_a_matrix_of_low_rank_is_exact() -> None:
    w = torch.randn(120, 5) @ torch.randn(5, 90)
    up, down = low_rank(w, 5)
    torch.testing.assert_close(up @ down, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 20])
def test_both_factors_carry_the_root_of_the_singular_values(rank: int) -> None:
    w = trained_like(20, 40)
    up, down = low_rank(w, rank)
    roots = torch.linalg.svdvals(w)[:rank].sqrt()
    torch.testing.assert_close(up.norm(dim=0), roots, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(down.norm(dim=1), roots, rtol=1e-3, atol=1e-5)


def test_all_ranks_give_the_matrix() -> None:
    w = torch.randn(6, 10)
    up, down = low_rank(w, 6)
    torch.testing.assert_close(up @ down, w, rtol=0, atol=1e-5)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    w = torch.randn(100, 100).to(torch.bfloat16)
    before = torch.get_rng_state()
    first = low_rank(w, 4)
    torch.manual_seed(99)
    again, other = low_rank(w, 4), low_rank(w, 4, seed=1)
    torch.manual_seed(0)
    torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    low_rank(w, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("shape", "rank"), [((4, 6), 5), ((4, 6), 0), ((4, 6), -1), ((6,), 1)])
def test_impossible_ranks_are_refused(shape: tuple[int, ...], rank: int) -> None:
    with pytest.raises(ValueError, match=rf"got {rank} for \[{', '.join(map(str, shape))}\]"):
        low_rank(torch.zeros(shape), rank)
